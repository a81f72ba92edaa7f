import pytest
import small
import torch
from torch import Tensor

from tests.test_deepfm import vectors
from tests.test_networks import SCHEMAS
from training.networks.crosses import Experts, MatrixCross, MixtureCross, VectorCross
from training.networks.layers import MLP


def crosses() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    built = {"vector": VectorCross(6, 2), "matrix": MatrixCross(6, 2), "low": MatrixCross(6, 2, 3), "mixture": MixtureCross(6, 2, 3, 4)}
    return {name: small.scrambled(cross) for name, cross in built.items()}


def test_a_vector_cross_of_two_numbers_is_what_the_paper_s_equation_gives() -> None:
    cross = VectorCross(2, 2)
    with torch.no_grad():
        for parameter, value in zip(cross.parameters(), ([1.0, -1.0], [2.0, 0.5], [0.5, 0.0], [0.0, 1.0]), strict=True):
            parameter.copy_(torch.tensor(value))
    # x0 = (3, 1): x1 = x0 (3 - 1) + b + x0 = (6, 2) + (0.5, 0) + (3, 1) = (9.5, 3); x2 = x0 (19 + 1.5) + (0, 1) + x1 = (71, 24.5)
    assert cross(torch.tensor([3.0, 1.0])).tolist() == [71.0, 24.5]


def literal_matrix(cross: MatrixCross, start: Tensor) -> Tensor:
    """Eq. 1 and 2 of DCN-V2, of one input `(D,)`."""
    x = start
    for i, up in enumerate(cross.up):
        inner = cross.down[i].weight @ x if len(cross.down) else x
        x = start * (up.weight @ inner + up.bias) + x
    return x


def literal_experts(layer: Experts, start: Tensor, x: Tensor) -> Tensor:
    """Eq. 3 of DCN-V2, expert by expert, of one input `(D,)`."""
    rank = layer.middle.shape[1]
    scores = [float(layer.gate.weight[i] @ x + layer.gate.bias[i]) for i in range(layer.experts)]
    gates = torch.tensor(scores).softmax(0)
    total = torch.zeros_like(x)
    for i in range(layer.experts):
        own = slice(i * rank, (i + 1) * rank)
        low = torch.tanh(layer.middle[i] @ torch.tanh(layer.down.weight[own] @ x))
        total += gates[i] * start * (layer.up.weight[:, own] @ low + layer.up.bias)
    return total + x


@pytest.mark.parametrize("kind", ["matrix", "low"])
def test_a_matrix_cross_is_what_the_paper_s_equation_gives(kind: str) -> None:
    cross, inputs = crosses()[kind], torch.randn(3, 2, 6)
    with torch.no_grad():
        for r in range(3):
            for c in range(2):
                assert torch.allclose(cross(inputs)[r, c], literal_matrix(cross, inputs[r, c]), atol=1e-5)


def test_each_expert_of_a_mixture_has_a_gate_of_its_own() -> None:
    cross, start = crosses()["mixture"], torch.randn(6)
    with torch.no_grad():
        x = start
        for layer in cross.layers:
            x = literal_experts(layer, start, x)
        assert torch.allclose(cross(start), x, atol=1e-5)
        # A gate that lets one expert through alone leaves the others without a say.
        only = cross.layers[0]
        only.gate.bias.copy_(torch.tensor([0.0, 0.0, 1e4, 0.0]))
        before = only(start, x)
        only.middle[3] += 1.0
        assert torch.equal(only(start, x), before)
        only.middle[2] += 1.0
        assert not torch.allclose(only(start, x), before, atol=1e-3)


def mlp(deep: MLP, x: Tensor) -> Tensor:
    """The one layer of a tiny MLP: linear, batch norm in evaluation, ReLU."""
    first, norm = deep.first, deep.rest[0]
    z = first.weight @ x + first.bias
    return torch.relu((z - norm.running_mean) / torch.sqrt(norm.running_var + norm.eps) * norm.weight + norm.bias)


@pytest.mark.parametrize("text", SCHEMAS)
@pytest.mark.parametrize(
    ("family", "settings"),
    [("dcn", {}), ("dcn_v2", {}), ("dcn_v2", {"structure": "stacked"}), ("dcn_v2", {"low_rank": 3, "experts": 2})],
)
def test_logits_are_crosses_and_mlp_over_all_fields(family: str, settings: dict[str, object], text: str) -> None:
    network, parts = small.network(family, text, **settings), small.parts(text)
    with torch.no_grad():
        logits = small.click(network, *parts)
        for row in range(3):
            start = torch.cat(vectors(network.embed, parts, row, 1))
            crossed, deep = network.cross(start), network.deep
            stacked = settings.get("structure") == "stacked"
            top = mlp(deep, crossed) if stacked else torch.cat([crossed, mlp(deep, start)])
            expected = float(network.last.weight[0] @ top + network.last.bias)
            assert float(logits[row, 1]) == pytest.approx(expected, abs=1e-4, rel=1e-4)
