"""A challenger at work: who is ranked by it, how it does beside the live version, and when it is stopped.

It is judged over the last ten minutes, and over the newest of them that hold enough requests, so that a fault which begins late is
seen soon. A bound counts as left when chance does not explain it: `CERTAIN` standard errors.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import numpy as np

from features.challenger import Bounds, Challenger, Verdict
from features.encode import Feeds
from features.vocabulary import Numbers

from .errors import ScoringError, ServiceError
from .metrics import Metrics
from .models import Model

SLOTS, SLOT_SECONDS = 60, 10.0
FASTEST, STEP, BINS = 1e-5, 1.05, 340
"""Times are counted in bins that are 5 % wide, from 10 µs to 2.5 min."""
CERTAIN = 4.0
"""Each challenger is judged thousands of times, and chance is to stop none."""
AFTER_SECONDS = 0.005
"""From a ranking until its shadow begins: by then the answer has gone out."""
LIVE, CHALLENGING = 0, 1
REQUESTS, ERRORS, CLICKS, SQUARES = range(4)

Sums = np.ndarray[Any, np.dtype[np.float64]]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Period:
    """What the live version (row 0) and the challenger (row 1) did in a period: `sums` `(2, 4)`, `times` `(2, BINS)`."""

    sums: Sums
    times: Sums

    def scored(self, side: int) -> float:
        """Requests that were scored."""
        return float(self.sums[side, REQUESTS] - self.sums[side, ERRORS])

    def p99(self, side: int) -> float:
        """Seconds, to 5 %; 0 where nothing was scored."""
        below = np.cumsum(self.times[side])
        return 0.0 if not below[-1] else FASTEST * STEP ** int(np.searchsorted(below, 0.99 * below[-1]))

    def mean(self, side: int) -> float:
        """p(click) of a request, the mean of its candidates; 0 where nothing was scored."""
        return float(self.sums[side, CLICKS]) / max(1.0, self.scored(side))

    def error(self, side: int) -> float:
        """The standard error of `mean`."""
        count = max(1.0, self.scored(side))
        return math.sqrt(max(0.0, float(self.sums[side, SQUARES]) / count - self.mean(side) ** 2) / count)


class Window:
    """The last ten minutes, in slots."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._slot = clock, int(clock() // SLOT_SECONDS)
        self._sums, self._times = np.zeros((SLOTS, 2, 4)), np.zeros((SLOTS, 2, BINS))

    def scored(self, side: int, seconds: float, p_click: float) -> None:
        """A request was scored in that time, with that mean p(click)."""
        slot = self._now()
        self._sums[slot, side] += (1, 0, p_click, p_click * p_click)
        self._times[slot, side, min(BINS - 1, max(0, math.ceil(math.log(max(seconds, FASTEST) / FASTEST, STEP))))] += 1

    def failed(self) -> None:
        """The challenger failed."""
        self._sums[self._now(), CHALLENGING] += (1, 1, 0, 0)

    def all(self) -> Period:
        """All of it."""
        self._now()
        return Period(self._sums.sum(0), self._times.sum(0))

    def newest(self, requests: int) -> Period:
        """The newest slots that hold so many requests of either version."""
        order = (self._now() - np.arange(SLOTS)) % SLOTS
        counts = self._sums[order, :, REQUESTS].cumsum(0).min(1)
        order = order[: int(np.searchsorted(counts, requests)) + 1]
        return Period(self._sums[order].sum(0), self._times[order].sum(0))

    def _now(self) -> int:
        slot = int(self._clock() // SLOT_SECONDS)
        for passed in range(max(self._slot, slot - SLOTS) + 1, slot + 1):
            self._sums[passed % SLOTS], self._times[passed % SLOTS] = 0, 0
        self._slot = slot
        return slot % SLOTS


def judge(period: Period, bounds: Bounds) -> Verdict | None:
    """Why the challenger is to be stopped, None if it is not."""
    requests, errors = period.sums[CHALLENGING, REQUESTS], period.sums[CHALLENGING, ERRORS]
    if requests < bounds.min_requests:
        return None
    if at_least(errors, requests) > bounds.error_share:
        return Verdict("errors", f"{errors:.0f} of {requests:.0f} requests failed, a share of {bounds.error_share:g} is allowed")
    scored, live = period.scored(CHALLENGING), period.scored(LIVE)
    if min(scored, live) < bounds.min_requests:
        return None
    beside = f"over {scored:.0f} requests, beside {live:.0f} of the live version"
    allowed = period.p99(LIVE) * bounds.p99_ratio
    slow = period.times[CHALLENGING, math.ceil(math.log(max(allowed, FASTEST) / FASTEST, STEP)) + 1 :].sum()
    if at_least(slow, scored) > 0.01:
        p99s = f"{period.p99(CHALLENGING) * 1e3:.3g} ms against {period.p99(LIVE) * 1e3:.3g} ms"
        return Verdict("p99", f"p99 {p99s}, {bounds.p99_ratio:g} times is allowed, {beside}")
    mean, base, (low, high) = period.mean(CHALLENGING), period.mean(LIVE), bounds.p_click_ratio
    for bound, sign in ((low, -1), (high, 1)):
        off = sign * (mean - bound * base)
        if off > CERTAIN * math.hypot(period.error(CHALLENGING), bound * period.error(LIVE)):
            return Verdict("p_click", f"mean p(click) {mean:.4g} against {base:.4g}, {low:g} to {high:g} times is allowed, {beside}")
    return None


def at_least(some: float, of: float) -> float:
    """The least share that explains `some` `of` so many, by Wilson's interval."""
    square, share = CERTAIN**2, some / of
    middle = share + square / (2 * of)
    return float((middle - CERTAIN * math.sqrt(share * (1 - share) / of + square / (4 * of * of))) / (1 + square / of))


class Challenge:
    """A challenger of one process. `model` is None once it was stopped."""

    def __init__(self, name: str, facts: Challenger, model: Model | None, metrics: Metrics, background: Executor) -> None:
        self.name, self.facts, self.model = name, facts, model
        self.verdict: Verdict | None = None
        self._metrics, self._background = metrics, background
        self._window = Window()
        self._shadow: asyncio.Task[None] | None = None
        self._told_failure = False

    def canary(self, user_id: str) -> Model | None:
        """The model to rank this user with in place of the live one, if it is to be."""
        return self.model if self.facts.mode == "canary" and self.facts.takes(self.name, user_id) else None

    def note(self, model: Model, user_id: str, seconds: float, scores: Numbers, encode: Callable[[Model], Feeds]) -> None:
        """A request was ranked by the challenger, or by the live version; in shadow, and if the user falls to it, it is scored again.

        Raises:
            ScoringError: the challenger gave no number for a candidate.
        """
        if model.bundle.version != self.facts.version:
            self._beside(user_id, seconds, scores, encode)
        elif not np.isfinite(scores).all():
            raise ScoringError("the challenger gave no number for a candidate")
        else:
            self._metrics.challenged(self.name, "canary", "ok")
            self._window.scored(CHALLENGING, seconds, float(scores.mean()))

    def failed(self, error: ServiceError) -> None:
        """The challenger failed on a request that the live version could rank."""
        if not self._told_failure:
            log.warning("challenger %s %d failed on a request, and may on more: %s", self.name, self.facts.version, error)
            self._told_failure = True
        self._metrics.challenged(self.name, self.facts.mode, "error")
        self._window.failed()

    def _beside(self, user_id: str, seconds: float, scores: Numbers, encode: Callable[[Model], Feeds]) -> None:
        finite = scores[np.isfinite(scores)]
        if self.model is None or not len(finite):
            return
        if self.facts.mode == "canary":
            self._window.scored(LIVE, seconds, float(finite.mean()))
        elif self.facts.takes(self.name, user_id):
            if self._shadow is not None:
                self._metrics.challenged(self.name, "shadow", "dropped")
                return
            self._shadow = asyncio.create_task(self._score(self.model, seconds, scores, encode))

    async def _score(self, model: Model, live_seconds: float, live: Numbers, encode: Callable[[Model], Feeds]) -> None:
        try:
            await asyncio.sleep(AFTER_SECONDS)
            if self.model is None:
                return
            loop = asyncio.get_running_loop()
            scores, seconds = await loop.run_in_executor(self._background, _timed, model, encode(model))
        except ServiceError as error:
            self.failed(error)
        else:
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

    def judged(self) -> Verdict | None:
        """Why it is to be stopped now, None if it is not, or has been already."""
        if self.model is None:
            return None
        bounds = self.facts.bounds
        return judge(self._window.newest(bounds.min_requests), bounds) or judge(self._window.all(), bounds)

    def stop(self, verdict: Verdict | None = None) -> None:
        """Rank with the live version alone from the next request on; the verdict says why, if the challenger is at fault."""
        self.verdict, self.model = verdict, None

    def told(self) -> dict[str, Any]:
        """What `/v1/models` says of it: as far as this process knows."""
        period = self._window.all()
        live = {"p99_ms": round(period.p99(LIVE) * 1e3, 3), "p_click": period.mean(LIVE), "requests": int(period.scored(LIVE))}
        own = {"p99_ms": round(period.p99(CHALLENGING) * 1e3, 3), "p_click": period.mean(CHALLENGING)}
        counts = {"requests": int(period.sums[CHALLENGING, REQUESTS]), "errors": int(period.sums[CHALLENGING, ERRORS])}
        return {
            "version": str(self.facts.version),
            "mode": self.facts.mode,
            "share": self.facts.share,
            "state": "running" if self.model else "stopped",
            "verdict": None if self.verdict is None else {"reason": self.verdict.reason, "detail": self.verdict.detail},
            "last_10_minutes": {**own, **counts, "live": live},
        }


def _timed(model: Model, feeds: Feeds) -> tuple[Numbers, float]:
    """The scores, and the seconds that they took. On the CPU the thread's own, since it is one of low priority that has to wait."""
    on_device = model.scorer.provider != "CPUExecutionProvider"
    clock = time.perf_counter if on_device else time.thread_time
    began = clock()
    scores = model.scorer.score(feeds)[0]
    return scores, clock() - began
