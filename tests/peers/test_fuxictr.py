"""The same weights in FuxiCTR 2.3.10 give the same numbers. Run by `make peers-test`, which fetches it."""

import pytest
import torch
from torch import nn

from training.networks.crosses import Experts, MatrixCross, MixtureCross, VectorCross
from training.networks.finalmlp import BilinearFusion

pytestmark = pytest.mark.filterwarnings("ignore")
theirs = pytest.importorskip("fuxictr.pytorch.layers.interactions.cross_net", reason="make peers-test")
WIDTH, ROWS = 12, 5


def scrambled(*modules: nn.Module) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters():
                parameter.normal_(std=0.5)


@pytest.fixture
def rows() -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_dcn(rows: torch.Tensor) -> None:
    ours, peer = VectorCross(WIDTH, 3), theirs.CrossNet(WIDTH, 3)
    scrambled(ours)
    for i, layer in enumerate(peer.cross_net):
        layer.weight.weight.copy_(ours.weights[i][None])
        layer.bias.copy_(ours.biases[i])
    assert torch.allclose(ours(rows), peer(rows), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_dcn_v2(rows: torch.Tensor) -> None:
    ours, peer = MatrixCross(WIDTH, 3), theirs.CrossNetV2(WIDTH, 3)
    scrambled(ours)
    for up, layer in zip(ours.up, peer.cross_layers, strict=True):
        layer.load_state_dict(up.state_dict())
    assert torch.allclose(ours(rows), peer(rows), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_dcn_v2_with_experts(rows: torch.Tensor) -> None:
    """Theirs has gates without a bias that all layers share, and loses the rows' axis where there is one: ours is given such gates."""
    ours, peer = MixtureCross(WIDTH, 2, 3, 4), theirs.CrossNetMix(WIDTH, 2, 3, 4)
    scrambled(ours)
    for i, layer in enumerate(ours.layers):
        assert isinstance(layer, Experts)
        layer.gate.weight.copy_(ours.layers[0].gate.weight)
        layer.gate.bias.zero_()
        peer.C_list[i].copy_(layer.middle)
        peer.U_list[i].copy_(layer.up.weight.view(WIDTH, 4, 3).transpose(0, 1))
        peer.V_list[i].copy_(layer.down.weight.view(4, 3, WIDTH).transpose(1, 2))
        peer.bias[i].copy_(layer.up.bias[:, None])
        for e, gate in enumerate(peer.gating):
            gate.weight.copy_(layer.gate.weight[e][None])
    assert torch.allclose(ours(rows), peer(rows), rtol=1e-5, atol=1e-5)
    assert peer(rows[:1]).shape == (WIDTH,)
    assert ours(rows[:1]).shape == (1, WIDTH)


@torch.no_grad()
def test_finalmlp_s_fusion(rows: torch.Tensor) -> None:
    zoo = pytest.importorskip("model_zoo.LongCTR.FinalMLP.FinalMLP")
    ours, peer = BilinearFusion(WIDTH, 8, 4), zoo.InteractionAggregation(WIDTH, 8, 1, 4)
    scrambled(ours)
    peer.w_x.load_state_dict(ours.first.state_dict())
    peer.w_y.weight.copy_(ours.second.weight)
    peer.w_y.bias.zero_()
    peer.w_xy.copy_(ours.matrices.reshape(-1, 1))
    second = torch.randn(ROWS, 8)
    assert torch.allclose(ours(rows[:, None], second[:, None]), peer(rows, second), rtol=1e-5, atol=1e-5)
