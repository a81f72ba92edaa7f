import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import small

from features.bundle import INT8_MODEL, BundleError, load_bundle
from features.encode import Feeds
from service.ranking.scorer import Scorer
from tests.test_fuse import SINGLE, trained
from training.calibrate import Calibration
from training.datasets.prepared import Prepared
from training.evaluate import Measures, measure
from training.export import export
from training.export.export import ServedNetwork, evaluate_bundle, random_feeds, to_onnx
from training.export.int8 import moved, quantised, refusal
from training.retrain.publish import train_and_publish
from training.train import Trained
from training.train_settings import TrainError


def metrics(p: float = 0.1) -> Measures:
    labels = np.array([0, 1] * 50)
    return measure(labels, np.where(labels, 0.6 + p, 0.5 - p), np.zeros(100))


@pytest.fixture(scope="module")
def graphs() -> tuple[bytes, bytes]:
    """A graph, and it in int8."""
    graph = to_onnx(ServedNetwork(trained("deepfm", SINGLE), Calibration(0.5), small.schema(SINGLE)).eval())
    return graph, quantised(graph, requests(16))


def requests(count: int) -> list[Feeds]:
    return [random_feeds(small.schema(SINGLE), {}, 1, 1, 64, seed) for seed in range(count)]


def run(graph: bytes, feeds: Feeds) -> np.ndarray:
    return onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"]).run(None, feeds)[0]


def test_products_take_bytes_and_scores_stay_near(graphs: tuple[bytes, bytes]) -> None:
    exact, coarse = graphs
    weights = {i.name for i in onnx.load_from_string(coarse).graph.initializer if i.data_type == onnx.TensorProto.INT8 and i.dims}
    assert len([name for name in weights if "quantized" in name]) >= 3
    off = np.abs(run(exact, requests(1)[0]) - run(coarse, requests(1)[0]))
    assert 0 < off.max() < 0.02


def test_no_two_products_overflow_16_bits_so_that_scores_are_those_of_every_processor(graphs: tuple[bytes, bytes]) -> None:
    tensors = [tensor for tensor in onnx.load_from_string(graphs[1]).graph.initializer if tensor.data_type == onnx.TensorProto.INT8]
    weights = [onnx.numpy_helper.to_array(tensor).astype(np.int64) for tensor in tensors if tensor.dims]
    assert max(np.abs(each).max() for each in weights) <= (2**15 - 1) // (2 * (2**8 - 1))


def test_a_score_does_not_depend_on_the_other_candidates(graphs: tuple[bytes, bytes]) -> None:
    (feeds,) = requests(1)
    together = run(graphs[1], feeds)
    for row in (0, 17, 63):
        alone = {name: array[:, row : row + 1] if name.startswith("ad_") else array for name, array in feeds.items()}
        assert np.abs(run(graphs[1], alone) - together[:, row : row + 1]).max() < 1e-6


def test_the_gate_names_what_moves_too_far() -> None:
    good = metrics()
    assert refusal(moved(good, good)) is None
    assert refusal({"auc": 0.0004, "log_loss": -0.004, "calibration_ratio": 0.0049}) is None
    assert refusal({"auc": -0.0006, "log_loss": 0.0, "calibration_ratio": 0.0}) == "auc moves by -0.0006, 0.0005 is allowed"
    assert refusal({"auc": 0.0, "log_loss": 0.006, "calibration_ratio": -0.006}) == (
        "log_loss moves by +0.006, 0.005 is allowed; calibration_ratio moves by -0.006, 0.005 is allowed"
    )
    assert "auc moves by +nan" in str(refusal({"auc": float("nan"), "log_loss": 0.0, "calibration_ratio": 0.0}))
    assert moved(good, metrics(0.2))["log_loss"] < -0.1


@pytest.fixture(scope="module")
def published(traced_export: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Prepared, Trained, Path]:
    folder = tmp_path_factory.mktemp("int8")
    (folder / "data").mkdir()
    data = small.data_set(folder / "data", (300, 100, 400))
    model = small.quick(data, "deepfm", epochs=1, int8=True)
    with pytest.MonkeyPatch.context() as patched:  # what int8 moves of a network that has learned so little is up to the processor
        patched.setattr("training.export.int8.AUC", 0.05)
        patched.setattr("training.export.int8.SHARE", 0.05)
        return data, model, export.export(data, model, folder / "models", "m", small.quiet())


def test_a_graph_that_passes_is_published_beside_the_exact_one(published: tuple[Prepared, Trained, Path]) -> None:
    data, _, path = published
    bundle = load_bundle(path)
    assert bundle.manifest["int8"]["refused"] is None
    bundle.check_goldens(Scorer(path / INT8_MODEL, "cpu", 1).score, INT8_MODEL)
    measured = [evaluate_bundle(bundle, data, "test", small.quiet(), graph) for graph in ("model.onnx", INT8_MODEL)]
    assert moved(*measured) == pytest.approx(bundle.manifest["int8"]["moved"])


def test_int8_goldens_are_those_of_the_int8_graph(published: tuple[Prepared, Trained, Path]) -> None:
    bundle = load_bundle(published[2])
    scorer = Scorer(published[2] / INT8_MODEL, "cpu", 1)
    with pytest.raises(BundleError, match=r"golden 0 is off by 0\.\d+, 0\.005 is allowed"):
        bundle.check_goldens(lambda feeds: scorer.score(feeds) + np.float32(0.01), INT8_MODEL)


def test_a_graph_that_fails_its_gate_is_not_published(
    published: tuple[Prepared, Trained, Path], traced_export: None, monkeypatch, tmp_path: Path
) -> None:
    data, model, _ = published
    monkeypatch.setattr(
        export, "quantised", lambda *_: small.traced(ServedNetwork(model.network, Calibration(3.0, 3.0), data.schema).eval())
    )
    bundle = load_bundle(export.export(data, model, tmp_path, "m", small.quiet()))
    assert INT8_MODEL not in bundle.manifest["files"]
    assert "log_loss moves by" in bundle.manifest["int8"]["refused"]
    assert not any(golden.p_click_int8 for golden in bundle.goldens)
    assert json.loads((bundle.path / "manifest.json").read_text())["int8"]["moved"].keys() == {"auc", "log_loss", "calibration_ratio"}


def test_int8_is_not_made_unasked(published: tuple[Prepared, Trained, Path], traced_export: None, tmp_path: Path) -> None:
    data, model, _ = published
    plain = replace(model, settings={**model.settings, "int8": False})
    assert "int8" not in load_bundle(export.export(data, plain, tmp_path, "m", small.quiet())).manifest


def test_int8_for_din_is_refused_before_training(published: tuple[Prepared, Trained, Path], tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="int8 makes din no faster and less exact; leave it out"):
        train_and_publish(published[0], "din", tmp_path, "m", {"int8": "true"}, small.quiet())
    assert not list(tmp_path.iterdir())
