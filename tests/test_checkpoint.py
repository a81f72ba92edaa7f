"""A training that was killed goes on from its checkpoint, and ends as one that was not, to the last bit."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
import torch

from features.bundle import current_path
from tests.processes import ROOT
from tests.test_cli import QUICK, refused, run
from training.checkpoint import FILE, Checkpoint, CheckpointError
from training.datasets.prepared import Prepared
from training.train import Trained, train
from training.train_settings import TrainSettings

USUAL: dict[str, Any] = {"epochs": 4, "batch": 64, "threads": 1, "learning_rate": 0.02, "least_steps": 4, "unknown_rate": 0.0}


class Killed(BaseException):
    """What no training catches."""


class KilledAfter(Checkpoint):
    """A checkpoint of so many steps, and then the end of the process."""

    def __init__(self, folder: Path, steps: int) -> None:
        super().__init__(folder, minutes=0)
        self.steps = steps

    def due(self) -> bool:
        self.steps -= 1
        return self.steps <= 0

    def write(self, values: Mapping[str, Any], tensors: Sequence[Any]) -> None:
        super().write(values, tensors)
        raise Killed


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return small.data_set(tmp_path_factory.mktemp("small"))


def trained(data: Prepared, family: str, checkpoint: Checkpoint | None, settings: Mapping[str, Any]) -> Trained:
    return train(data, family, small.NETWORK_SETTINGS[family], TrainSettings(**USUAL | settings), small.quiet(), None, checkpoint)


def state(of: Trained) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in of.network.state_dict().items()}


@pytest.mark.parametrize(
    ("family", "settings", "steps"),
    [
        ("deepfm", {}, (3, 10, 13)),  # its first order alone, at its end, and then all of it
        ("din", {"flat_below": 0, "unknown_rate": 0.1}, (8,)),
        ("wide_deep", {"flat_below": 0}, (7,)),  # FTRL and Adagrad
        ("deepfm", {"sparse_above": 10, "flat_below": 0}, (6,)),  # lazy Adam
        ("din", {"cooccurrence": 0.5, "flat_below": 0}, (6,)),
        ("two_tower", {"flat_below": 0}, (6,)),  # counts rows as they come
        ("vae_cf", {"flat_below": 0}, (6,)),  # draws, and counts steps
    ],
)
def test_a_training_that_was_killed_ends_as_one_that_was_not(
    data: Prepared, tmp_path: Path, settled_soon: None, family: str, settings: dict[str, Any], steps: tuple[int, ...]
) -> None:
    whole = trained(data, family, None, settings)
    for after in steps:
        with pytest.raises(Killed):
            trained(data, family, KilledAfter(tmp_path, after), settings)
        torch.manual_seed(after)  # what is drawn elsewhere does not matter
        resumed = trained(data, family, Checkpoint(tmp_path, resume=True), settings)
        assert state(resumed) == state(whole)
        assert (resumed.epochs, resumed.metrics, resumed.calibrations) == (whole.epochs, whole.metrics, whole.calibrations)


def test_a_checkpoint_that_cannot_be_gone_on_from_is_a_sentence(data: Prepared, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        trained(data, "deepfm", KilledAfter(tmp_path, 3), {})
    again = Checkpoint(tmp_path, resume=True)
    with pytest.raises(CheckpointError, match=r"is of another training: its learning_rate is 0\.02, here it is 0\.01; train as it was"):
        trained(data, "deepfm", again, {"learning_rate": 0.01})
    with pytest.raises(CheckpointError, match="it trains deepfm, this one din"):
        trained(data, "din", again, {})
    (tmp_path / "other").mkdir()
    with pytest.raises(CheckpointError, match="its data is another"):
        trained(small.data_set(tmp_path / "other", seed=5), "deepfm", again, {})
    whole = again.path.read_bytes()
    flipped = whole[:3000] + bytes([whole[3000] ^ 1]) + whole[3001:]
    for damaged in (whole[: len(whole) // 2], flipped, b""):
        again.path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="cannot be gone on from"):
            trained(data, "deepfm", again, {})


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(tmp_path / "around" / "new", ours=True)
    checkpoint.write({"a": 1}, [torch.zeros(2)])
    before = checkpoint.path.read_bytes()

    def full(_what: object, file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"cannot be written: .*No space left on device; make room"):
        checkpoint.write({"a": 2}, [])
    assert [path.name for path in checkpoint.path.parent.iterdir()] == [FILE]
    assert checkpoint.path.read_bytes() == before
    chosen = Checkpoint(checkpoint.path.parent)
    chosen.remove()
    assert list(chosen.path.parent.iterdir()) == [], "somebody's own folder stays"
    checkpoint.remove()
    assert list(tmp_path.iterdir()) == []


def test_resuming_where_there_is_no_checkpoint_is_a_sentence(data: Prepared, tmp_path: Path) -> None:
    words = ("train", "--data", data.folder, "--model", "deepfm", "--models", tmp_path / "models", "--resume", *QUICK)
    refused(run(*words), "there is no checkpoint in .*models-checkpoints/deepfm; leave out --resume")
    assert not list(tmp_path.iterdir())


TRAIN = """
import sys
import adrank, small
from training.export import export
export.to_onnx, export.SIZES, export.explain_graph = small.traced, (1, 7), lambda *_: ({}, [])
adrank.main(sys.argv[1:])
"""
"""`adrank train` with a quick export."""
EACH_STEP = ("--checkpoint-minutes", "0")


def command(data: Prepared, models: Path, epochs: str, *more: str) -> list[str]:
    settings = {"epochs": epochs, "patience": epochs, "batch": "16", "threads": "1", "flat_below": "0", "unknown_rate": "0.1"}
    words = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    words += ["--data", str(data.folder), "--model", "deepfm", "--models", str(models), "--promote", "always", "--no-report"]
    return ["train", *words, *more]


def begun(words: Sequence[str], program: str = TRAIN) -> "subprocess.Popen[str]":
    """A process of the command."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    whole = [sys.executable, "-c", program, *words]
    return subprocess.Popen(whole, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def weights(models: Path) -> dict[str, bytes]:
    with np.load(current_path(models, "deepfm") / "weights.npz") as file:
        return {name: file[name].tobytes() for name in file.files}


def test_the_command_killed_at_random_moments_ends_with_the_same_weights(
    data: Prepared, traced_export: None, settled_soon: None, tmp_path: Path
) -> None:
    """Once; `RESUMES=10` kills it ten times, and writes when with -s."""
    kills = int(os.environ.get("RESUMES", "1"))
    chance, moments, more, epochs = random.Random(kills), list[str](), list[str](), str(3 + kills)
    checkpoint = tmp_path / "killed-checkpoints" / "deepfm" / FILE
    while len(moments) < kills:
        process = begun(command(data, tmp_path / "killed", epochs, *EACH_STEP, *more))
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        end, later = time.monotonic() + 120, chance.uniform(0, 0.4)
        while not checkpoint.exists() or checkpoint.stat().st_mtime_ns == before:
            assert time.monotonic() < end
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.005)
        time.sleep(later)
        process.kill()
        said, more = process.communicate(timeout=60)[0], ["--resume"]
        assert process.returncode == -signal.SIGKILL, said
        moments += re.findall(r"going on from (.*), by", said) or ["the beginning"]
    code, printed, complaint = run(*command(data, tmp_path / "killed", epochs, "--resume"))
    assert code == 0, complaint
    assert re.search(r"going on from epoch \d+, step [\d,]+ of it", printed + complaint)
    sys.stdout.write("; ".join(moments))
    assert not checkpoint.parent.parent.exists(), "a training that has ended needs none"
    assert run(*command(data, tmp_path / "whole", epochs))[0] == 0
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
