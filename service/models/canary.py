"""A challenger at work: who is ranked by it, how it does beside the live version, and when it is stopped.

It runs in a thread of its own and of low priority, and whoever waits for it does so for a bounded time: the live version loses neither
its own thread nor the event loop to a challenger that is slow or hangs. It is judged by what all workers saw over the last ten minutes,
over the newest of them that hold enough requests, so that a fault which begins late is seen soon, and at once where nearly all goes
wrong. A bound counts as left when chance does not explain it: `CERTAIN` standard errors.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from features.challenger import CanaryBounds, CanaryDecision, Challenger
from features.encode import Feeds
from features.vocabulary import Numbers

from ..errors import ScoringError, ServiceError
from ..telemetry.metrics import Metrics
from .evidence import CHALLENGING, ERRORS, LATE, LIVE, REQUESTS, EvidenceWindow, Period
from .loaded import Model

CERTAIN = 4.0
"""Each challenger is judged thousands of times, and chance is to stop none."""
EARLY_REQUESTS, EARLY_SHARE, EARLY_RATIO, EARLY_LIVE = 5, 0.2, 3.0, 20
"""What stops a challenger before it has `min_requests`: so many requests that failed, were late or took so many times what its bound
allows, if they are surely more than this share of all."""
HANGS_SECONDS = 5.0
"""A run that takes so long stops the challenger by itself, however few requests there are."""
WAITS_SECONDS = 0.05
"""How long a thread of low priority may have waited for a processor, or for Python's lock, within one run."""
QUEUED = 8
"""Requests that may wait for the challenger; the live version ranks the others."""
AFTER_SECONDS = 0.005
"""From a ranking until its shadow begins: by then the answer has gone out."""

log = logging.getLogger(__name__)


class LateError(ScoringError):
    """The challenger was not done in time, or too many wait for it already."""


def judge(period: Period, bounds: CanaryBounds) -> CanaryDecision | None:
    """Why the challenger is to be stopped, None if it is not."""
    requests = period.count(CHALLENGING, REQUESTS)
    if requests < bounds.min_requests:
        return None
    for what, reason, did in ((ERRORS, "errors", "failed"), (LATE, "late", f"took over {bounds.max_seconds:g} s")):
        if at_least(period.count(CHALLENGING, what), requests) > bounds.error_share:
            share = f"a share of {bounds.error_share:g} is allowed"
            return CanaryDecision(reason, f"{period.count(CHALLENGING, what):.0f} of {requests:.0f} requests {did}, {share}")  # type: ignore[arg-type]
    scored, live = period.scored(CHALLENGING), period.scored(LIVE)
    if min(scored, live) < bounds.min_requests:
        return None
    beside = f"over {scored:.0f} requests, beside {live:.0f} of the live version"
    if at_least(period.slower(CHALLENGING, period.p99(LIVE) * bounds.p99_ratio), scored) > 0.01:
        p99s = f"{period.p99(CHALLENGING) * 1e3:.3g} ms against {period.p99(LIVE) * 1e3:.3g} ms"
        return CanaryDecision("p99", f"p99 {p99s}, {bounds.p99_ratio:g} times is allowed, {beside}")
    mean, base, (low, high) = period.mean(CHALLENGING), period.mean(LIVE), bounds.p_click_ratio
    for bound, sign in ((low, -1), (high, 1)):
        off = sign * (mean - bound * base)
        if off > CERTAIN * math.hypot(period.error(CHALLENGING), bound * period.error(LIVE)):
            return CanaryDecision("p_click", f"mean p(click) {mean:.4g} against {base:.4g}, {low:g} to {high:g} times is allowed, {beside}")
    return None


def hopeless(period: Period, bounds: CanaryBounds) -> CanaryDecision | None:
    """Why the challenger is to be stopped however few requests it has had, None if it is not."""
    requests, live = period.count(CHALLENGING, REQUESTS), period.scored(LIVE)
    allowed = period.p99(LIVE) * bounds.p99_ratio * EARLY_RATIO
    wrong = {
        "errors": period.count(CHALLENGING, ERRORS),
        "late": period.count(CHALLENGING, LATE),
        "p99": period.slower(CHALLENGING, allowed) if live >= EARLY_LIVE else 0.0,
    }
    if sum(wrong.values()) < EARLY_REQUESTS or at_least(sum(wrong.values()), requests) <= max(EARLY_SHARE, bounds.error_share):
        return None
    reason = max(wrong, key=lambda each: wrong[each])
    slow = f"{wrong['p99']:.0f} took over {allowed * 1e3:.3g} ms, {EARLY_RATIO:g} times what is allowed beside the live version"
    did = f"{wrong['errors']:.0f} failed, {wrong['late']:.0f} took over {bounds.max_seconds:g} s, {slow}"
    return CanaryDecision(reason, f"of its first {requests:.0f} requests {did}")  # type: ignore[arg-type]


