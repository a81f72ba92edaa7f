import math

import pytest
import small
import torch
from torch import Tensor

from tests.test_networks import CLOSE, HISTORY_AND_ADS
from training.networks.bst import BST, TransformerLayer
from training.networks.contract import Part

PART_OF_AN_AD = small.SCHEMA.replace('"ad_id", "genre", "tags", "price"', '"ad_id", "price", "genre"')


def literal_layer(layer: TransformerLayer, sequence: Tensor, place: int) -> Tensor:
    """What one place of a sequence `(L, D)` becomes, head by head: self-attention, then the feed-forward layer."""
    width = sequence.shape[1] // layer.heads
    mixed = []
    for head in range(layer.heads):
        part = slice(head * width, (head + 1) * width)
        query, key, value = (linear.weight[part] for linear in (layer.query, layer.key, layer.value))
        scores = torch.stack([(query @ sequence[place]) @ (key @ item) / math.sqrt(width) for item in sequence])
        mixed.append(sum(weight * (value @ item) for weight, item in zip(scores.softmax(0), sequence, strict=True)))
    x = layer.norms[0](sequence[place] + layer.mix.weight @ torch.cat(mixed))
    return layer.norms[1](x + layer.feed(x))


def literal_logits(network: BST, user: Part, history: Part, ad: Part) -> Tensor:
    """The paper's sequence of behaviours and candidate, one candidate at a time; behaviours look at behaviours."""
    past, ads, own = network.embed("history", history), network.embed("ad", ad), network.position.weight
    request = network.embed("user", user).flatten(1) if "user" in network.embed else torch.zeros(len(past), 0)
    logits = torch.zeros(ad.ids.shape[:2])
    for r in range(len(past)):
        length = int((history.ids[r, :, 0] > 0).sum())
        for c in range(ad.ids.shape[1]):
            behaviours = [torch.cat([past[r, t].flatten(), own[min(length - t, len(own) - 1)]]) for t in range(length)]
            sequence = torch.stack([*behaviours, torch.cat([ads[r, c, network.shared].flatten(), own[0]])])
            for layer in network.layers:
                before = [literal_layer(layer, sequence[:-1], place) for place in range(length)]
                sequence = torch.stack([*before, literal_layer(layer, sequence, length)])
            candidate = torch.cat([sequence[-1], ads[r, c, network.rest].flatten()])
            logits[r, c] = network.tower(request[r : r + 1], candidate[None, None])
    return logits


CASES = [(1, 1, 64), (1, 2, 64), (1, 4, 3), (2, 2, 64), (3, 4, 64)]


@pytest.mark.parametrize("text", [small.SCHEMA, HISTORY_AND_ADS, PART_OF_AN_AD])
@pytest.mark.parametrize(("layers", "heads", "positions"), CASES)
def test_logits_are_the_papers_head_by_head(text: str, layers: int, heads: int, positions: int) -> None:
    network = small.network("bst", text, layers=layers, attention_heads=heads, positions=positions)
    parts = small.parts(text)
    with torch.no_grad():
        assert torch.allclose(small.click(network, *parts), literal_logits(network, *parts), **CLOSE)


def test_a_layer_is_torchs_own_multi_head_attention() -> None:
    torch.manual_seed(0)
    layer, x, past = small.scrambled(TransformerLayer(6, 3, 0.0)), torch.randn(2, 1, 6), torch.randn(2, 4, 6)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    whole, padding = torch.cat([past, x], 1), torch.nn.functional.pad(~mask, (0, 1))
    with torch.no_grad():
        projections = torch.cat([layer.query.weight, layer.key.weight, layer.value.weight])
        own, _ = torch.nn.functional.multi_head_attention_forward(
            x.transpose(0, 1), whole.transpose(0, 1), whole.transpose(0, 1), 6, 3, projections, None, None, None, False, 0.0,
            layer.mix.weight, None, training=False, key_padding_mask=padding,
        )  # fmt: skip
        assert torch.allclose(layer.mix(layer.attend(x, past, mask, itself=True)), own.transpose(0, 1), atol=1e-5)


def test_positions_are_counted_from_the_last_behaviour() -> None:
    network = small.network("bst", positions=4)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    assert network.places(mask)[0].tolist() == [3, 3, 3, 2, 1]
    assert network.places(mask)[1, :2].tolist() == [2, 1]


def test_the_order_of_behaviours_matters_by_their_positions_alone() -> None:
    network, (user, history, ad) = small.network("bst"), small.parts()
    turned = Part(history.ids[:2].flip(1), history.numbers[:2].flip(1))
    user, history, ad = (Part(part.ids[:2], part.numbers[:2]) for part in (user, history, ad))
    with torch.no_grad():
        assert (small.click(network, user, turned, ad) - small.click(network, user, history, ad)).abs().amax() > 1e-2
        network.position.weight[1:] = network.position.weight[1]
        assert torch.allclose(small.click(network, user, turned, ad), small.click(network, user, history, ad), **CLOSE)


@pytest.mark.parametrize(("part", "column"), [("history", column) for column in range(4)] + [("ad", column) for column in range(4)])
def test_every_field_of_an_item_has_its_say(part: str, column: int) -> None:
    network = small.network("bst")
    parts = dict(zip(("user", "history", "ad"), small.parts(), strict=True))
    before = small.click(network, *parts.values())
    ids = parts[part].ids.clone()
    ids[..., column] = ids[..., column] % 2 + 1
    parts[part] = Part(ids, parts[part].numbers)
    assert (small.click(network, *parts.values()) - before).abs().amax() > 1e-3
