import pytest
import small
import torch
from torch import Tensor

from tests.test_dcn import mlp
from tests.test_deepfm import vectors
from tests.test_networks import ONLY_ADS, SCHEMAS
from training.networks.finalmlp import BilinearFusion, FeatureGate


def test_fusion_is_two_linear_parts_and_a_bilinear_product_a_head() -> None:
    fusion = BilinearFusion(2, 2, 2)
    with torch.no_grad():
        fusion.first.weight.copy_(torch.tensor([[1.0, 2.0]]))
        fusion.second.weight.copy_(torch.tensor([[0.5, 0.0]]))
        fusion.bias.fill_(0.25)
        fusion.matrices.copy_(torch.tensor([[[3.0]], [[-1.0]]]))
    # 0.25 + (2 + 2 * 1) + 0.5 * 4 + 2 * 3 * 4 + 1 * -1 * 5
    assert fusion(torch.tensor([[[2.0, 1.0]]]), torch.tensor([[[4.0, 5.0]]])).tolist() == [[25.25]]


def test_one_head_meets_all_pairs_and_two_heads_only_their_own() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(3, 5, 4), torch.randn(3, 5, 6)
    for heads in (1, 2):
        fusion = BilinearFusion(4, 6, heads)
        expected = torch.zeros(3, 5)
        with torch.no_grad():
            for r in range(3):
                for c in range(5):
                    total = fusion.first.weight[0] @ first[r, c] + fusion.bias[0] + fusion.second.weight[0] @ second[r, c]
                    for h in range(heads):
                        x, y = first[r, c].chunk(heads)[h], second[r, c].chunk(heads)[h]
                        total = total + x @ fusion.matrices[h] @ y
                    expected[r, c] = total
            assert torch.allclose(fusion(first, second), expected, atol=1e-5)


def literal_gate(gate: FeatureGate | None, context: Tensor, width: int) -> Tensor:
    """The factors `(width,)` for one context `(N,)`."""
    if gate is None:
        return torch.ones(width)
    if gate.constant is not None:
        return 2 / (1 + torch.exp(-gate.constant))
    first, _, last = gate.mlp
    return 2 / (1 + torch.exp(-(last.weight @ (first.weight @ context + first.bias).clamp(min=0) + last.bias)))


@pytest.mark.parametrize("gates", [True, False])
@pytest.mark.parametrize("text", SCHEMAS)
def test_logits_fuse_two_mlps_that_see_the_fields_through_gates_of_request_and_ad(text: str, gates: bool) -> None:
    network, parts = small.network("finalmlp", text, gates=gates), small.parts(text)
    with torch.no_grad():
        logits = small.click(network, *parts)
        for row in range(3):
            for candidate in range(5):
                found = vectors(network.embed, parts, row, candidate)
                split = len(found) - network.fields.count("ad")
                whole = torch.cat(found)
                request, ad = torch.cat([*found[:split], torch.zeros(0)]), torch.cat(found[split:])
                one = mlp(network.first, whole * literal_gate(network.by_request, request, len(whole)))
                two = mlp(network.second, whole * literal_gate(network.by_ad, ad, len(whole)))
                expected = float(network.fusion(one[None, None], two[None, None]))
                assert float(logits[row, candidate]) == pytest.approx(expected, abs=1e-4, rel=1e-4)


def test_a_gate_begins_near_one_and_each_mlp_has_its_own() -> None:
    network = small.network("finalmlp", ONLY_ADS)
    assert network.by_request is not None
    assert network.by_request.constant is not None
    with torch.no_grad():
        network.by_request.constant.zero_()
        nothing = network.by_request(torch.zeros(3, 0))
    assert nothing.tolist() == torch.ones(3, 3 * 4 + 4).tolist()
