"""The exported graph alone: processes that do nothing but score, which no service on the same processors can be faster than.

Imports no torch, so that its processes start at once.
"""

import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path

from features.encode import Feeds
from service.ranking.scorer import Scorer

WARM_RUNS = 3


@dataclass(frozen=True)
class Pace:
    """Requests a second of all processes together, and CPU seconds of a request."""

    requests_per_second: float
    cpu: float


class Bare:
    """Processes that hold the graph, of one thread each. A context manager: they end with the block."""

    def __init__(self, graph: Path, processes: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._processes = processes
        self._pool = ProcessPoolExecutor(processes, context, _load, (graph, context.Barrier(processes)))

    def __enter__(self) -> "Bare":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def measure(self, requests: Sequence[Feeds], seconds: float) -> Pace:
        """Score the requests in turn, all processes at once, for that long."""
        found = [task.result() for task in [self._pool.submit(_work, requests, seconds) for _ in range(self._processes)]]
        return Pace(sum(runs / wall for runs, wall, _ in found), sum(cpu for *_, cpu in found) / sum(runs for runs, *_ in found))


_mine: tuple[Scorer, Barrier]
"""What a process of the pool holds."""


def _load(graph: Path, barrier: Barrier) -> None:
    global _mine  # noqa: PLW0603  # a pool's initializer has no other place
    _mine = Scorer(graph, "cpu", 1), barrier


def _work(requests: Sequence[Feeds], seconds: float) -> tuple[int, float, float]:
    scorer, barrier = _mine
    for feeds in requests[:WARM_RUNS]:
        scorer.score(feeds)
    barrier.wait()  # one task a process, all at the same time
    began, cpu, runs = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - began < seconds:
        scorer.score(requests[runs % len(requests)])
        runs += 1
    return runs, time.perf_counter() - began, time.process_time() - cpu
