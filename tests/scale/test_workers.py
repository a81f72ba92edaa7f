"""`adrank train --workers` on a Ray that is started here: a worker that is killed, a cluster that is not there, Ctrl-C."""

import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import small

from tests.test_checkpoint import EACH_STEP, TRAIN, begun, command
from training.checkpoint import FILE
from training.datasets.prepared import Prepared

pytest.importorskip("ray", reason="make scale-test")
WORKERS = ("--workers", "2", *EACH_STEP)
SECONDS, EPOCHS = 400.0, "10"
Process = subprocess.Popen[str]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return small.data_set(tmp_path_factory.mktemp("small"))


@pytest.fixture
def started(data: Prepared, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Process]:
    """A training that has written its first checkpoint."""
    process, checkpoint, end = (
        begun(command(data, tmp_path / "models", EPOCHS, *WORKERS, *getattr(request, "param", ()))),
        tmp_path / "models-checkpoints/deepfm" / FILE,
        time.monotonic() + SECONDS,
    )
    while not checkpoint.exists():
        assert time.monotonic() < end
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    yield process
    process.kill()


def workers_of(process: Process) -> list[psutil.Process]:
    return [each for each in psutil.Process(process.pid).children(recursive=True) if "TrainWorker" in "".join(each.cmdline())]


@pytest.mark.parametrize("started", [(), ("--shard-rows", "10")], ids=["whole tables", "tables that are split"], indirect=True)
def test_a_worker_that_is_killed_costs_the_time_since_the_last_checkpoint(started: Process, tmp_path: Path) -> None:
    workers = workers_of(started)
    assert len(workers) == 2
    workers[1].send_signal(signal.SIGKILL)
    said = started.communicate(timeout=SECONDS)[0]
    assert started.returncode == 0, said
    assert "going on from epoch" in said
    assert "published" in said
    assert not (tmp_path / "models-checkpoints").exists(), "a training that has ended needs none"


def test_ctrl_c_ends_what_was_started(started: Process, tmp_path: Path) -> None:
    all_of_it = psutil.Process(started.pid).children(recursive=True)
    assert workers_of(started)
    started.send_signal(signal.SIGINT)
    said = started.communicate(timeout=60)[0]
    assert started.returncode not in (0, 2), said
    assert "Traceback" not in said
    assert not psutil.wait_procs(all_of_it, timeout=30)[1]
    assert (tmp_path / "models-checkpoints/deepfm" / FILE).exists(), "so that --resume goes on"


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere.invalid:6379", "auto"])
def test_a_cluster_that_is_not_there_is_a_sentence(data: Prepared, tmp_path: Path, address: str) -> None:
    process = begun(command(data, tmp_path / "models", EPOCHS, *WORKERS, "--ray", address))
    said = process.communicate(timeout=SECONDS)[0]
    assert process.returncode == 2, said
    assert f"Error: no Ray cluster at {address}: " in said
    assert "Traceback" not in said


def test_another_version_on_a_worker_is_a_sentence(data: Prepared, tmp_path: Path) -> None:
    words = command(data, tmp_path / "models", EPOCHS, *WORKERS)
    process = begun(words, program="import training.workers; training.workers.code = str\n" + TRAIN)
    said = process.communicate(timeout=SECONDS)[0]
    assert process.returncode == 2, said
    assert "has another version of adrank or of torch than where the training began; make them the same" in said