def at_least(some: float, of: float) -> float:
    """The least share that explains `some` `of` so many, by Wilson's interval."""
    square, share = CERTAIN**2, some / of
    middle = share + square / (2 * of)
    return float((middle - CERTAIN * math.sqrt(share * (1 - share) / of + square / (4 * of * of))) / (1 + square / of))


@dataclass(eq=False)
class ChallengerRun:
    """A request that the challenger scores: the work, when it was asked for, and whether that is too long ago."""

    work: "Future[tuple[Numbers, float]]"
    counts: bool = True
    """Whether what comes of it is evidence; not where a request names the version."""
    since: float = field(default_factory=time.monotonic)
    late: bool = False


class Challenge:
    """A challenger of one process. `model` is None once it was stopped."""

    def __init__(self, name: str, facts: Challenger, model: Model | None, metrics: Metrics, folder: Path | None = None) -> None:
        """`folder` is that which the workers of a service share."""
        self.name, self.facts, self.model = name, facts, model
        self.decision: CanaryDecision | None = None
        self._metrics = metrics
        key = f"{name}.{facts.version}.{facts.mark}"
        self._decision_mark = folder / f"{key}.verdict" if folder else None
        self._window = EvidenceWindow(folder=folder, key=key)
        self._thread: Executor | None = None
        self._runs: set[ChallengerRun] = set()
        self._shadow: asyncio.Task[None] | None = None
        self._failure_logged = False

    def begin(self, thread: Executor) -> None:
        """Run in this thread, which ends with the challenger."""
        self._thread = thread

    def canary(self, user_id: str) -> Model | None:
        """The model to rank this user with in place of the live one, if it is to be."""
        return self.model if self.facts.mode == "canary" and self.facts.takes(self.name, user_id) else None

    async def score(self, model: Model, feeds: Feeds, patience: float | None, counts: bool = True) -> Numbers:
        """The probabilities `(C,)` of a request's candidates, within the challenger's `max_seconds`, and within `patience` seconds.
        It `counts` for the challenger's judgement unless the request named the version; a run that hangs counts whoever asked for it.

        Raises:
            LateError: it was not done by then, and goes on for nobody; or others wait for it already; or it was stopped meanwhile.
            ScoringError: it failed, or gave no number for a candidate.
        """
        if len(self._runs) >= QUEUED:
            if counts:
                self._metrics.challenged(self.name, self.facts.mode, "busy")
            raise LateError("others wait for the challenger already")
        run, longest = self._run(model, feeds, counts), self.facts.bounds.max_seconds
        done = asyncio.wrap_future(run.work)
        await asyncio.wait([done], timeout=longest if patience is None else max(0.0, min(longest, patience)))
        if done.cancelled():
            raise LateError("the challenger was stopped before it had begun")
        if done.done():
            scores, _ = done.result()
            if not np.isfinite(scores).all():
                raise ScoringError("the challenger gave no number for a candidate")
            return scores
        done.add_done_callback(_no_matter)
        if patience is None or patience >= longest:
            self._is_late(run)
        run.work.cancel()  # if it has not begun
        raise LateError(f"the challenger took over {longest:g} s, or what the caller's deadline leaves it")

    def _run(self, model: Model, feeds: Feeds, counts: bool = True) -> ChallengerRun:
        """Begin to score, and count what comes of it, whether somebody waits for it or not."""
        assert self._thread is not None  # noqa: S101  # whoever gives it a model gives it a thread
        loop = asyncio.get_running_loop()
        run = ChallengerRun(self._thread.submit(_timed, model, feeds), counts)
        self._runs.add(run)
        timer = loop.call_later(self.facts.bounds.max_seconds, self._is_late, run)

        def ended(work: "asyncio.Future[tuple[Numbers, float]]") -> None:
            timer.cancel()
            self._runs.discard(run)
            if not (work.cancelled() or work.exception() or run.late) and run.counts and self.facts.mode == "canary":
                scores, seconds = work.result()
                if np.isfinite(scores).all():
                    self._metrics.challenged(self.name, "canary", "ok")
                    self._window.scored(CHALLENGING, seconds, float(scores.mean()))

        asyncio.wrap_future(run.work).add_done_callback(ended)
        return run

    def _is_late(self, run: ChallengerRun) -> None:
        if run.counts and not run.late:
            run.late = True
            self._metrics.challenged(self.name, self.facts.mode, "late")
            self._window.failed(LATE)

    def failed(self, error: ServiceError) -> None:
        """The challenger failed on a request that the live version could rank."""
        if isinstance(error, LateError):  # which has been counted
            return
        if not self._failure_logged:
            log.warning("challenger %s %d failed on a request, and may on more: %s", self.name, self.facts.version, error)
            self._failure_logged = True
        self._metrics.challenged(self.name, self.facts.mode, "error")
        self._window.failed()

    def beside(self, user_id: str, seconds: float, scores: Numbers, encode: Callable[[Model], Feeds]) -> None:
        """A request was ranked by the live version; in shadow, and if the user falls to it, the challenger scores it too."""
        finite = scores[np.isfinite(scores)]
        if self.model is None or not len(finite):
            return
        if self.facts.mode == "canary":
            self._window.scored(LIVE, seconds, float(finite.mean()))
        elif self.facts.takes(self.name, user_id):
            if self._shadow is not None:
                self._metrics.challenged(self.name, "shadow", "dropped")
                return
            self._shadow = asyncio.create_task(self._score_beside(self.model, seconds, scores, encode))

    async def _score_beside(self, model: Model, live_seconds: float, live: Numbers, encode: Callable[[Model], Feeds]) -> None:
        try:
            await asyncio.sleep(AFTER_SECONDS)
            if self.model is None:
                return
            run = self._run(model, encode(model))
            scores, seconds = await asyncio.wrap_future(run.work)
        except ServiceError as error:
            self.failed(error)
        else:
            if not run.late:
                self._compare(live_seconds, live, seconds, scores)
        finally:
            self._shadow = None

    def _compare(self, live_seconds: float, live: Numbers, seconds: float, scores: Numbers) -> None:
        both = np.isfinite(live)
        if not np.isfinite(scores[both]).all():
            self.failed(ScoringError("it gave no number for a candidate"))
            return
        self._metrics.challenged(self.name, "shadow", "ok")
        self._metrics.shadow(self.name, np.abs(scores[both] - live[both]))
        self._window.scored(LIVE, live_seconds, float(live[both].mean()))
        self._window.scored(CHALLENGING, seconds, float(scores[both].mean()))

    def judged(self) -> CanaryDecision | None:
        """Why it is to be stopped now, None if it is not, or has been already."""
        if self.model is None:
            return None
        bounds, window = self.facts.bounds, self._window
        if (hangs := max((time.monotonic() - run.since for run in self._runs), default=0.0)) > HANGS_SECONDS:
            return CanaryDecision("late", f"a run has taken {hangs:.1f} s, {bounds.max_seconds:g} s are allowed")
        just_now, newest, all_ = window.periods(EARLY_REQUESTS, bounds.min_requests)
        return hopeless(just_now, bounds) or hopeless(all_, bounds) or judge(newest, bounds) or judge(all_, bounds)

    def stop(self, decision: CanaryDecision | None = None) -> None:
        """Rank with the live version alone from the next request on; the decision says why, if the challenger is at fault."""
        self.decision, self.model = decision, None
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
        self._window.close()

    def first_to_stop(self) -> bool:
        """Whether no other worker has stopped it before: it is counted once."""
        if self._decision_mark is None:
            return True
        try:
            self._decision_mark.touch(exist_ok=False)
        except FileExistsError:
            return False
        except OSError:
            return True
        return True

    def as_dict(self) -> dict[str, Any]:
        """What `/v1/models` says of it: its bounds, and what all workers of this service have seen."""
        period, bounds = self._window.all(), self.facts.bounds
        live = {"p99_ms": round(period.p99(LIVE) * 1e3, 3), "p_click": period.mean(LIVE), "requests": int(period.scored(LIVE))}
        own = {"p99_ms": round(period.p99(CHALLENGING) * 1e3, 3), "p_click": period.mean(CHALLENGING)}
        counts = {what: int(period.count(CHALLENGING, of)) for what, of in (("requests", REQUESTS), ("errors", ERRORS), ("late", LATE))}
        return {
            "version": str(self.facts.version),
            "mode": self.facts.mode,
            "share": self.facts.share,
            "since": self.facts.since,
            "state": "running" if self.model else "stopped",
            "verdict": None if self.decision is None else {"reason": self.decision.reason, "detail": self.decision.detail},
            "bounds": {**asdict(bounds), "p_click_ratio": list(bounds.p_click_ratio)},
            "last_10_minutes": {**own, **counts, "live": live},
        }


def _no_matter(work: "asyncio.Future[Any]") -> None:
    """What becomes of a run that nobody waits for."""
    if not work.cancelled():
        work.exception()


def _timed(model: Model, feeds: Feeds) -> tuple[Numbers, float]:
    """The scores, and the seconds that they took.

    Where one thread of a processor scores, its own time, as it has to wait for others; unless it waited longer than that explains.
    """
    began, busy = time.perf_counter(), time.thread_time()
    scores = model.scorer.score(feeds)[0]
    took, busy = time.perf_counter() - began, time.thread_time() - busy
    alone = model.scorer.provider == "CPUExecutionProvider" and model.scorer.threads == 1
    return scores, busy if alone and took - busy < WAITS_SECONDS else took
