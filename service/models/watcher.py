"""The models of a process follow the repository: what is published, promoted or rolled back is loaded beside what is live, then swapped in.

What a version takes to load is taken in a thread of low priority; what it takes to encode the catalogue, in small slices on the event
loop. A version that cannot be used is refused, and the one before stays.
"""

import asyncio
import contextlib
import ctypes
import gc
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, TypeVarTuple

from features.bundle import BundleError, current_path
from features.challenger import CanaryDecision, Challenger, read_challenger, read_decision, write_decision
from features.repository import NAME, is_live

from ..errors import ScoringError
from ..public import MODELS, Refused
from ..ranking.ranker import Ranker
from ..settings import Settings
from ..telemetry.metrics import Metrics
from .canary import Challenge
from .default_model import DefaultModel
from .loaded import Model, Models, load_model

LOOK_SECONDS = 0.5
JUDGE_SECONDS = 0.25
STUCK_SECONDS = 30.0
"""How long a look at the repository, or the load of a version, may take before it is told."""
NICE = 5
"""How much lower than that of others the priority of the thread is that loads. Not much: it holds Python's lock now and then, and where
other programs keep all processors busy, whoever wants the lock waits for as long as it waits for a processor."""
SWITCH_SECONDS = 0.0002
UNREADABLE = "the model repository cannot be read"

Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")
Mark = tuple[tuple[str, int, int], ...]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Found:
    """What the repository says of one model, and what is wrong with what it says."""

    path: Path | None = None
    wrong: Refused | None = None
    challenger: Challenger | None = None
    challenger_wrong: Refused | None = None
    decision: CanaryDecision | None = None


@dataclass(frozen=True, slots=True)
class Tried:
    """A version that was refused, and why; `mark` tells whether its files have changed since."""

    path: Path
    mark: Mark
    reason: Refused


