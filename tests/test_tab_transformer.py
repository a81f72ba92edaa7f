import pytest
import small
import torch
from torch import Tensor

from tests.test_dcn import mlp
from tests.test_dlrm import NUMBERS_OF_ADS, ONLY_CATEGORIES, WITH_CATEGORIES, categories, numbers
from training.networks.tab_transformer import FieldAttention


def literal_attention(layer: FieldAttention, x: Tensor) -> Tensor:
    """One layer of Vaswani et al. over the fields `(F, D)` of one row, head by head and field by field."""
    width = x.shape[1] // layer.heads
    q, k, v = (x @ weight.T + bias for weight, bias in zip(layer.look.weight.chunk(3), layer.look.bias.chunk(3), strict=True))
    seen = torch.zeros_like(x)
    for head in range(layer.heads):
        own = slice(head * width, (head + 1) * width)
        for i in range(len(x)):
            scores = torch.stack([q[i, own] @ k[j, own] / width**0.5 for j in range(len(x))]).exp()
            seen[i, own] = sum(scores[j] / scores.sum() * v[j, own] for j in range(len(x)))
    x = layer_norm(layer.norms[0], x + seen @ layer.mix.weight.T + layer.mix.bias)
    first, _, second = layer.feed
    inner = x @ first.weight.T + first.bias
    inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
    return layer_norm(layer.norms[1], x + inner @ second.weight.T + second.bias)


def layer_norm(norm: torch.nn.Module, x: Tensor) -> Tensor:
    assert isinstance(norm, torch.nn.LayerNorm)
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + norm.eps) * norm.weight + norm.bias


@pytest.mark.parametrize("text", [*WITH_CATEGORIES, ONLY_CATEGORIES, NUMBERS_OF_ADS])
def test_logits_are_an_mlp_on_transformed_categories_and_normalised_numbers(text: str) -> None:
    network, parts = small.network("tab_transformer", text, embedding=8, attention_heads=2, layers=2), small.parts(text)
    with torch.no_grad():
        logits = small.click(network, *parts)
        for row in range(3):
            vectors = categories(network.embed, parts, row, 1)
            x = torch.stack([torch.cat([network.columns[i], vector]) for i, vector in enumerate(vectors)])
            for layer in network.layers:
                x = literal_attention(layer, x)
            own = numbers(parts, row, 1)
            own = layer_norm(network.norm, own) if len(own) >= 3 else own
            expected = float(network.last.weight[0] @ mlp(network.deep, torch.cat([x.flatten(), own])) + network.last.bias)
            assert float(logits[row, 1]) == pytest.approx(expected, abs=2e-4, rel=2e-4)


def test_a_vector_tells_which_field_it_is_of() -> None:
    network, (user, history, ad) = small.network("tab_transformer", ONLY_CATEGORIES), small.parts(ONLY_CATEGORIES)
    user.ids.fill_(2)
    ad.ids.fill_(2)
    seen: list[Tensor] = []
    network.deep.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].view(3, 5, 2, 4)))
    with torch.no_grad():
        network.embed.table.weight[1:] = network.embed.table.weight[1].clone()  # two values that only their fields tell apart
        small.click(network, user, history, ad)
        network.columns[1] = network.columns[0]
        small.click(network, user, history, ad)
    (apart, also), (alike, same) = (transformed.unbind(2) for transformed in seen)
    assert (apart - also).abs().max() > 1e-3
    assert torch.allclose(alike, same, atol=1e-6)


def test_a_column_has_an_eighth_of_a_vector() -> None:
    network = small.network("tab_transformer", embedding=32, attention_heads=8)
    assert network.columns.shape == (4 + 3 + 3, 4)
    assert network.embed.table.embedding_dim == 28


def test_what_layer_norm_would_leave_nothing_of_goes_in_as_it_is() -> None:
    network, (user, history, ad) = small.network("tab_transformer", NUMBERS_OF_ADS), small.parts(NUMBERS_OF_ADS)
    with torch.no_grad():
        before = small.click(network, user, history, ad)
        assert (small.click(network, user, history, ad._replace(numbers=ad.numbers + 1)) - before).abs().max() > 1e-2
