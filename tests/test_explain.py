"""Why an ad is where it is: what networks say of their logits, the graph of that in a bundle, and what `/rank` tells of it."""

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import bundles
import numpy as np
import onnxruntime
import pytest
import small
import torch
from conftest import Client, running
from onnx import TensorProto, helper

from features import bundle
from features.bundle import ATTENTION, CONTRIBUTIONS, EXPLAIN_MODEL, REST, current_path
from features.encode import Feeds
from features.state import Ad, MemoryStore
from service.api.wire import RankAnswer
from service.ranking import explanations
from service.ranking.scorer import ExplainGraph
from service.settings import Settings
from tests.test_networks import CASES, ONLY_AD_NUMBER, SCHEMAS, fits
from training.calibrate import Calibration
from training.datasets.states import ads
from training.export.explain import explain_graph, explained
from training.export.export import FEW, ServedNetwork, export, random_feeds
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
        parts, logits = network.explained(request), network(request)[CLICK]
        assert len(set(parts.names)) == len(parts.names) == parts.addends.shape[-1]
        rest = logits - parts.addends.sum(-1)
        if family in SUMS:
            assert torch.allclose(rest, network.bias.expand(3, 5), atol=1e-4)
        else:  # the MLP has a say
            assert rest.std() > 1e-3
            network.tower.last.weight.zero_()
            biases = network(request)[CLICK] - parts.addends.sum(-1)
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
        parts = network.explained(request).attention.numpy()
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
            assert parts[r, c, :behaviours] == pytest.approx(by_hand, rel=1e-4, abs=1e-5)


def test_networks_without_attention_or_sums_have_nothing_to_say() -> None:
    for family in set(NETWORKS) - {*ADDITIVE, *ATTENTIVE}:
        assert explain_graph(small.network(family), small.schema(), [some_feeds(2, 3, 4)]) == ({}, [])


def run(graph: bytes, feeds: Feeds) -> list[np.ndarray[Any, Any]]:
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    found: list[np.ndarray[Any, Any]] = session.run(None, {entry.name: feeds[entry.name] for entry in session.get_inputs()})
    return found


@pytest.mark.parametrize("family", ["ffm", "fwfm", "wide_deep", "din", "bst"])  # a sum of each kind, and attention; DeepFM is below
def test_the_graph_gives_what_torch_gives_and_adds_up_to_the_logit_of_p_click(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.export.explain.request_graph", small.traced_request)
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
        served = ServedNetwork(network, CALIBRATION, small.schema()).eval()
        p_click = run(small.traced(served), feeds)[0].astype(np.float64)
        logits = (np.log(p_click / (1 - p_click)) - served.shift) / served.scale
        assert ours.sum(-1) == pytest.approx(logits, abs=2e-3)  # p_click has seven digits


def test_a_field_alone_has_no_pairs_and_is_exported_all_the_same() -> None:
    """By torch's own exporter, which does not take all that the tracer takes."""
    network, schema = small.network("fm", ONLY_AD_NUMBER), small.schema(ONLY_AD_NUMBER)
    feeds = random_feeds(schema, {}, 2, 1, 3)
    files, _ = explain_graph(network, schema, [feeds, random_feeds(schema, {}, 1, 1, 1)])
    price = (feeds["ad_numbers"] * network.first.scales["ad"].item())[..., 0]
    assert run(files[EXPLAIN_MODEL], feeds)[0] == pytest.approx(np.stack([price, np.full_like(price, network.bias.item())], -1), abs=1e-5)


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


# --- what `/rank` tells


def explaining(adds: float = 0.0, named: bool = True) -> bytes:
    """A graph beside that of `bundles`: contributions of a candidate's ids, the sum of them the rest, and its id times each behaviour's."""
    nodes = [
        helper.make_node("Cast", ["ad_ids"], ["ads"], to=TensorProto.FLOAT),
        helper.make_node("Slice", ["ads", "zero", "few", "last"], ["some"]),
        helper.make_node("ReduceSum", ["ads", "last"], ["all"], keepdims=1),
        helper.make_node("Add", ["all", "adds"], ["sum"]),
        helper.make_node("Concat", ["some", "sum"], [CONTRIBUTIONS], axis=-1),
        helper.make_node("Cast", ["history_ids"], ["past"], to=TensorProto.FLOAT),
        helper.make_node("Slice", ["past", "zero", "one", "last"], ["behaviour"]),
        helper.make_node("Transpose", ["behaviour"], ["row"], perm=[0, 2, 1]),
        helper.make_node("Slice", ["ads", "zero", "one", "last"], ["ad"]),
        helper.make_node("MatMul", ["ad", "row"], [ATTENTION]),
    ]
    constants = [
        helper.make_tensor(name, TensorProto.INT64, [1], [value]) for name, value in (("zero", 0), ("one", 1), ("few", 2), ("last", -1))
    ]
    constants.append(helper.make_tensor("adds", TensorProto.FLOAT, [1], [adds]))
    inputs = [
        helper.make_tensor_value_info(f"{part}_ids", TensorProto.INT64, ["R", axis, None]) for part, axis in (("history", "T"), ("ad", "C"))
    ]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["R", "C", None]) for name in (CONTRIBUTIONS, ATTENTION)]
    model = helper.make_model(
        helper.make_graph(nodes, "explain", inputs, outputs, constants),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=10,
    )
    helper.set_model_props(model, {CONTRIBUTIONS: json.dumps(["ad.ad_id", "ad.genre", REST])} if named else {})
    return bytes(model.SerializeToString())