class ModelWatcher:
    """Loads models and lets go of them, in one process."""

    def __init__(self, settings: Settings, ranker: Ranker, metrics: Metrics) -> None:
        self._settings, self._ranker, self._metrics = settings, ranker, metrics
        self._background = ThreadPoolExecutor(1, "load", give_way)
        self._beside = ThreadPoolExecutor(1, "beside")
        self._beside.submit(int)  # starts its thread here: one that the other starts would inherit its priority
        self._tried: dict[str, Tried] = {}
        self._said: dict[str, str] = {}
        self._refusals: dict[str, Refused] = {}
        self._held: set[Model] = set()
        self._freed = False
        self.stuck: str | None = None
        """That nothing is followed for now, since the repository does not answer."""
        self.looked = False
        """Whether it is known what the repository has."""
        self.default = DefaultModel(settings.model, shared_folder())
        ranker.use(Models({}, {}, self.default.name), ranker.catalogue)

    @property
    def waiting_for(self) -> str:
        """Why requests that name no model cannot be ranked yet."""
        if not self.looked:
            return "models are being loaded"
        refused = self._ranker.models.refused
        why = [UNREADABLE] if UNREADABLE in self._said else [f"{name}: {reason}" for name, reason in sorted(refused.items())]
        return self._waiting + "".join(f" ({each})" for each in why[:1])

    @property
    def _waiting(self) -> str:
        default = self._ranker.models.default
        if self.default.unclear:
            return self.default.unclear
        wanted = f"model {default} is not usable" if default else "no model is usable"
        return f"{wanted}; waiting for one to be published"

    async def follow(self) -> None:
        """Look, for ever."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            await self.look()

    async def judge(self) -> None:
        """Stop challengers that left their bounds, for ever."""
        while True:
            await asyncio.sleep(JUDGE_SECONDS)
            for name, challenge in list(self._ranker.challenges.items()):
                if decision := challenge.judged():
                    challenge.stop(decision)
                    if challenge.first_to_stop():
                        self._metrics.rolled_back(name, decision.reason)
                    log.error("challenger %s %d is stopped: %s", name, challenge.facts.version, decision.detail)
                    # Not waited for: another challenger's decision must not wait for a volume, or for a model that is being loaded.
                    self._beside.submit(_tell_others, self._settings.models / name, challenge.facts, decision)

    def close(self) -> None:
        """Let the threads end."""
        for threads in (self._background, self._beside):
            threads.shutdown(wait=False, cancel_futures=True)

    async def look(self) -> None:
        """Do what the repository asks for now."""
        refused: dict[str, Refused] = {}
        if self._freed:
            self._freed = False
            await asyncio.get_running_loop().run_in_executor(self._beside, _give_back)
        before = self._held
        try:
            found = await self._aside(look, self._settings.models)
        except OSError as error:
            self._say(UNREADABLE, f"{UNREADABLE}, so what is loaded stays: {error}")
        else:
            self._said.pop(UNREADABLE, None)
            self.default.saw(found.keys(), self._ranker.models.loaded.keys())
            for name in sorted(found.keys() | self._ranker.models.loaded.keys()):
                await self._follow(name, found.get(name), refused)
            self._refuse(refused)
        self.looked = True
        if self._ranker.models.ready:
            self._said.pop("waiting", None)
        else:
            self._say("waiting", f"{self._waiting}; the repository is {self._settings.models}", logging.WARNING)
        self._let_go()
        if self._held != before:
            self._freed = True
            gc.freeze()  # what is loaded by now stays, and need not be searched for garbage in the middle of a request

    async def _follow(self, name: str, found: Found | None, refused: dict[str, Refused]) -> None:
        """One model as the repository has it."""
        live = self._ranker.models.loaded.get(name)
        if found is None:
            if live and self._ranker.models.default == name:
                refused[name] = Refused("gone", MODELS["gone"])
            else:
                self._use(name, None, None)
        elif found.wrong is not None:
            refused[name] = found.wrong
        elif found.path is not None and (live is None or live.bundle.path != found.path):
            live = await self._load(name, found.path, refused) or live
            if name not in refused:
                self._use(name, live, None)
        if live and name in refused:
            refused[name] = refused[name].beside(live.bundle.version)
        if live and found:
            self._use(name, live, await self._challenge(live, found, refused))

    async def _challenge(self, live: Model, found: Found, refused: dict[str, Refused]) -> Challenge | None:
        """The challenger that the repository names, at work already or not yet."""
        name, facts, before = live.name, found.challenger, self._ranker.challenges.get(live.name)
        what = f"{name}, challenger"
        if found.challenger_wrong is not None:
            refused[what] = found.challenger_wrong
        if facts is None or facts.version == live.bundle.version:
            return None
        if before is not None and before.facts == facts:
            if before.decision is None and found.decision is not None:
                log.error("challenger %s %d is stopped, as another process found: %s", name, facts.version, found.decision.detail)
                before.stop(found.decision)
            return before
        model = None if found.decision else await self._load(what, self._settings.models / name / str(facts.version), refused)
        if model is None and found.decision is None:
            return None
        challenge = Challenge(name, facts, model, self._metrics, shared_folder())
        challenge.begin(ThreadPoolExecutor(1, "challenger", give_way))
        self._metrics.challenger(name, facts.mode)
        challenge.decision = found.decision
        return challenge

    async def _load(self, what: str, path: Path, refused: dict[str, Refused]) -> Model | None:
        """The version, with its table in the catalogue; None where it is refused. One that is loaded already is not loaded again."""
        for model in self._models():
            if model.bundle.path == path:
                return model
        tried, mark = self._tried.pop(what, None), await self._aside(mark_of, path)
        if tried is None or (tried.path, tried.mark) != (path, mark):
            try:
                with _switching_often():
                    others = [other.bundle for other in self._models()]
                    model = await self._aside(load_model, path, self._settings, self._beside, others, shared_folder())
                    del others
            except (BundleError, ScoringError) as error:
                tried = Tried(path, mark, Refused.by(error))
            except Exception as error:
                log.exception("version %s of model %s failed in a way nobody foresaw", path.name, what)
                tried = Tried(path, mark, Refused("unforeseen", f"it failed to load: {error!r}"))
            else:
                await self._ranker.catalogue.add(model.bundle.fingerprint, model.bundle.encoder, model.towers)
                return model
        self._tried[what] = tried
        refused[what] = tried.reason
        return None

    def _use(self, name: str, model: Model | None, challenge: Challenge | None) -> None:
        """Rank with this model and this challenger from the next request on; None: with none."""
        ranker = self._ranker
        old = ranker.challenges.get(name)
        if model is ranker.models.loaded.get(name) and challenge is old:
            return
        loaded, challenges = dict(ranker.models.loaded), dict(ranker.challenges)
        _put(loaded, name, model)
        _put(challenges, name, challenge)
        if old is not None and old is not challenge:
            old.stop()
        self._metrics.live(name, model.bundle.version if model else None)
        ranker.use(Models(loaded, ranker.models.refused, self.default.name), ranker.catalogue, challenges)
        self._let_go()

    def _let_go(self) -> None:
        """Note what has been loaded, and let go of what nobody will be ranked with any more."""
        now, before = self._models(), self._held
        if now == before:
            return
        self._held = now
        self._ranker.catalogue.keep({model.bundle.fingerprint for model in now}, {model.towers for model in now})
        for model in before - now:
            self._metrics.reload("dropped")
            self._metrics.no_model(*_labels(model))
            log.info("model %s version %d is let go of", model.name, model.bundle.version)
        for model in now - before:
            self._metrics.reload("loaded")
            self._metrics.model(*_labels(model))
            log.info("model %s version %d is loaded and warm (%s)", model.name, model.bundle.version, model.scorer.provider)

    def _models(self) -> set[Model]:
        challengers = {challenge.model for challenge in self._ranker.challenges.values()} - {None}
        return {*self._ranker.models.loaded.values(), *challengers}  # type: ignore[arg-type]

    def _refuse(self, refused: dict[str, Refused]) -> None:
        for what, reason in refused.items():
            if self._refusals.get(what) != reason:
                log.error("model %s is refused: %s", what, reason.whole)
                self._metrics.reload("refused")
        self._refusals = refused
        ranker, public = self._ranker, {what: reason.public for what, reason in refused.items()}
        ranker.use(Models(ranker.models.loaded, public, self.default.name), ranker.catalogue, ranker.challenges)

    def _say(self, about: str, text: str, level: int = logging.ERROR) -> None:
        """Log it, if it is not what was said last."""
        if self._said.get(about) != text:
            log.log(level, "%s", text)
            self._said[about] = text

    async def _aside(self, act: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        """What it gives, done in the thread of low priority; what takes long there is told, since nothing else can be done about it."""
        timer = asyncio.get_running_loop().call_later(STUCK_SECONDS, self._is_stuck)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._background, act, *arguments)
        finally:
            timer.cancel()
            self.stuck = None

    def _is_stuck(self) -> None:
        self.stuck = (
            f"reading the model repository has taken over {STUCK_SECONDS:g} s, and what is loaded stays; see whether its volume hangs"
        )
        log.error("%s: %s", self.stuck, self._settings.models)


def shared_folder() -> Path | None:
    """The folder of a service with several workers that all of them may write to; `serve` makes it."""
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    return Path(folder) if folder else None


def look(models: Path) -> dict[str, Found]:
    """What the repository has, by model.

    Raises:
        OSError: it cannot be read; one that is not there has nothing.
    """
    homes = sorted(models.iterdir()) if models.exists() else []
    return {home.name: _find(models, home) for home in homes if NAME.fullmatch(home.name) and is_live(home)}


def _find(models: Path, home: Path) -> Found:
    path = wrong = challenger = decision = challenger_wrong = None
    try:
        path = current_path(models, home.name)
    except BundleError as error:
        wrong = Refused.by(error)
    try:
        if challenger := read_challenger(home):
            decision = read_decision(home, challenger)
    except BundleError as error:
        challenger_wrong = Refused.by(error)
    return Found(path, wrong, challenger, challenger_wrong, decision)


def mark_of(path: Path) -> Mark:
    """Name, size and time of each file of a version, and of what it is a link to: it changes when one is mended."""
    found: list[tuple[str, int, int]] = []
    with contextlib.suppress(OSError):
        for entry in os.scandir(path):
            for follow in (False, True):
                with contextlib.suppress(OSError):  # a link to what is not there
                    stat = entry.stat(follow_symlinks=follow)
                    found.append((entry.name, stat.st_size, stat.st_mtime_ns))
    return tuple(sorted(found))


def _tell_others(home: Path, challenger: Challenger, decision: CanaryDecision) -> None:
    try:
        write_decision(home, challenger, decision)
    except OSError as error:
        log.warning("other processes are not told, each will judge for itself: %s", error)


def give_way() -> None:
    """Lower the priority of this thread. Elsewhere than on Linux it would be that of the process."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            thread = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, thread, min(19, os.getpriority(os.PRIO_PROCESS, thread) + NICE))


def _give_back() -> None:
    """Give memory that is free back to the system; glibc keeps what threads have freed, as much as a model takes."""
    with contextlib.suppress(AttributeError, OSError):  # another libc
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def _switching_often() -> Iterator[None]:
    """Let a thread that wants Python's lock have it soon: each request wants it several times."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(usual)


def _put(into: dict[str, Result], name: str, value: Result | None) -> None:
    if value is None:
        into.pop(name, None)
    else:
        into[name] = value


def _labels(model: Model) -> tuple[str, str, str, str]:
    return model.name, str(model.bundle.version), model.scorer.provider, model.bundle.fingerprint
