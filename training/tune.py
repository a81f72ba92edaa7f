"""`adrank tune`: settings of a network that are good on the valid split, found by optuna. The test split is never looked at.

The trials lie in a file, so that the search goes on where it was stopped. The data are encoded once for all of them.
"""

import math
import shlex
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import tomli_w
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from rich.console import Console
from rich.progress import Progress

from features.bundle import replace_file
from features.encode import Encoder
from features.files import read_toml

from .datasets.encoded import encode_split
from .datasets.prepared import Prepared
from .datasets.vocabularies import learn_vocabularies
from .first_order import settled
from .fit import Epoch, deterministic, fit_network, score_of
from .networks import NETWORKS, build
from .networks.contract import Fields
from .retrain.compare import Gate
from .retrain.data_checks import Enough
from .train import heads_of
from .train_settings import TrainError, TrainSettings, overridden

SPACE: dict[str, Callable[[optuna.Trial, Any], Any]] = {
    "batch": lambda trial, _: trial.suggest_int("batch", 32, 4096, log=True),
    "learning_rate": lambda trial, _: trial.suggest_float("learning_rate", 3e-4, 1e-2, log=True),
    "embedding": lambda trial, _: trial.suggest_int("embedding", 4, 64, log=True),
    "embedding_l2": lambda trial, _: trial.suggest_float("embedding_l2", 1e-6, 0.1, log=True),
    "dropout": lambda trial, _: trial.suggest_float("dropout", 0.0, 0.5),
    "hidden": lambda trial, usual: trial.suggest_categorical("hidden", list(dict.fromkeys([usual, "64-32", "200-80", "400-400-400"]))),
}
"""What is tried for a setting, where a network has it."""
FIRST, WARM_EPOCHS = 5, 2
"""Trials that are never pruned, and epochs of each that are not, since there is nothing yet to compare with."""


@dataclass(frozen=True)
class Tuned:
    """What a search came to."""

    settings: dict[str, str]
    """The best ones, as the texts of `--set`, those that were fixed among them."""
    valid: float
    """What they came to on valid: AUC, or log loss below 0 where it has one class."""
    ended: int
    pruned: int

    def command(self, data: Path, family: str) -> str:
        """How to train with them."""
        words = [word for name, value in self.settings.items() for word in ("--set", f"{name}={value}")]
        return shlex.join(["adrank", "train", "--data", str(data), "--model", family, *words])

    def write(self, path: Path, family: str) -> None:
        """Write them as the network's table of a TOML file, whose other entries stay.

        Raises:
            TrainError: the file is none, or cannot be written.
        """
        document = read_toml(path, TrainError) if path.exists() else {}
        whole = tomli_w.dumps({**document, family: {name: _plain(text) for name, text in self.settings.items()}})
        try:
            replace_file(path, whole.encode())  # its other entries are not to be lost on a full disk
        except OSError as error:
            raise TrainError(f"cannot write the settings {path}: {error}") from error


