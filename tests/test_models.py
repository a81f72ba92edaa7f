"""Which of a bundle's graphs is scored with, and how a bundle that cannot be used is told."""

import logging
from dataclasses import replace
from pathlib import Path

import bundles
import onnxruntime as ort
import pytest
from onnx import ModelProto

from features.bundle import CUDA_MODEL, GOLDENS, INT8_MODEL, MODEL, BundleError, goldens_json, load_bundle
from service.errors import ScoringError
from service.models.loaded import graph_of
from service.ranking.scorer import too_new
from service.settings import Settings
from training.export.graph import Graph

ROUGH = 0.25


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A model with a graph of its own for each purpose: the one that stands for int8 has another bias, which its goldens know."""
    rough = bundles.goldens(ROUGH)
    goldens = [replace(golden, p_click_int8=other.p_click) for golden, other in zip(bundles.goldens(), rough, strict=True)]
    files = {INT8_MODEL: bundles.model(ROUGH), CUDA_MODEL: bundles.model(), GOLDENS: goldens_json(goldens)}
    bundles.publish(tmp_path / "models", "both", files=files)
    bundles.publish(tmp_path / "models", "plain")
    return tmp_path / "models"


def test_int8_is_scored_with_where_it_is_asked_for_and_there(models: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        loaded = bundles.loaded(Settings(models=models, precision="int8"))
    assert {name: model.precision for name, model in loaded.loaded.items()} == {"both": "int8", "plain": "float32"}
    assert "model plain version" in caplog.text
    assert "has no int8 graph (it was not asked for; train with --set int8=true)" in caplog.text
    feeds = bundles.goldens()[0].feeds(bundles.encoder())
    assert loaded.loaded["both"].scorer.score(feeds)[0].tolist() == pytest.approx(bundles.goldens(ROUGH)[0].p_click, abs=1e-6)


def test_float32_is_the_default(models: Path) -> None:
    loaded = bundles.loaded(Settings(models=models))
    assert {model.precision for model in loaded.loaded.values()} == {"float32"}
    feeds = bundles.goldens()[0].feeds(bundles.encoder())
    assert loaded.loaded["both"].scorer.score(feeds)[0].tolist() == pytest.approx(bundles.goldens()[0].p_click, abs=1e-6)


def test_a_device_has_a_graph_of_its_own(models: Path) -> None:
    both, plain = (load_bundle(next((models / name).glob("2*"))) for name in ("both", "plain"))
    cuda, int8 = Settings(models=models, device="cuda"), Settings(models=models, device="cuda", precision="int8")
    assert [graph_of(both, cuda), graph_of(plain, cuda), graph_of(both, int8)] == [CUDA_MODEL, MODEL, CUDA_MODEL]


def test_an_int8_graph_that_scores_otherwise_here_is_refused(models: Path) -> None:
    bundles.publish(models, "both", files={INT8_MODEL: bundles.model(ROUGH), GOLDENS: goldens_json(bundles.goldens())})
    with pytest.raises(BundleError, match="golden 0 has 0 probabilities for 3 candidates"):
        bundles.loaded(Settings(models=models, precision="int8"))
    goldens = [replace(golden, p_click_int8=golden.p_click) for golden in bundles.goldens()]
    bundles.publish(models, "both", files={INT8_MODEL: bundles.model(ROUGH), GOLDENS: goldens_json(goldens)})
    with pytest.raises(BundleError, match=r"golden 0 is off by 0\.0"):
        bundles.loaded(Settings(models=models, precision="int8"))


def rewritten(ir: int, opset: int) -> bytes:
    graph = ModelProto.FromString(bundles.model())
    graph.ir_version, graph.opset_import[0].version = ir, opset
    return graph.SerializeToString()


@pytest.mark.parametrize(("ir", "opset"), [(99, 18), (10, 99)])
def test_a_graph_that_is_too_new_for_this_onnxruntime_says_which_one_it_needs(tmp_path: Path, ir: int, opset: int) -> None:
    path = bundles.publish(tmp_path, files={MODEL: rewritten(ir, opset)})
    needs = rf"its graph is ONNX IR {ir}, opset {opset}, which needs an onnxruntime later than [0-9.]+, and this is {ort.__version__}; "
    with pytest.raises(ScoringError, match=needs):
        bundles.loaded(Settings(models=tmp_path))
    with pytest.raises(BundleError, match=needs):
        Graph(load_bundle(path))


def test_which_onnxruntime_a_graph_needs_is_said_for_each(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ort, "__version__", "1.22.1")
    assert too_new(bundles.publish(tmp_path, files={MODEL: rewritten(10, 20)}) / MODEL) is None
    assert "needs onnxruntime >= 1.23, and this is 1.22.1" in str(
        too_new(bundles.publish(tmp_path, files={MODEL: rewritten(11, 20)}) / MODEL)
    )
    assert "needs onnxruntime >= 1.24, and this is 1.22.1" in str(
        too_new(bundles.publish(tmp_path, files={MODEL: rewritten(10, 25)}) / MODEL)
    )
    assert too_new(bundles.publish(tmp_path, files={MODEL: b"nonsense"}) / MODEL) is None
