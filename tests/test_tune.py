"""`adrank tune`: trials that go on, repeat by seed, never see test, and end in a command that trains."""

import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
from rich.progress import Progress

import adrank
from tests.test_cli import run
from training.datasets.prepared import Prepared, open_prepared
from training.networks import NETWORKS
from training.train_settings import TrainError, TrainSettings, overridden
from training.tune import Tuning
from training.tuned import settings_in

TINY = {"epochs": "1", "threads": "1", "unknown_rate": "0", "flat_below": "0", "least_steps": "0", "batch": "64"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    prepared = small.data_set(tmp_path_factory.mktemp("small"))
    shutil.rmtree(prepared.folder / "test")  # a search has no use for it
    return prepared


def tuning(data: Prepared, path: Path, **given: str) -> Tuning:
    settings = {**TINY, **given}
    return Tuning(data, "fm", settings, settings, path)


def tried(search: Tuning) -> list[dict[str, Any]]:
    return [trial.params for trial in search.study.trials]


def test_trials_begin_with_the_defaults_stay_in_the_file_and_go_on(data: Prepared, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "fm.log"
    first = tuning(data, path)
    assert first.search(1.0, 2, small.quiet()) is False
    assert list(first.usual) == ["learning_rate", "embedding", "embedding_l2"]  # fm has no MLP, and the batch is fixed
    assert tried(first)[0] == {"learning_rate": 0.003, "embedding": 16, "embedding_l2": 1e-5}
    begun = [(trial.params, trial.value) for trial in first.study.trials]
    again = tuning(data, path)
    again.search(1.0, 1, small.quiet())
    assert tried(again)[:2] == [params for params, _ in begun]
    assert len({str(each) for each in tried(again)}) == 3  # what follows is drawn anew
    best = again.best()
    assert best.ended + best.pruned == 3
    assert best.valid == max(trial.value for trial in again.study.trials if trial.value is not None)
    other = tuning(data, tmp_path / "other.log")
    other.search(1.0, 2, small.quiet())
    assert [(trial.params, trial.value) for trial in other.study.trials] == begun


def test_what_is_best_is_a_command_and_a_file_of_settings(data: Prepared, tmp_path: Path) -> None:
    search = tuning(data, tmp_path / "fm.log")
    search.search(1.0, 1, small.quiet())
    best, target = search.best(), tmp_path / "best.toml"
    words = shlex.split(best.command(Path("some where"), "fm"))
    assert words[:6] == ["adrank", "train", "--data", "some where", "--model", "fm"]
    parsed = dict(word.split("=") for word in words[7::2])
    assert parsed == {**TINY, "learning_rate": "0.003", "embedding": "16", "embedding_l2": "1e-05"}
    target.write_text("seed = 3\n[fm]\nbatch = 7\n[deepfm]\nhidden = [4, 2]\n")
    best.write(target, "fm")
    assert {name: float(text) for name, text in settings_in(target, "fm").items()} == {
        "seed": 3.0, **{name: float(text) for name, text in parsed.items()}
    }  # fmt: skip
    assert settings_in(target, "deepfm") == {"seed": "3", "hidden": "4-2"}
    target.write_bytes(b"\xff")
    with pytest.raises(TrainError, match="is not UTF-8"):
        best.write(target, "fm")


def test_time_that_is_over_cuts_a_trial_short_and_says_what_to_do(data: Prepared, tmp_path: Path) -> None:
    search = tuning(data, tmp_path / "fm.log", epochs="50")
    search.search(1e-6, 1, small.quiet())
    assert [trial.state.name for trial in search.study.trials] == ["PRUNED"]
    with pytest.raises(TrainError, match=r"no trial has ended yet.*with more --minutes"):
        search.best()


class Impatient(Progress):
    """Somebody who presses Ctrl-C in an epoch."""

    def update(self, *_: Any, **__: Any) -> None:
        raise KeyboardInterrupt


def test_ctrl_c_keeps_what_is_done(data: Prepared, tmp_path: Path) -> None:
    search = tuning(data, tmp_path / "fm.log")
    with Impatient(disable=True) as progress, pytest.raises(KeyboardInterrupt):
        search.search(1.0, 5, progress)
    search.search(1.0, 1, small.quiet())
    with Impatient(disable=True) as progress:
        assert search.search(1.0, 5, progress) is True
    again = tuning(data, tmp_path / "fm.log").best()
    assert (again.ended, again.settings["embedding"]) == (1, "16")


def test_the_command_tunes_and_prints_one_that_trains(tmp_path: Path) -> None:
    folder = small.data_set(tmp_path).folder
    fixed = [word for name, value in TINY.items() for word in ("--set", f"{name}={value}")]
    code, parsed, _ = run("tune", "--data", folder, "--model", "lr", "--minutes", 1, "--most", 1, "--trials", tmp_path / "lr.log", *fixed)
    assert code == 0
    first, command = parsed.splitlines()
    assert first.startswith("best of 1 trials that ended (0 were cut short): 0.")
    _, name, *words = shlex.split(command)
    given = adrank.cli.commands[name].make_context(name, words).params
    assert (given["data"], given["model"]) == (folder, "lr")
    settings = dict(each.split("=") for each in given["settings"])
    _, loop = overridden(settings, NETWORKS["lr"].settings(), TrainSettings())
    assert (loop.batch, loop.learning_rate, loop.embedding_l2) == (64, 0.003, 1e-5)
    assert np.isfinite(small.quick(open_prepared(folder), "lr", **vars(loop)).metrics["test"].auc)


def test_what_cannot_be_searched_is_a_sentence(data: Prepared, tmp_path: Path) -> None:
    tuning(data, tmp_path / "fm.log")
    with pytest.raises(TrainError, match=r"is of another search: data_set small, network fm.*name another file with --trials"):
        tuning(data, tmp_path / "fm.log", epochs="2")
    with pytest.raises(TrainError, match="there is no network 'fmm'"):
        Tuning(data, "fmm", {}, [], tmp_path / "x.log")
    with pytest.raises(TrainError, match="all that adrank tune tries of fm is fixed by --set"):
        tuning(data, tmp_path / "x.log", learning_rate="0.1", embedding="4", embedding_l2="0")
    (tmp_path / "x.log").write_text("no journal\n")
    with pytest.raises(TrainError, match=r"x.log cannot be read or written as a file of trials.*name another with --trials"):
        tuning(data, tmp_path / "x.log")
