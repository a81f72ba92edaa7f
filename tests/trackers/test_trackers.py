"""`adrank train --log-to`, read back from TensorBoard's files and from MLflow's server on loopback. Run by `make trackers-test`."""

import json
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small
from conftest import free_port
from processes import PATIENCE, ROOT, ended

from tests.test_cli import QUICK, refused, run

MLFLOW = ROOT / "build" / "mlflow-server" / "bin" / "mlflow"
event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="make trackers-test")
pytest.importorskip("mlflow", reason="make trackers-test")
pytestmark = [pytest.mark.usefixtures("traced_export"), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.data_set(tmp_path_factory.mktemp("small"), rows=(130, 60, 60)).folder


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """MLflow's server."""
    port = free_port()
    command = [str(MLFLOW), "server", "--port", str(port), "--workers", "1"]
    places = ["--backend-store-uri", f"sqlite:///{tmp_path}/runs.db", "--artifacts-destination", str(tmp_path / "artifacts")]
    with (tmp_path / "mlflow.log").open("wb") as log, ended(subprocess.Popen([*command, *places], stdout=log, stderr=log)) as process:
        for _ in range(3 * PATIENCE):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None
                time.sleep(1)
        else:
            pytest.fail("MLflow's server does not answer")
        yield f"http://127.0.0.1:{port}"


def train(data: Path, models: Path, tracker: str) -> tuple[dict[str, Any], str]:
    words = ("--data", data, "--model", "deepfm", "--models", models, *QUICK, "--promote", "always", "--json")
    code, printed, complaint = run("train", *words, "--log-to", tracker)
    assert code == 0, complaint
    return json.loads(printed), complaint


def test_tensorboard_reads_the_losses_and_what_was_measured(data: Path, tmp_path: Path) -> None:
    told, complaint = train(data, tmp_path / "models", "tensorboard")
    folder = tmp_path / "models-runs" / "deepfm" / Path(told["bundle"]).name
    assert f"logged to {tmp_path / 'models-runs'}: " in complaint
    found = event_accumulator.EventAccumulator(str(folder)).Reload()
    assert [each.step for each in found.Scalars("train_loss")] == [1]
    assert found.Scalars("test/log_loss")[0].value == pytest.approx(told["metrics"]["test"]["log_loss"], rel=1e-6)


def test_mlflow_has_a_run_with_settings_and_metrics(data: Path, tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    told, complaint = train(data, tmp_path / "models", "mlflow")
    run_id = complaint.partition(f"logged to {server}, run ")[2].split()[0]
    with urllib.request.urlopen(f"{server}/api/2.0/mlflow/runs/get?run_id={run_id}", timeout=30) as answer:
        found = json.load(answer)["run"]
    params = {each["key"]: each["value"] for each in found["data"]["params"]}
    metrics = {each["key"]: each["value"] for each in found["data"]["metrics"]}
    assert (found["info"]["status"], params["embedding"]) == ("FINISHED", "4")
    assert metrics["test/log_loss"] == pytest.approx(told["metrics"]["test"]["log_loss"])
    assert metrics["train_loss"] > 0


def test_a_server_that_is_not_named_or_not_there_is_told_before_the_training(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("train", "--data", data, "--model", "deepfm", "--models", tmp_path / "models", "--log-to", "mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    refused(run(*words), "MLFLOW_TRACKING_URI is not set")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    refused(run(*words), "does not answer")
    assert not (tmp_path / "models").exists()


def test_a_folder_that_cannot_be_written_loses_no_training(data: Path, tmp_path: Path) -> None:
    (tmp_path / "models-runs").write_text("in the way")
    told, complaint = train(data, tmp_path / "models", "tensorboard")
    assert f"Error: {told['bundle']} is published, and not logged: " in complaint
    assert (Path(told["bundle"]) / "model.onnx").exists()
