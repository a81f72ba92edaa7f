import numpy as np
import onnxruntime
import pytest
import small
import torch
from torch import nn

from tests.test_networks import HISTORY_AND_ADS, ONLY_ADS
from training.calibrate import Calibration
from training.export.export import ServedNetwork, random_feeds, score
from training.networks.deepfm import FusedDeepFM
from training.networks.din import FusedActivation, LocalActivation
from training.networks.embeddings import Embeddings
from training.networks.fuse import fused
from training.networks.layers import BatchNorm, Dice, Tower

SINGLE = 'name = "single"\n' + "".join(
    f'[{side}.{name}]\nkind = "category"\n' for side, name in (("user", "age"), ("ad", "genre"), ("ad", "ad_id"))
)
CASES = [
    ("deepfm", small.SCHEMA, {}),
    ("deepfm", SINGLE, {}),
    ("deepfm", ONLY_ADS, {}),
    ("din", small.SCHEMA, {"attention": (6, 5, 4), "hidden": (8, 7)}),
    ("din", small.SCHEMA, {"attention": (6, 5), "softmax": True}),
    ("din", small.SCHEMA, {"attention": (6, 5), "first_order": 1}),
    ("din", HISTORY_AND_ADS, {"attention": (3,), "long": "sdim", "newest": 2}),
]


def trained(family: str, text: str, **settings: object) -> nn.Module:
    """A network as training may leave it: statistics, α and weights far from where they began, some α at 1."""
    network = small.network(family, text, **settings)
    torch.manual_seed(3)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, BatchNorm) and module.num_features:
                module.running_mean.normal_(std=0.5)
                module.running_var.uniform_(0.3, 2)
                if module.affine:
                    module.weight.normal_()
                    module.bias.normal_(std=0.3)
            elif isinstance(module, Dice):
                module.alpha.normal_(std=0.5)
                module.alpha[0] = 1.0
            elif isinstance(module, nn.Linear):
                module.bias.normal_(std=0.3)
            elif isinstance(module, Embeddings):
                module.table.weight[1:].normal_(std=0.5)
    return network


@pytest.mark.parametrize("tile", [None, 7])
@pytest.mark.parametrize(("family", "text", "settings"), CASES)
def test_a_fused_network_gives_the_same_logits(family: str, text: str, settings: dict, tile: int | None) -> None:
    network = trained(family, text, **settings)
    with torch.no_grad():
        expected = small.click(network, *small.parts(text))
        assert torch.allclose(small.click(fused(network, tile), *small.parts(text)), expected, atol=2e-5, rtol=1e-5)
    assert expected.std() > 0.05


def test_nothing_is_left_that_has_a_fused_form_and_the_network_stays_as_it_was() -> None:
    for family, text, settings in CASES:
        network = trained(family, text, **settings)
        before = {name: value.clone() for name, value in network.state_dict().items()}
        kinds = {type(module) for module in fused(network).modules()}
        assert not kinds & {Tower, LocalActivation, Dice, BatchNorm, Embeddings}
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_deepfm_of_single_categories_alone_loses_its_squares() -> None:
    assert isinstance(fused(trained("deepfm", SINGLE)), FusedDeepFM)
    assert not isinstance(fused(trained("deepfm", small.SCHEMA)), FusedDeepFM)


def test_in_tiles_all_behaviours_are_weighed_once_whatever_the_sizes() -> None:
    unit = trained("din", small.SCHEMA, attention=(6, 5)).attention
    whole, tiled = FusedActivation(unit, None), FusedActivation(unit, 20)
    width = unit.first.in_features // 4
    with torch.no_grad():
        for candidates, behaviours in ((1, 1), (1, 20), (1, 21), (19, 3)):
            q, k, mask = torch.randn(2, candidates, width), torch.randn(2, behaviours, width), torch.rand(2, behaviours) > 0.3
            assert torch.allclose(tiled(q, k, mask), whole(q, k, mask), atol=1e-5)


@pytest.mark.parametrize(("family", "text", "settings"), [CASES[case] for case in (1, 3, 4)])
def test_the_graph_gives_what_torch_gives(family: str, text: str, settings: dict) -> None:
    """Of all pairs at once, by the tracer; the loop over tiles, which it does not take, is in `test_export`."""
    schema = small.schema(text)
    served = ServedNetwork(trained(family, text, **settings), Calibration(0.3, -0.2), schema).eval()
    session = onnxruntime.InferenceSession(small.traced(served), providers=["CPUExecutionProvider"])
    for requests, behaviours, candidates in ((1, 1, 1), (1, 4, 600), (1, 300, 5), (1, 257, 2), (2, 9, 100), (70, 3, 9)):
        feeds = random_feeds(schema, {}, requests, behaviours, candidates, seed=behaviours)
        assert np.abs(session.run(None, feeds)[0] - score(served, feeds)).max() < 1e-5
