"""What a measurement was to be, and what was measured: counts, and exact percentiles, since all latencies are kept."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

PERCENTILES = (50, 90, 99, 99.9)
LATE_SECONDS = 0.001
"""A generator whose own delay at p99 is above this, and above a tenth of the latency at p99, did not keep its schedule."""


@dataclass(frozen=True)
class LoadPlan:
    """What to measure: requests a second for an open loop, None for a closed one; the window comes after the warm-up."""

    rate: float | None
    seconds: float
    warm_up: float
    connections: int


@dataclass
class Measured:
    """What was measured in the window."""

    plan: LoadPlan
    latencies: np.ndarray[Any, np.dtype[np.float64]]
    """Seconds, of answers with status 200; one that never came counts with the time that it was waited for."""
    statuses: Counter[str]
    degraded: int
    broken: int
    """Connections that the service closed while they waited for an answer."""
    unanswered: int
    answered: int
    """All answers, those outside the window too."""
    window: float
    """Seconds."""
    delays: np.ndarray[Any, np.dtype[np.float64]]
    """Seconds that the generator looked late at each request of an open loop, though a connection was free for it."""
    cpu: float
    """Seconds of this process's CPU time a request."""
    interrupted: bool

    @property
    def requests_per_second(self) -> float:
        """Answers with status 200."""
        return self.statuses["200"] / self.window if self.window > 0 else 0.0

    @property
    def errors(self) -> int:
        """Requests without an answer of status 200."""
        return self.statuses.total() - self.statuses["200"] + self.broken + self.unanswered

    @property
    def late(self) -> bool:
        """Whether the generator did not keep its own schedule, so that the latencies are partly its own."""
        delay = percentile(self.delays, 99)
        return delay > LATE_SECONDS and delay > 0.1 * percentile(self.latencies, 99)

    def as_dict(self) -> dict[str, Any]:
        """As plain values; times in milliseconds unless named otherwise."""
        return {
            "loop": "closed" if self.plan.rate is None else "open",
            "rate": self.plan.rate,
            "connections": self.plan.connections,
            "window_s": round(self.window, 3),
            "requests_per_s": round(self.requests_per_second, 2),
            **{f"p{p:g}_ms": round(percentile(self.latencies, p) * 1e3, 3) for p in PERCENTILES},
            "max_ms": round(float(self.latencies.max(initial=0.0)) * 1e3, 3),
            "answers": self.statuses["200"],
            "errors": self.errors,
            "statuses": dict(self.statuses),
            "broken": self.broken,
            "unanswered": self.unanswered,
            "degraded": self.degraded,
            "delay_p99_ms": round(percentile(self.delays, 99) * 1e3, 3),
            "late": self.late,
            "generator_cpu_us": round(self.cpu * 1e6, 1),
            "interrupted": self.interrupted,
        }


def percentile(values: np.ndarray[Any, np.dtype[np.float64]], p: float) -> float:
    """The smallest value that at least `p` percent of them do not exceed: exact, one that was seen. 0 where there are none."""
    return float(np.quantile(values, p / 100, method="inverted_cdf")) if len(values) else 0.0
