import math

import numpy as np
import pytest
import small
import torch
from torch import Tensor, nn

from features.schema import parse_schema
from training.networks.contract import Fields, Part
from training.networks.embeddings import Embeddings
from training.networks.layers import BatchNorm, Dice, Dropout, SplitLinear, Tower, VarianceNorm

# Vocabularies by name: b has ids 0 to 3, c has 0 to 2. Ids 0 are all row 0, so b takes rows 1 to 3 and c rows 4 and 5.
FIELDS = Fields.of(
    parse_schema(
        'name = "s"\nhistory = { length = 3, fields = ["ad_id", "price"] }\n'
        '[ad]\nad_id = { kind = "category", vocabulary = "b", buckets = 2 }\n'
        'tags = { kind = "list", length = 3, vocabulary = "c", buckets = 1 }\nprice = { kind = "number" }\n'
    ),
    small.Vocabularies({"c": small.Vocabulary(["x"]), "b": small.Vocabulary(["y", "z"])}, {}),
)


def embeddings() -> Embeddings:
    embed = Embeddings(FIELDS, 2)
    with torch.no_grad():
        embed.table.weight.copy_(torch.tensor([[0, 0], [1, 10], [2, 20], [3, 30], [4, 40], [6, 60]]))
        embed.scales["ad"].copy_(torch.tensor([[0.5, -1.0]]))
        embed.scales["history"].copy_(torch.tensor([[2.0, 3.0]]))
    return embed


def part(ids: list[list[int]], numbers: list[list[float]]) -> Part:
    return Part(torch.tensor(ids), torch.tensor(numbers))


def test_embeddings_are_looked_up_averaged_and_scaled() -> None:
    embed = embeddings()
    assert "user" not in embed
    vectors = embed("ad", part([[2, 1, 2, 0], [1, 2, 2, 2], [0, 0, 0, 0]], [[4.0], [0.0], [-2.0]]))
    assert vectors.tolist() == [
        [[2, 20], [5, 50], [2, -4]],  # the mean of (4, 40) and (6, 60), padding left out
        [[1, 10], [6, 60], [0, 0]],
        [[0, 0], [0, 0], [-1, 2]],
    ]
    past = embed("history", part([[3], [0]], [[1.0], [2.0]]))
    assert past.tolist() == [[[3, 30], [2, 3]], [[0, 0], [4, 6]]]


def test_embeddings_of_any_number_of_axes_are_those_of_the_rows() -> None:
    ids, numbers = torch.randint(0, 3, (2, 5, 4)), torch.randn(2, 5, 1)
    whole = embeddings()("ad", Part(ids, numbers))
    assert whole.shape == (2, 5, 3, 2)
    assert torch.equal(whole.flatten(0, 1), embeddings()("ad", Part(ids.flatten(0, 1), numbers.flatten(0, 1))))


def test_padding_gets_no_gradient_and_starts_at_zero() -> None:
    embed = Embeddings(FIELDS, 2)
    assert not embed.table.weight[0].any()
    assert embed.table.weight[1:].all()
    embed("ad", part([[2, 1, 0, 0], [0, 0, 0, 0]], [[1.0], [1.0]])).sum().backward()
    assert embed.table.weight.grad[:, 0].tolist() == [0, 0, 1, 0, 1, 0]


def test_a_behaviour_is_what_has_an_ad_id() -> None:
    history = Part(torch.tensor([[[1, 0], [2, 5], [0, 0]]]), torch.zeros(1, 3, 0))
    assert history.behaviours().tolist() == [[True, True, False]]


def test_a_part_of_distinct_rows_is_the_part_laid_out() -> None:
    distinct = part([[0], [3], [1]], [[0.0], [1.5], [-2.0]])
    rows = torch.tensor([[1, 2, 1, 0], [2, 0, 0, 0]])
    short, laid_out = Part(*distinct[:2], rows), Part(distinct.ids[rows], distinct.numbers[rows])
    assert torch.equal(short.behaviours(), laid_out.behaviours())
    results = []
    for given in (short, laid_out):
        embed = embeddings()
        vectors = embed("history", given)
        (vectors * torch.arange(vectors.numel()).view(vectors.shape)).sum().backward()
        results.append((vectors.tolist(), embed.table.weight.grad.tolist(), embed.scales["history"].grad.tolist()))
    assert results[0] == results[1]
    assert results[0][0][0][1] == [[1, 10], [-4, -6]]


