import pytest
import small
import torch
from torch import Tensor

from tests.test_deepfm import vectors
from tests.test_networks import SCHEMAS
from training.networks.deep_crossing import FusedUnit, ResidualUnit
from training.networks.layers import BatchNorm


def test_a_unit_adds_its_input_before_the_last_relu() -> None:
    unit = ResidualUnit(2, 1, 0.0).eval()
    with torch.no_grad():
        for parameter, value in zip(
            (unit.first.weight, unit.first.bias, unit.rest[2].weight, unit.rest[2].bias),
            ([[1.0, 1.0]], [-1.0], [[2.0], [-3.0]], [0.5, 0.0]),
            strict=True,
        ):
            parameter.copy_(torch.tensor(value))
    # ReLU(3 + 1 - 1) = 3; (2 * 3 + 0.5, -3 * 3) + (3, 1) = (9.5, -8); batch norm in evaluation, unmoved, divides by sqrt(1 + 1e-5) twice
    for built in (unit, FusedUnit(unit)):
        assert built(torch.tensor([[3.0, 1.0]])).tolist()[0] == pytest.approx([9.5, 0.0], abs=1e-3)


def normed(norm: BatchNorm, x: Tensor) -> Tensor:
    """Batch norm in evaluation."""
    return (x - norm.running_mean) / torch.sqrt(norm.running_var + norm.eps) * norm.weight + norm.bias


@pytest.mark.parametrize("text", SCHEMAS)
def test_logits_are_scored_from_residual_units_upon_all_fields(text: str) -> None:
    network, parts = small.network("deep_crossing", text, hidden=(6, 3)), small.parts(text)
    with torch.no_grad():
        logits = small.click(network, *parts)
        for row in range(3):
            x = torch.cat(vectors(network.embed, parts, row, 2))
            for unit in network.units:
                norm, _, linear, last_norm = unit.rest
                inner = normed(norm, unit.first.weight @ x + unit.first.bias).clamp(min=0)
                x = (normed(last_norm, linear.weight @ inner + linear.bias) + x).clamp(min=0)
            expected = float(network.score.weight[0] @ x + network.score.bias)
            assert float(logits[row, 2]) == pytest.approx(expected, abs=1e-4, rel=1e-4)
