import pytest
import small
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.test_networks import CLOSE, HISTORY_AND_ADS
from training.networks.contract import Part
from training.networks.din import LocalActivation

PART_OF_AN_AD = small.SCHEMA.replace('"ad_id", "genre", "tags", "price"', '"ad_id", "price", "genre"')
SCHEMAS = [small.SCHEMA, PART_OF_AN_AD, HISTORY_AND_ADS]


def unit(softmax: bool, width: int = 3) -> LocalActivation:
    torch.manual_seed(0)
    built = LocalActivation(width, (6, 4), softmax)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(std=0.7)
        for name, buffer in built.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
    return built.eval()


def literal_weights(block: LocalActivation, q: Tensor, k: Tensor) -> Tensor:
    """The MLP of fig. 2 over [q, k, q - k, q * k] `(R, C, T)`."""
    q, k = torch.broadcast_tensors(q.unsqueeze(2), k.unsqueeze(1))
    x = F.linear(torch.cat([q, k, q - k, q * k], dim=-1), block.first.weight, block.first.bias)
    return block.rest(x).squeeze(-1)


def test_local_activation_is_an_mlp_over_q_k_their_difference_and_their_product() -> None:
    block = unit(softmax=False)
    q, k, mask = torch.randn(2, 5, 3), torch.randn(2, 4, 3), torch.tensor([[True] * 4, [True, True, False, False]])
    with torch.no_grad():
        weights = literal_weights(block, q, k)
        expected = torch.stack([sum(weights[r, :, t, None] * k[r, t] for t in range(4) if mask[r, t]) for r in range(2)])
        assert torch.allclose(block(q, k, mask), expected, atol=1e-5)
        # The weights are not normalised: twice the same history, twice the interest (DIN paper, section 4.3).
        twice = block(q, torch.cat([k, k], dim=1), torch.cat([mask, mask], dim=1))
        assert torch.allclose(twice, 2 * expected, atol=1e-5)


def test_with_softmax_the_weights_sum_to_one_over_what_is_no_padding() -> None:
    block = unit(softmax=True)
    q, k = torch.randn(2, 5, 3), torch.randn(2, 4, 3)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    with torch.no_grad():
        scores = literal_weights(block, q, k)
        for r, length in enumerate((4, 2)):
            expected = scores[r, :, :length].softmax(-1) @ k[r, :length]
            assert torch.allclose(block(q, k, mask)[r], expected, atol=1e-5)
        nothing = block(q, k, torch.zeros_like(mask))
        assert not nothing.any()


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("text", SCHEMAS)
def test_logits_are_the_tower_over_user_interests_and_ad(text: str, softmax: bool) -> None:
    network = small.network("din", text, softmax=softmax)
    user, history, ad = small.parts(text)
    with torch.no_grad():
        ads, past = network.embed("ad", ad), network.embed("history", history)
        layouts = network.embed.layouts
        names = {part: [s.field.name for s in (*layouts[part].ids, *layouts[part].numbers)] for part in ("ad", "history")}
        q = torch.cat([ads[:, :, names["ad"].index(name)] for name in names["history"]], dim=-1)
        interests = network.attention(q, past.flatten(2), history.ids[..., 0] > 0)
        request = network.embed("user", user).flatten(1) if "user" in network.embed else torch.zeros(3, 0)
        logits = small.click(network, user, history, ad)
        assert torch.allclose(logits, network.tower(request, torch.cat([interests, ads.flatten(2)], dim=-1)), **CLOSE)
        assert logits.shape == (3, 5)


def test_a_first_order_adds_a_weight_of_each_value_and_begins_alone() -> None:
    network, plain = small.network("din", first_order=1), small.network("din")
    plain.load_state_dict({name: weight for name, weight in network.state_dict().items() if not name.startswith("first.")})
    (user, history, ad), first = small.parts(), network.first
    with torch.no_grad():
        expected = first("user", user).sum((1, 2))[:, None] + first("ad", ad).sum((2, 3))
        assert torch.allclose(small.click(network, user, history, ad), small.click(plain, user, history, ad) + expected, **CLOSE)
        network.flatten()
        alone = small.click(network, user, history, ad) - network.tower.bias
        assert torch.allclose(alone, expected, **CLOSE)
    assert {id(weight) for weight in network.first_weights()} == {id(network.tower.bias), *map(id, first.parameters())}
    assert plain.first_weights() == []
    with pytest.raises(ValueError, match=r"^first_order is 2; it must be 0 or 1, or -1: by the rows$"):
        small.network("din", first_order=2)


def test_another_history_gives_another_interest_for_each_candidate() -> None:
    network = small.network("din")
    user, history, ad = small.parts()
    other = Part(history.ids.clone(), history.numbers)
    other.ids[:, 0, 0] = 3
    with torch.no_grad():
        change = small.click(network, user, other, ad) - small.click(network, user, history, ad)
    assert change.abs().amax() > 1e-2
    assert change.std(1).amax() > 1e-3


def test_what_is_padding_is_not_trained_on_nor_counted_by_dice() -> None:
    q, k, mask = torch.randn(2, 1, 3), torch.randn(2, 4, 3), torch.tensor([[True] * 4, [True, True, False, False]])
    found = []
    for padding in (0, 5):
        block = unit(softmax=False).train()
        keys = torch.cat([k.masked_fill(~mask.unsqueeze(-1), 7.0), torch.full((2, padding, 3), 9.0)], 1)
        interests = block(q, keys, torch.cat([mask, torch.zeros(2, padding, dtype=torch.bool)], 1))
        interests.square().sum().backward()
        mean = block.rest[0].norm.running_mean
        found.append([interests, mean, *(parameter.grad for parameter in block.parameters())])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))
    block = unit(softmax=False).train()
    x = F.linear(torch.cat([qs := q.expand(-1, 4, -1), k, qs - k, qs * k], -1)[mask], block.first.weight, block.first.bias)
    literal = torch.zeros(2, 4).masked_scatter(mask, block.rest(x).squeeze(-1))
    assert torch.allclose(unit(softmax=False).train()(q, k, mask).squeeze(1), (literal.unsqueeze(-1) * k).sum(1), atol=1e-5)