def test_a_split_linear_is_a_linear_over_the_concatenation() -> None:
    layer = SplitLinear(3, 2, 4)
    request, candidate = torch.randn(5, 3), torch.randn(5, 7, 2)
    whole = torch.cat([request.unsqueeze(1).expand(5, 7, 3), candidate], dim=-1)
    expected = nn.functional.linear(whole, layer.weight, layer.bias)
    assert torch.allclose(layer(request, candidate), expected, atol=1e-6)
    assert not torch.allclose(layer(request, candidate.flip(1)), expected, atol=1e-2)


def test_batch_norm_is_over_all_axes_but_the_last() -> None:
    x = torch.randn(3, 4, 5, 2) * 3 + 1
    mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2), unbiased=False)
    assert torch.allclose(BatchNorm(2)(x), (x - mean) / (variance + 1e-5).sqrt(), atol=1e-5)


def dice() -> Dice:
    block = Dice(2)
    with torch.no_grad():
        block.alpha.copy_(torch.tensor([0.0, 0.25]))
    block.norm.running_mean, block.norm.running_var = torch.tensor([1.0, -2.0]), torch.tensor([4.0, 0.25])
    return block


def test_dice_in_evaluation_uses_what_training_saw() -> None:
    x = [[3.0, -1.0], [0.0, 0.0], [-5.0, 2.0]]
    for row, got in zip(x, dice().eval()(torch.tensor(x)).tolist(), strict=True):
        for value, mean, deviation, alpha, out in zip(row, (1, -2), (2, 0.5), (0.0, 0.25), got, strict=True):
            p = 1 / (1 + math.exp(-(value - mean) / deviation))
            assert out == pytest.approx(p * value + (1 - p) * alpha * value, rel=1e-5)


def test_dice_in_training_uses_the_batch_and_remembers_it() -> None:
    block = dice().train()
    x = torch.tensor([[[1.0, 5.0], [3.0, 7.0]], [[5.0, 3.0], [7.0, 1.0]]])
    p = torch.sigmoid((x - 4) / math.sqrt(5))  # both features: mean 4, variance 5
    assert torch.allclose(block(x), x * (p + (1 - p) * block.alpha), atol=1e-6)
    # A tenth of the way from what it was to the batch's mean and its unbiased variance, 20 / 3.
    assert block.norm.running_mean.tolist() == pytest.approx([0.9 * 1 + 0.4, 0.9 * -2 + 0.4])
    assert block.norm.running_var.tolist() == pytest.approx([0.9 * 4 + 2 / 3, 0.9 * 0.25 + 2 / 3])


def mlp(tower: Tower, x: Tensor) -> Tensor:
    """The tower as plain layers over the whole input `(n, request + candidate)`."""
    x = nn.functional.linear(x, tower.first.weight, tower.first.bias)
    for layer in tower.rest:
        x = layer(x)
    return x.squeeze(-1)


NORMALISED = {
    "dice": [Dice],
    "none": [nn.ReLU],
    "batch": [BatchNorm, nn.ReLU],
    "layer": [nn.LayerNorm, nn.ReLU],
    "variance": [VarianceNorm, nn.ReLU],
}


@pytest.mark.parametrize("norm", NORMALISED)
def test_a_tower_is_an_mlp_over_the_concatenation(norm: str) -> None:
    tower = Tower(3, 2, (5, 4), 0.3, norm).eval()
    kinds = [type(layer) for layer in tower.rest]
    activation = NORMALISED[norm]
    assert kinds == [*activation, Dropout, nn.Linear, *activation, Dropout, nn.Linear]
    request, candidate = torch.randn(6, 3), torch.randn(6, 7, 2)
    whole = torch.cat([request.unsqueeze(1).expand(6, 7, 3), candidate], dim=-1)
    logits = tower(request, candidate)
    assert logits.shape == (6, 7)
    assert torch.allclose(logits, mlp(tower, whole), atol=1e-5)
    assert logits.std() > 0.01