@contextlib.asynccontextmanager
async def serving(models: Path) -> AsyncIterator[Client]:
    store = MemoryStore()
    await store.put_ads(Ad(ad_id, features) for ad_id, features in bundles.ADS.items())
    async with running(Settings(models=models, redis="memory://"), store) as client:
        yield client


USER = {"id": "u1", "history": [{"ad_id": ad_id} for ad_id in ("a9", "a2", "a7")]}
EXPLAIN = {"explain": True}


def threads() -> int:
    return sum(thread.name.startswith("explain") for thread in threading.enumerate())


@pytest.mark.anyio
async def test_an_answer_says_why(tmp_path: Path) -> None:
    bundles.publish(tmp_path, files={EXPLAIN_MODEL: explaining(adds=0.5)})
    ids = bundles.encoder().vocabularies.categories["ad_id"].encode
    async with serving(tmp_path) as client:
        plain = await client.rank(USER, ["a1", "new", "a5", "a3"], options={"top_k": 3})
        assert threads() == 0
        answer = await client.post(
            "/rank", json={"user": USER, "candidates": ["a1", "new", "a5", "a3"], "options": {**EXPLAIN, "top_k": 3}}
        )
        RankAnswer.model_validate_json(answer.content)
        parts = answer.json()
        assert [ad["ad_id"] for ad in parts["ads"]] == [ad["ad_id"] for ad in plain["ads"]]
        assert set(parts["explain"]) == {"user", "context", "history"}
        for ad in parts["ads"]:
            [ad_id], behaviours = ids([ad["ad_id"]]), ids(["a9", "a2", "a7"])
            assert ad["attention"] == [float(np.float32(ad_id) * np.float32(each)) for each in behaviours]
            seen = ad["explain"]
            assert list(ad["contributions"]) == ["ad.ad_id", "ad.genre", "rest"]
            assert ad["contributions"]["ad.ad_id"] == float(ad_id)
            assert ad["contributions"]["ad.genre"] == float(seen["genre"])
            assert ad["contributions"]["rest"] == float(ad_id + seen["genre"] + sum(seen["tags"])) + 0.5
        assert list(parts["timings_ms"]) == ["parse", "features", "queue", "inference", "explain", "total"]
        nothing = await client.rank({"id": "nobody"}, ["a1"], options=EXPLAIN)
        assert nothing["ads"][0]["attention"] == []
        assert "attention" not in (await client.rank(USER))["ads"][0]
        assert await client.metric('adrank_stage_duration_seconds_count{stage="explain"}') == 2


@pytest.mark.anyio
async def test_the_graph_is_loaded_when_it_is_asked_for_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Path] = []

    class Counted(ExplainGraph):
        def __init__(self, graph: Path) -> None:
            loaded.append(graph)
            super().__init__(graph)

    monkeypatch.setattr(explanations, "ExplainGraph", Counted)
    path = bundles.publish(tmp_path, files={EXPLAIN_MODEL: explaining()})
    async with serving(tmp_path) as client:
        await client.rank()
        assert loaded == []
        answers = await asyncio.gather(*(client.rank(USER, options=EXPLAIN) for _ in range(5)))
        assert all("attention" in answer["ads"][0] for answer in answers)
        assert loaded == [path / EXPLAIN_MODEL]


