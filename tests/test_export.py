import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import small
import torch
from torch import Tensor, nn

from features.bundle import AD_ROWS, MODEL, BundleError, load_bundle
from features.encode import Feeds
from features.graph_file import graph_facts
from service.ranking.scorer import Scorer
from tests.test_networks import ONLY_AD_NUMBER
from training.calibrate import Calibration
from training.datasets.prepared import Prepared, open_prepared
from training.export import export
from training.export.ad_side import ad_side
from training.export.export import FEW, ServedNetwork, ad_sides, evaluate_bundle, random_feeds, score, to_onnx, verify
from training.export.onnx import IR, OPSET
from training.networks.contract import CLICK, Part, RequestTensors
from training.retrain.drift import REFERENCE, make_reference, read_reference
from training.train import Trained

CALIBRATION = Calibration(0.7, -0.4, float(np.log(0.2)))
SIZES = {name: v.size for name, v in small.vocabularies().categories.items()}


def served(family: str, text: str = small.SCHEMA) -> ServedNetwork:
    settings: dict[str, Any] = {"attention": (6, 5, 4)} if family == "din" else {}
    return ServedNetwork(small.network(family, text, **settings), CALIBRATION, small.schema(text)).eval()


def session(graph: bytes) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def graphs() -> dict[str, bytes]:
    return {family: to_onnx(served(family)) for family in ("deepfm", "din")}


def test_a_graph_is_what_the_oldest_onnxruntime_takes(graphs: dict[str, bytes]) -> None:
    """Whatever torch and onnx would choose by themselves: pyproject.toml allows onnxruntime from 1.20 on."""
    for graph in graphs.values():
        facts = graph_facts(graph)
        assert (facts.ir, facts.opset, facts.needs, facts.external) == (IR, OPSET, "onnxruntime >= 1.20", set())
        model = onnx.ModelProto.FromString(graph)
        assert (model.ir_version, {each.domain: each.version for each in model.opset_import}[""]) == (facts.ir, facts.opset)
    assert '"onnxruntime>=1.20"' in Path("pyproject.toml").read_text()


@pytest.mark.parametrize("family", ["deepfm", "din"])
def test_onnx_runtime_agrees_with_torch(graphs: dict[str, bytes], family: str) -> None:
    assert 0 < verify(graphs[family], served(family), SIZES) < 5e-6


def test_a_graph_in_two_is_the_whole(graphs: dict[str, bytes]) -> None:
    """Of fields of every kind. What DIN makes of an ad alone is a look-up, so that it stays whole."""
    cases = [random_feeds(small.schema(), SIZES, *shape) for shape in FEW]
    halves = ad_sides({MODEL: graphs["deepfm"]}, cases)
    inputs = {entry.name for entry in session(halves["model.rest.onnx"]).get_inputs()}
    assert inputs >= {"user_ids", "history_ids", AD_ROWS, "side_0"}
    assert not inputs & {"ad_ids", "ad_numbers"}
    assert not ad_sides({MODEL: graphs["din"]}, cases)


def test_what_is_kept_of_ads_has_nothing_of_their_counters(graphs: dict[str, bytes]) -> None:
    cases = [random_feeds(small.schema(), SIZES, *shape) for shape in FEW]
    columns = [slot.start for slot in small.schema().layouts["ad"].numbers]
    ads, rest = (session(graph) for graph in ad_sides({MODEL: graphs["deepfm"]}, cases, columns).values())
    assert "ad_numbers" in {entry.name for entry in rest.get_inputs()}
    feeds = {entry.name: cases[-1][entry.name] for entry in ads.get_inputs()}
    other = {**feeds, "ad_numbers": feeds["ad_numbers"] + 1}
    assert all(np.array_equal(*pair) for pair in zip(ads.run(None, feeds), ads.run(None, other), strict=True))


