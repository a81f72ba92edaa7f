"""The model repository: readable, each live version and challenger what was published, and scoring as training did."""

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil

from features.bundle import INT8_MODEL, BundleError
from features.memory import Room
from features.repository import ambiguous

from ..errors import ScoringError
from ..models.loaded import Model, load_model
from ..models.watcher import Found, look
from ..settings import Settings
from .finding import Finding, Status

FREE_BYTES = 2**30
LOADED = 3
"""What a version takes in memory while it is loaded, to the size of its files, at most as far as is known."""


@dataclass
class Repository:
    """Checks a repository, and keeps what it has loaded, so that `weight` is what all of it takes in memory."""

    settings: Settings
    room: Room
    weight: int = 0

    def check(self) -> Iterator[Finding]:
        """What was found. Loads the models as the service does, on the device that the settings name."""
        models = self.settings.models
        try:
            there, found = models.exists(), look(models)
        except OSError as error:
            fix = "let the user that adrank runs as read it, or mend the volume"
            yield _found("repository", "problem", f"{models} cannot be read: {error.strerror or error}", fix)
            return
        if not there:
            fix = "train a model into it, mount it, or name another with --models or ADRANK_MODELS"
            yield _found("repository", "problem", f"{models} is not there; the service waits unready", fix)
            return
        yield from self._models(found)
        yield _disk(models)

    def _models(self, found: dict[str, Found]) -> Iterator[Finding]:
        chosen = self.settings.model
        if not found:
            said = f"{self.settings.models} has no model yet; the service waits unready"
            yield _found("repository", "problem", said, "train one with adrank train, or name another repository")
        elif chosen and chosen not in found:
            said = f"ADRANK_MODEL is {chosen}, and {self.settings.models} has only {', '.join(sorted(found))}"
            yield _found("repository", "problem", said, "name one of these, or train it")
        elif wrong := ambiguous(found) if not chosen else None:
            yield _found("repository", "problem", *_halves(wrong))
        own, kept = psutil.Process(), list[Model]()
        before = own.memory_info().rss
        with ThreadPoolExecutor(1) as beside:
            for name, each in sorted(found.items()):
                yield from self._model(name, each, beside, kept)
        self.weight = max(own.memory_info().rss - before, sum(_size(model.bundle.path) for model in kept))

    def _model(self, name: str, found: Found, beside: Executor, kept: list[Model]) -> Iterator[Finding]:
        if found.path is None:
            wrong = found.wrong.detail if found.wrong else "it has no live version; make one live with adrank promote --version"
            yield _found(name, "problem", *_halves(wrong))
        else:
            yield self._load(name, found.path, beside, kept)
        if found.challenger_wrong:
            yield _found(f"{name}, challenger", "problem", *_halves(found.challenger_wrong.detail))
        elif found.challenger and found.decision:
            said = f"version {found.challenger.version} was stopped: {found.decision.detail}"
            yield _found(f"{name}, challenger", "warning", said, "end it with adrank promote --stop, or announce another")
        elif found.challenger:
            path = self.settings.models / name / str(found.challenger.version)
            finding = self._load(f"{name}, challenger", path, beside, kept)
            share = f"{found.challenger.mode} for {found.challenger.share:.3g} of the users"
            yield Finding(finding.area, finding.check, finding.status, f"{finding.said}; {share}", finding.fix)

    def _load(self, check: str, path: Path, beside: Executor, kept: list[Model]) -> Finding:
        """Digests, contract and goldens of a version, if there is memory to load it."""
        if (needed := LOADED * _size(path)) > (left := self.room.left()):
            said = f"version {path.name} is not loaded: it may take {needed / 2**20:,.0f} MB, and {left / 2**20:,.0f} MB are left here"
            return _found(check, "skipped", f"{said}; run adrank doctor beside the service in a container of its own")
        try:
            model = load_model(path, self.settings, beside, [other.bundle for other in kept])
        except (BundleError, ScoringError) as error:
            return _found(check, "problem", *_halves(str(error)))
        kept.append(model)
        said = f"version {path.name}, contract {model.bundle.fingerprint}, {len(model.bundle.goldens)} goldens hold, {model.precision}"
        if self.settings.precision == "int8" and INT8_MODEL not in model.bundle.files:
            why = model.bundle.manifest.get("int8", {}).get("refused", "it was not asked for")
            fix = "train it with --set int8=true, or set ADRANK_PRECISION=float32"
            return _found(check, "warning", f"{said}: ADRANK_PRECISION is int8, and the bundle has no such graph ({why})", fix)
        return _found(check, "ok", said)


def _disk(models: Path) -> Finding:
    free = shutil.disk_usage(models).free
    said = f"{free / 2**20:,.0f} MB free on the volume of {models}"
    if free < FREE_BYTES:
        return _found("disk", "warning", said, "free some, or retraining cannot publish")
    return _found("disk", "ok", said)


def _size(path: Path) -> int:
    try:
        return sum(entry.stat().st_size for entry in os.scandir(path))
    except OSError:
        return 0


def _halves(text: str) -> tuple[str, str]:
    said, _, fix = text.partition("; ")
    return said, fix or "see what training published, and publish it again"


def _found(check: str, status: Status, said: str, fix: str = "") -> Finding:
    return Finding("models", check, status, said, fix)
