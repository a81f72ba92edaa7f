"""Why an ad is where it is: what networks say of their logits, and the graph of that in a bundle."""

import json
from typing import Any

import numpy as np
import onnxruntime
import pytest
import small
import torch

from features.bundle import ATTENTION, CONTRIBUTIONS, EXPLAIN_MODEL, REST
from features.encode import Feeds
from tests.test_networks import CASES, SCHEMAS, fits
from training.calibrate import Calibration
from training.explain import explain_graph, explained
from training.export import FEW, Served, random_feeds
from training.networks import NETWORKS
from training.networks.contract import CLICK, Part, RequestTensors
from training.networks.deepfm import DeepFM
from training.networks.fuse import fused
from training.networks.layers import FusedTower
from training.networks.recurrent import ScannedGRU

SUMS = ("lr", "fm", "ffm", "fwfm", "mf")
"""Networks whose logit is the bias and what fields and pairs add."""
ADDITIVE = (*SUMS, "deepfm", "deeplight", "wide_deep")
ATTENTIVE = ("din", "dien", "bst")
SIZES = {name: v.size for name, v in small.vocabularies().categories.items()}
CALIBRATION = Calibration(0.3, -0.2, -0.7)


def cases_of(families: tuple[str, ...]) -> list[tuple[str, dict[str, Any]]]:
    return [case for case in CASES if case[0] in families]


def request_of(text: str = small.SCHEMA, seed: int = 0) -> RequestTensors:
    return RequestTensors(*small.parts(text, seed=seed))


def some_feeds(requests: int, behaviours: int, candidates: int) -> Feeds:
    return random_feeds(small.schema(), SIZES, requests, behaviours, candidates, seed=behaviours)


@pytest.mark.parametrize(("family", "settings", "text"), [(*case, t) for case in cases_of(ADDITIVE) for t in SCHEMAS if fits(*case, t)])
def test_contributions_and_the_rest_are_the_logit(family: str, settings: dict[str, Any], text: str) -> None:
    network, request = small.network(family, text, **settings), request_of(text)
    with torch.no_grad():
        told, logits = network.explained(request), network(request)[CLICK]
        assert len(set(told.names)) == len(told.names) == told.addends.shape[-1]
        rest = logits - told.addends.sum(-1)
        if family in SUMS:
            assert torch.allclose(rest, network.bias.expand(3, 5), atol=1e-4)
        else:  # the MLP has a say
            assert rest.std() > 1e-3
            network.tower.last.weight.zero_()
            biases = network(request)[CLICK] - told.addends.sum(-1)
            assert torch.allclose(biases, biases[:1, :1].expand(3, 5), atol=1e-4)


@pytest.mark.parametrize(("family", "settings"), cases_of(ADDITIVE))
def test_a_contribution_is_that_of_the_fields_that_it_is_called_by(family: str, settings: dict[str, Any]) -> None:
    """Another value of one field moves all that have its name, and nothing else."""
    network, request = small.network(family, **settings), request_of()
    with torch.no_grad():
        before = network.explained(request)
        fields = {field for name in before.names for field in name.split("*")}
        for field in ("user.age", "context.slot", "ad.genre", "ad.tags", "ad.price", "history.genre", "user.user_id", "ad.ad_id"):
            after = network.explained(moved(request, field)).addends
            changed = {name for name, by in zip(before.names, (after - before.addends).abs().amax((0, 1)), strict=True) if by > 1e-6}
            assert changed == {name for name in before.names if field in name.split("*")}, field
            assert bool(changed) == (field in fields)
    assert {"user.user_id", "ad.ad_id"} <= fields


def moved(request: RequestTensors, path: str) -> RequestTensors:
    """The request with another value of a field wherever there is one."""
    side, name = path.split(".")
    part = side if side in ("history", "ad") else "user"
    layout, values = small.schema().layouts[part], request.parts()[part]
    ids, numbers = values.ids.clone(), values.numbers.clone()
    for slot in layout.ids:
        if slot.field.name == name:
            height = SIZES[slot.field.vocabulary]
            ids[..., slot.columns] = torch.where(ids[..., slot.columns] > 0, ids[..., slot.columns] % (height - 1) + 1, 2)
    for slot in layout.numbers:
        if slot.field.name == name:
            numbers[..., slot.columns] += 1.0
    return request._replace(**{part: Part(ids, numbers)})


@pytest.mark.parametrize(("family", "settings"), cases_of(ATTENTIVE))
def test_attention_is_to_behaviours_alone_and_of_each_candidate_by_itself(family: str, settings: dict[str, Any]) -> None:
    network, request = small.network(family, **settings), request_of()
    with torch.no_grad():
        weights = network.explained(request).attention
        assert weights.shape == (3, 5, 4)
        assert not weights[-1, :, 2:].any()  # padding
        assert (weights[:, :, :2].std(1) > 1e-4).all()  # candidates differ
        order = torch.tensor([3, 1, 4, 0, 2])
        permuted = request._replace(ad=Part(request.ad.ids[:, order], request.ad.numbers[:, order]))
        assert torch.allclose(network.explained(permuted).attention, weights[:, order], atol=1e-5)
        ids, numbers = (torch.nn.functional.pad(values, (0, 0, 0, 3)) for values in (request.history.ids, request.history.numbers))
        padded = network.explained(request._replace(history=Part(ids, numbers))).attention
        assert torch.allclose(padded[..., :4], weights, atol=1e-5)
        assert not padded[..., 4:].any()
        total = weights.sum(-1)
        if family == "dien" or settings.get("softmax"):
            assert torch.allclose(total, torch.ones(3, 5))
        elif family == "bst":
            assert (total < 1).all()
            assert (total > 0).all()