@pytest.mark.parametrize("operator", ["Exp", "Tanh"])
def test_a_graph_that_makes_something_else_of_counters_stays_whole(graphs: dict[str, bytes], operator: str) -> None:
    model = onnx.ModelProto.FromString(graphs["deepfm"])
    for node in model.graph.node:
        node.input[:] = ["bent" if name == "ad_numbers" and node.op_type != "Shape" else name for name in node.input]
    model.graph.node.insert(0, onnx.helper.make_node(operator, ["ad_numbers"], ["bent"]))
    assert ad_side(model.SerializeToString()) is not None
    assert ad_side(model.SerializeToString(), [0]) is None


def test_onnx_runtime_agrees_where_parts_have_no_columns() -> None:
    """A history beside a user without columns is in `test_networks`: torch takes 15 s to export a DIN."""
    ours = served("deepfm", ONLY_AD_NUMBER)
    graph = to_onnx(ours)
    assert verify(graph, ours, SIZES) < 5e-6
    assert [entry.name for entry in session(graph).get_inputs()] == list(small.schema(ONLY_AD_NUMBER).tensors)


@pytest.mark.parametrize("family", ["deepfm", "din"])
@pytest.mark.parametrize("what", ["table.weight", "tower.first.weight", "running_mean"])
def test_a_weight_that_was_changed_is_found(graphs: dict[str, bytes], family: str, what: str) -> None:
    ours = served(family)
    with torch.no_grad():
        values = next(value for name, value in ours.state_dict().items() if name.endswith(what))
        values[1:] += 0.1
    with pytest.raises(
        BundleError, match=r"^ONNX Runtime and torch differ by .* for R=1, C=1, T=., 1e-05 is allowed; nothing was published"
    ):
        verify(graphs[family], ours, SIZES)


@pytest.mark.parametrize("family", ["deepfm", "din"])
def test_a_calibration_that_was_changed_is_found(graphs: dict[str, bytes], family: str) -> None:
    ours = served(family)
    ours.shift += 1e-3
    with pytest.raises(BundleError, match="differ by"):
        verify(graphs[family], ours, SIZES)


class Unmasked(nn.Module):
    """Takes padding for behaviours."""

    def forward(self, request: RequestTensors) -> dict[str, Tensor]:
        return {CLICK: request.history.ids.float().mean((1, 2))[:, None] + request.ad.ids.float().sum(2) * 0.1}


class Ordered(nn.Module):
    """Scores a candidate by those before it."""

    def forward(self, request: RequestTensors) -> dict[str, Tensor]:
        return {CLICK: request.ad.ids.float().sum(2).cumsum(1) * 0.01 + request.history.ids.sum((1, 2))[:, None] * 0}


@pytest.mark.parametrize(("network", "case"), [(Unmasked(), "padding added"), (Ordered(), "candidates permuted")])
def test_a_network_that_minds_padding_or_order_is_found(network: nn.Module, case: str) -> None:
    text = (
        small.SCHEMA.replace(small.USER, "").replace('kind = "number"', 'kind = "category"').replace('transform = "log"\nmissing = -1', "")
    )
    ours = ServedNetwork(network, Calibration(), small.schema(text)).eval()
    with pytest.raises(BundleError, match=f"for {case}"):
        verify(small.traced(ours), ours, {})


@pytest.mark.parametrize("family", ["deepfm", "din"])
def test_requests_behaviours_and_candidates_may_be_any_number(graphs: dict[str, bytes], family: str) -> None:
    model, ours, schema = session(graphs[family]), served(family), small.schema()
    assert {entry.name: entry.type for entry in model.get_inputs()} == {
        name: "tensor(int64)" if name.endswith("ids") else "tensor(float)" for name in schema.tensors
    }
    shapes = {entry.name: entry.shape for entry in model.get_inputs()}
    widths = {name: width for name, (_, width) in schema.tensors.items()}
    assert {name: shape[-1] for name, shape in shapes.items()} == widths
    assert all(isinstance(dimension, str) for shape in shapes.values() for dimension in shape[:-1])
    for requests, behaviours, candidates in (
        (1, 1, 1),
        (11, 3, 2),
        (2, 90, 5),
        (1, 4, 1000),
        (1, 300, 5),
        (1, 257, 2),
        (70, 3, 9),
    ):  # over tiles
        feeds = random_feeds(schema, SIZES, requests, behaviours, candidates, seed=9)
        [p_click] = model.run(["p_click"], feeds)
        assert p_click.shape == (requests, candidates)
        assert p_click.dtype == np.float32
        assert np.abs(p_click - score(ours, feeds)).max() < 1e-5