@pytest.mark.anyio
async def test_where_there_is_nothing_to_explain_a_notice_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bundles.publish(tmp_path)
    bundles.publish(tmp_path, "damaged", files={EXPLAIN_MODEL: explaining()})
    bundles.publish(tmp_path, "nameless", files={EXPLAIN_MODEL: explaining(named=False)})
    bundles.publish(tmp_path, "no-graph", files={EXPLAIN_MODEL: b"no graph"})
    published = bundle.publish(tmp_path, "dcn", dict(files_of(tmp_path)), {"network": "dcn", "explains": []})
    assert published.parent.name == "dcn"
    async with serving(tmp_path) as client:
        (current_path(tmp_path, "damaged") / EXPLAIN_MODEL).write_bytes(explaining(adds=1.0))
        for name, expected in (
            ("din", "was published without explain.onnx; train it again to have ads explained"),
            ("dcn", "is a dcn, which has no attention over behaviours and no logit that fields add up to: nothing to explain"),
            ("damaged", "cannot be used; the service's log says why"),
            ("nameless", "cannot be used; the service's log says why"),
            ("no-graph", "cannot be used; the service's log says why"),
        ):
            for _ in range(2):
                answer = await client.rank(USER, options={**EXPLAIN, "model": name})
                assert expected in answer["explain"]["notice"]
                assert answer["explain"]["history"]["genre"]
                assert set(answer["ads"][0]) == {"ad_id", "rank", "p_click", "explain"}
    assert caplog.text.count("explains nothing") == 3
    assert "its digest differs" in caplog.text


def files_of(models: Path) -> Iterator[tuple[str, bytes]]:
    for path in current_path(models, "din").iterdir():
        if path.name != bundle.MANIFEST:
            yield path.name, path.read_bytes()


@pytest.mark.anyio
async def test_what_is_told_has_a_limit_and_so_has_the_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundles.publish(tmp_path, files={EXPLAIN_MODEL: explaining()})
    monkeypatch.setattr(explanations, "MOST_NUMBERS", 20)  # 3 contributions and 3 behaviours an ad
    async with serving(tmp_path) as client:
        answer = await client.rank(USER, [f"a{i}" for i in range(6)], options=EXPLAIN)
        assert ["attention" in ad for ad in answer["ads"]] == [True] * 3 + [False] * 3
        assert answer["explain"]["notice"].startswith("the first 3 of 6 ads are explained, as each takes 6 numbers and 20 are given")
        assert "notice" not in (await client.rank(USER, [f"a{i}" for i in range(6)], options={**EXPLAIN, "top_k": 3}))["explain"]

        release = threading.Event()
        monkeypatch.setattr(ExplainGraph, "run", lambda *_: release.wait(30) and {})
        monkeypatch.setattr(explanations, "SECONDS", 0.05)
        late = await client.rank(USER, options=EXPLAIN)
        assert "could not be explained in time" in late["explain"]["notice"]
        assert len(late["ads"]) == 2
        monkeypatch.setattr(explanations, "SECONDS", 60)
        monkeypatch.setattr(explanations, "WAITING", 0)
        assert "could not be explained in time" in (await client.rank(USER, options=EXPLAIN))["explain"]["notice"]
        release.set()


@pytest.mark.anyio
async def test_a_trained_bundle_s_contributions_add_up_to_what_it_ranks_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the formula of docs/models.md: p(click) = σ(scale · logit + shift + sampling)."""
    for name, stand_in in (
        ("export.export.to_onnx", small.traced),
        ("export.explain.request_graph", small.traced_request),
        ("export.export.SIZES", (1, 7)),
    ):
        monkeypatch.setattr(f"training.{name}", stand_in)
    (tmp_path / "data").mkdir()
    data = small.data_set(tmp_path / "data")
    path = export(data, small.quick(data, "deepfm", epochs=1), tmp_path / "models", "shop", small.quiet())
    manifest, store = bundle.read_manifest(path), MemoryStore()
    await store.put_ads(ads(data))
    async with running(Settings(models=tmp_path / "models", redis="memory://"), store) as client:
        user = {"id": "u2", "features": {"age": "25", "income": 7}, "history": [{"ad_id": "a3"}, {"ad_id": "a1"}]}
        parts = await client.rank(user, ["a0", "a1", "a2", "new"], context={"slot": "feed"}, options=EXPLAIN)
    calibration = manifest["calibration"]
    assert (manifest["explains"], len(parts["ads"]), "notice" in parts["explain"]) == ([CONTRIBUTIONS], 4, False)
    for ad in parts["ads"]:
        logit = calibration["scale"] * sum(ad["contributions"].values()) + calibration["shift"] + calibration["sampling"]
        assert 1 / (1 + np.exp(-logit)) == pytest.approx(ad["p_click"], abs=1e-6)
        assert {"user.age", "history.genre*ad.genre", "user.age*ad.genre", "context.slot*ad.ad_id", REST} <= ad["contributions"].keys()