def test_variance_norm_divides_by_the_deviation_of_a_row_and_moves_nothing() -> None:
    rows = torch.tensor([[1.0, 3.0], [-20.0, 20.0], [5.0, 5.0]])
    expected = torch.tensor([[1.0, 3.0], [-1.0, 1.0], [5.0 / math.sqrt(1e-5)] * 2])
    assert torch.allclose(VarianceNorm()(rows), expected, rtol=1e-4)


@pytest.mark.parametrize("p", [0.0, 0.001, 0.2, 0.75, 1.0])
def test_dropout_hides_its_share_and_scales_what_stays_so_that_the_mean_is_kept(p: float) -> None:
    torch.manual_seed(1)
    dropout, x = Dropout(p), torch.ones(499, 3, 335, requires_grad=True)
    kept = dropout(x)
    assert p == 1 or torch.allclose(kept[kept != 0], torch.tensor(1 / (1 - p)), rtol=1e-4)
    spread = (p * (1 - p) / x.numel()) ** 0.5
    assert float((kept == 0).float().mean()) == pytest.approx(p, abs=5 * spread + 2**-17)
    by_lane = (kept.detach().flatten()[: 4 * 10_000].view(-1, 4) == 0).double().mean(0)  # of each 16 bits of a draw alike
    assert torch.allclose(by_lane, torch.tensor(p, dtype=torch.float64), atol=5 * (p * (1 - p) / 10_000) ** 0.5 + 2**-17)
    kept.sum().backward()
    assert torch.equal(x.grad, kept.detach())
    torch.manual_seed(1)
    assert torch.equal(dropout(x), kept)
    assert not p or torch.equal(dropout.eval()(x), x)


def test_a_tower_with_a_norm_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^there is no norm 'group'; choose one of none, batch, layer, variance$"):
        Tower(3, 2, (5,), 0.0, "group")


def test_a_tower_s_weights_start_as_xavier_s() -> None:
    tower = Tower(300, 200, (400, 300), 0.0)
    assert float(tower.first.weight.detach().std()) == pytest.approx(math.sqrt(2 / 900), rel=0.05)
    assert not tower.first.bias.any()
    assert [float(layer.weight.detach().std()) for layer in tower.rest if isinstance(layer, nn.Linear)] == [
        pytest.approx(math.sqrt(2 / 700), rel=0.05),
        pytest.approx(math.sqrt(2 / 301), rel=0.2),
    ]


def test_fields_know_sizes_and_counts() -> None:
    fields = Fields.of(small.schema(), small.vocabularies())
    assert [fields.count(name) for name in ("user", "history", "ad")] == [5, 4, 4]
    assert fields.sizes == {"user_id": 52, "age": 5, "genre": 5, "slot": 4, "ad_id": 14, "tags": 5}
    assert np.prod(list(Embeddings(fields, 3).table.weight.shape)) == 3 * (1 + 51 + 4 + 4 + 3 + 13 + 4)


def test_dice_s_own_gradients_are_those_of_autograd() -> None:
    torch.manual_seed(4)
    x, weight = torch.randn(6, 5, 2, dtype=torch.float64), torch.randn(6, 5, 2, dtype=torch.float64)
    found = []
    for ours in (True, False):
        block, given = dice().double().train(), x.clone().requires_grad_()
        p = torch.sigmoid(block.norm(given)) if not ours else None
        out = block(given) if p is None else given * (block.alpha + p * (1 - block.alpha))
        (out * weight).sum().backward()
        found.append([out, given.grad, block.alpha.grad, block.norm.running_var, block.norm.num_batches_tracked])
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(*found, strict=True))