class Tuning:
    """One search: a network on a data set, whose settings are `given` as texts of `--set`; those that are `fixed` are not tried."""

    def __init__(self, data: Prepared, family: str, given: Mapping[str, str], fixed: Collection[str], path: Path) -> None:
        """Encode the data, and open the file of trials or begin it.

        Raises:
            TrainError: there is no such network or setting, or the file is of another search.
            DataError: the data set cannot be read.
        """
        if family not in NETWORKS:
            raise TrainError(f"there is no network {family!r}; there are {', '.join(NETWORKS)}")
        self.family, self.given = family, dict(given)
        self.network, self.loop = self._settings({})
        heads, encoder = heads_of(family, self.loop.heads), Encoder(data.schema, learn_vocabularies(data))
        self.fields = Fields.of(data.schema, encoder.vocabularies, heads)
        self.train, self.valid = (encode_split(data, split, encoder, heads) for split in ("train", "valid"))
        self.loop = self.loop.for_rows(len(self.train))
        usual = {**vars(self.loop), **vars(self.network)}
        usual["embedding_l2"] = NETWORKS[family].embedding_l2 if self.loop.embedding_l2 == -1 else self.loop.embedding_l2
        usual["hidden"] = texts_of(usual).get("hidden")
        self.usual = {name: usual[name] for name in SPACE if usual.get(name) is not None and name not in fixed}
        if not self.usual:
            raise TrainError(f"all that adrank tune tries of {family} is fixed by --set: {', '.join(SPACE)}")
        about = {"data_set": data.schema.name, "network": family, "settings": self.given, "tried": list(self.usual)}
        self.study = _opened(path, about, self.loop.seed)

    def search(self, minutes: float, trials: int | None, progress: Progress) -> bool:
        """Try settings for some minutes, at most so many `trials`; whether Ctrl-C ended it. What was tried stays in the file.

        Raises:
            KeyboardInterrupt: Ctrl-C, and no trial has ended yet.
        """
        end, task = time.monotonic() + 60 * minutes, progress.add_task(f"tuning {self.family}", total=None)
        if not self._states().keys() & {"COMPLETE", "PRUNED", "WAITING"}:  # a first that was interrupted has failed
            self.study.enqueue_trial(self.usual)  # what a training has without a search, so that none ends below it

        def watch(trial: optuna.Trial, epoch: Epoch) -> None:
            value = score_of(epoch.valid)
            progress.update(task, description=f"trial {trial.number + 1}, epoch {epoch.number}: {value:.5f} on valid")
            if not math.isnan(value):
                trial.report(value, epoch.number)
            if math.isnan(value) or trial.should_prune() or time.monotonic() > end:
                raise optuna.TrialPruned

        def say(_: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
            came = "ended early" if trial.state.name == "PRUNED" else f"{trial.value:.5f} on valid"
            tried = ", ".join(f"{name}={text}" for name, text in texts_of(trial.params).items())
            progress.console.print(f"trial {trial.number + 1}: {came}; {tried}", soft_wrap=True)

        try:
            self.study.optimize(lambda trial: self._try(trial, watch), trials, 60 * minutes, callbacks=[say])
        except KeyboardInterrupt:
            if not self._states()["COMPLETE"]:
                raise  # there is nothing to tell yet
            return True
        return False

    def best(self) -> Tuned:
        """The best settings of all trials in the file.

        Raises:
            TrainError: no trial has ended.
        """
        states = self._states()
        if not states["COMPLETE"]:
            raise TrainError("no trial has ended yet, so there are no best settings; run the same again with more --minutes")
        return Tuned({**self.given, **texts_of(self.study.best_params)}, self.study.best_value, states["COMPLETE"], states["PRUNED"])

    def _states(self) -> Counter[str]:
        return Counter(trial.state.name for trial in self.study.trials)

    def _try(self, trial: optuna.Trial, watch: Callable[[optuna.Trial, Epoch], None]) -> float:
        network_settings, loop = self._settings(texts_of({name: SPACE[name](trial, usual) for name, usual in self.usual.items()}))
        with deterministic(loop), Progress(console=Console(quiet=True), disable=True) as nobody:
            network = build(self.family, self.fields, settled(network_settings, len(self.train) < loop.flat_below))
            epochs = fit_network(network, self.train, self.valid, loop, nobody, each=lambda epoch: watch(trial, epoch))
        return score_of(max(epochs, key=lambda epoch: epoch.score).valid)

    def _settings(self, tried: Mapping[str, str]) -> tuple[Any, TrainSettings]:
        network, loop, *_ = overridden({**self.given, **tried}, NETWORKS[self.family].settings(), TrainSettings(), Gate(), Enough())
        return network, loop


def texts_of(values: Mapping[str, Any]) -> dict[str, str]:
    """Settings as the texts of `--set`, numbers to four digits."""
    kinds: dict[type, Callable[[Any], str]] = {float: "{:.4g}".format, tuple: lambda value: "-".join(map(str, value))}
    return {name: kinds.get(type(value), str)(value) for name, value in values.items()}


def _opened(path: Path, about: Mapping[str, Any], seed: int) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        storage = JournalStorage(JournalFileBackend(str(path)))
        study = optuna.create_study(storage=storage, study_name="adrank", direction="maximize", load_if_exists=True)
    except (OSError, KeyError, ValueError) as error:
        raise TrainError(f"{path} cannot be read or written as a file of trials: {error}; name another with --trials") from error
    if study.user_attrs and study.user_attrs != about:
        was = ", ".join(f"{name} {value}" for name, value in study.user_attrs.items())
        raise TrainError(f"{path} is of another search: {was}; name another file with --trials")
    for name, value in about.items():
        study.set_user_attr(name, value)
    study.sampler = optuna.samplers.TPESampler(seed=(seed + 7919 * len(study.trials)) % 2**32)  # one that goes on draws anew
    study.pruner = optuna.pruners.MedianPruner(FIRST, WARM_EPOCHS)
    return study


def _plain(text: str) -> int | float | str | list[int]:
    """A setting as TOML has it."""
    parts = text.split("-")
    if len(parts) > 1 and all(part.isdecimal() for part in parts):
        return [int(part) for part in parts]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