@pytest.mark.parametrize("family", ["deepfm", "din"])
def test_the_calibration_is_in_the_graph(graphs: dict[str, bytes], family: str) -> None:
    feeds = random_feeds(small.schema(), SIZES, 3, 4, 5, seed=2)
    with torch.no_grad():
        parts = [Part(*(torch.from_numpy(feeds[f"{name}_{kind}"]) for kind in ("ids", "numbers"))) for name in ("user", "history", "ad")]
        logits = small.click(served(family).network, *parts).numpy()
    expected = 1 / (1 + np.exp(-(0.7 * logits - 0.4 + np.log(0.2))))
    assert np.abs(session(graphs[family]).run(None, feeds)[0] - expected).max() < 1e-5
    onnx.checker.check_model(onnx.load_from_string(graphs[family]))


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """A log that kept a fifth of its non-clicks."""
    folder = tmp_path_factory.mktemp("sampled")
    small.data_set(folder)
    (folder / "data.toml").write_text("negative_sampling = 0.2\n")
    return open_prepared(folder)


@pytest.fixture(scope="module")
def published(sampled: Prepared, traced_export: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trained, Path]:
    trained = small.quick(sampled, "din")
    return trained, export.export(sampled, trained, tmp_path_factory.mktemp("models"), "m", small.quiet())


def test_a_bundle_reproduces_its_goldens_in_onnx_runtime(published: tuple[Trained, Path]) -> None:
    trained, path = published
    bundle = load_bundle(path)
    scorer = Scorer(path / "model.onnx", "cpu", 1)
    bundle.check_goldens(scorer.score)
    assert len(bundle.goldens) == export.GOLDEN_ROWS
    assert [len(golden.history) > 0 for golden in bundle.goldens].count(True) >= 3
    assert bundle.goldens[0].history == []
    assert len({round(p, 7) for golden in bundle.goldens for p in golden.p_click}) > 20
    assert 0 < bundle.manifest["onnx_difference"] < 1e-5
    assert bundle.manifest["network"] == trained.family
    assert bundle.manifest["settings"]["embedding"] == 4
    assert json.loads((path / "metrics.json").read_text())["test"] == trained.metrics["test"].as_dict()

    def swapped(feeds: Feeds) -> Any:
        return scorer.score({**feeds, "user_ids": np.roll(feeds["user_ids"], 1, axis=1)})

    with pytest.raises(BundleError, match="golden"):
        bundle.check_goldens(swapped)


def test_a_bundle_is_measured_as_its_training_measured_itself(published: tuple[Trained, Path], sampled: Prepared) -> None:
    trained, path = published
    for split in ("valid", "test"):
        ours = evaluate_bundle(load_bundle(path), sampled, split, small.quiet())
        theirs = trained.metrics[split]
        assert ours.as_dict() == pytest.approx(theirs.as_dict(), abs=1e-5)
    assert trained.calibration.sampling == pytest.approx(np.log(0.2))


def test_a_graph_that_disagrees_is_not_published(
    published: tuple[Trained, Path], sampled: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, path = published
    other = replace(trained, calibrations={CLICK: replace(trained.calibration, shift=trained.calibration.shift + 0.01)})
    monkeypatch.setattr(export, "to_onnx", lambda *_, **__: (path / "model.onnx").read_bytes())
    with pytest.raises(BundleError, match=r"differ by .* nothing was published"):
        export.export(sampled, other, tmp_path / "models", "m", small.quiet())
    assert not (tmp_path / "models").exists()


def test_a_bundle_has_the_reference_of_its_training_data(published: tuple[Trained, Path], sampled: Prepared) -> None:
    trained, path = published
    assert (path / REFERENCE).read_bytes() == make_reference(sampled, trained.encoder.vocabularies)
    assert read_reference(load_bundle(path))