@pytest.mark.parametrize("softmax", [False, True])
def test_the_weights_of_din_are_those_of_its_equations(softmax: bool) -> None:
    network, request = small.network("din", softmax=softmax), request_of()
    weights = {name: value.numpy().astype(np.float64) for name, value in network.attention.state_dict().items()}

    def dice(x: np.ndarray[Any, Any], layer: int) -> np.ndarray[Any, Any]:
        mean, variance, alpha = (weights[f"rest.{layer}.{name}"] for name in ("norm.running_mean", "norm.running_var", "alpha"))
        p = 1 / (1 + np.exp(-(x - mean) / np.sqrt(variance + 1e-8)))
        return x * (p + (1 - p) * alpha)

    with torch.no_grad():
        told = network.explained(request).attention.numpy()
        shared = [["ad_id", "genre", "tags", "price"].index(name) for name in network.fields.names("history")]
        ads = network.embed("ad", request.ad)[:, :, shared].flatten(2).numpy().astype(np.float64)
        past = network.embed("history", request.history).flatten(2).numpy().astype(np.float64)
    for r, behaviours in ((0, 4), (1, 4), (2, 2)):
        for c in range(5):
            q, k = np.broadcast_arrays(ads[r, c], past[r, :behaviours])
            first = dice(np.concatenate([q, k, q - k, q * k], 1) @ weights["first.weight"].T + weights["first.bias"], 0)
            by_hand = (first @ weights["rest.1.weight"].T + weights["rest.1.bias"])[:, 0]
            if softmax:
                by_hand = np.exp(by_hand) / np.exp(by_hand).sum()
            assert told[r, c, :behaviours] == pytest.approx(by_hand, rel=1e-4, abs=1e-5)


def test_networks_without_attention_or_sums_have_nothing_to_say() -> None:
    for family in set(NETWORKS) - {*ADDITIVE, *ATTENTIVE}:
        assert explain_graph(small.network(family), small.schema(), [some_feeds(2, 3, 4)]) == ({}, [])


def run(graph: bytes, feeds: Feeds) -> list[np.ndarray[Any, Any]]:
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    found: list[np.ndarray[Any, Any]] = session.run(None, {entry.name: feeds[entry.name] for entry in session.get_inputs()})
    return found


@pytest.mark.parametrize("family", sorted({*ADDITIVE, *ATTENTIVE} - {"dien"}))
def test_the_graph_gives_what_torch_gives_and_adds_up_to_the_logit_of_p_click(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.explain.request_graph", small.traced_request)
    settings = {"crosses": "user_id*ad_id,history.genre*genre", "cross_rows": 50} if family == "wide_deep" else {}
    network = small.network(family, **settings)
    files, outputs = explain_graph(network, small.schema(), [some_feeds(*shape) for shape in FEW])
    assert outputs == ([CONTRIBUTIONS] if family in ADDITIVE else [ATTENTION])
    for shape in ((1, 1, 1), (1, 4, 5), (2, 1, 33), (4, 9, 2)):
        feeds = some_feeds(*shape)
        [ours], [theirs] = run(files[EXPLAIN_MODEL], feeds), explained(network, feeds)
        assert ours.shape == theirs.shape
        assert ours.shape[:2] == (shape[0], shape[2])
        assert np.abs(ours - theirs).max() <= 1e-5 * max(1, np.abs(theirs).max())
    if family in ADDITIVE:
        session = onnxruntime.InferenceSession(files[EXPLAIN_MODEL], providers=["CPUExecutionProvider"])
        names = json.loads(session.get_modelmeta().custom_metadata_map[CONTRIBUTIONS])
        assert (len(names), names[-1]) == (ours.shape[2], REST)
        served = Served(network, CALIBRATION, small.schema()).eval()
        p_click = run(small.traced(served), feeds)[0].astype(np.float64)
        logits = (np.log(p_click / (1 - p_click)) - served.shift) / served.scale
        assert ours.sum(-1) == pytest.approx(logits, abs=2e-3)  # p_click has seven digits


def test_what_explains_stays_and_the_rest_is_fused() -> None:
    """A recurrence can be exported as a scan alone; `test_networks` exports one, and `test_cli` trains a bundle that explains."""
    assert isinstance(fused(small.network("dien"), explaining=True).extract, ScannedGRU)
    network, request = small.network("deepfm"), request_of()
    kept = fused(network, explaining=True)
    assert isinstance(kept, DeepFM)
    assert isinstance(kept.tower, FusedTower)
    with torch.no_grad():
        assert kept.explained(request).names == network.explained(request).names
        assert torch.allclose(kept.explained(request).addends, network.explained(request).addends, atol=1e-5)
