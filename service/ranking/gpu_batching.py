"""Merges requests into runs of a model, for a device on which a run of many costs about as much as a run of one.

Knows nothing about tensors but how many tiles a request takes.
"""

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from features.encode import Feeds
from features.vocabulary import Numbers

from ..errors import DeadlineError, OverLimitError, ScoringError, ServiceError
from ..telemetry.metrics import Metrics, RequestTimings
from .scorer import Scorer, TiledScorer
from .tiles import MOST, TILE, candidates_of, tiles_of

WAIT_SECONDS = 0.001
"""How long the first request of a batch waits for others while the device has nothing to do."""
EARLY_SECONDS = 0.002
"""How long before a deadline a batch begins at the latest, or as long as the last one took."""
QUEUE_TILES = 8 * MOST


@dataclass(eq=False, slots=True)
class Waiting:
    """A request that waits. Times are `time.perf_counter()`'s; `answer` is cancelled when its caller leaves."""

    feeds: Feeds
    tiles: int
    stages: RequestTimings
    since: float
    until: float | None
    answer: "asyncio.Future[Numbers]"


class BatchQueue:
    """Requests that wait for one model. `busy_seconds` is what its last run took."""

    def __init__(self) -> None:
        self.waiting: deque[Waiting] = deque()
        self.tiles = 0
        self.came = asyncio.Event()
        self.busy_seconds = 0.0

    def add(self, request: Waiting) -> None:
        """Let a request wait."""
        self.waiting.append(request)
        self.tiles += request.tiles
        self.came.set()

    def due(self) -> tuple[float, str]:
        """When to run what waits, and why then: after the wait, or in time for the deadline that is nearest."""
        nearest = min((request.until for request in self.waiting if request.until is not None), default=float("inf"))
        early = max(EARLY_SECONDS, self.busy_seconds)
        return min((self.waiting[0].since + WAIT_SECONDS, "timer"), (nearest - early, "deadline"))

    def take(self) -> list[Waiting]:
        """The next batch, the first come first: requests of at most `MOST` tiles, or one that is larger."""
        batch: list[Waiting] = []
        room = MOST
        while self.waiting and (self.waiting[0].tiles <= room or not batch):
            request = self.waiting.popleft()
            self.tiles -= request.tiles
            if request.answer.done():  # its caller has left
                continue
            if request.until is not None and time.perf_counter() > request.until:
                request.answer.set_exception(DeadlineError("the deadline passed before the candidates were scored"))
                continue
            batch.append(request)
            room -= request.tiles
        return batch


class Batcher:
    """Scores requests in batches: while one runs, the next one gathers. For one event loop."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._queues: dict[TiledScorer, BatchQueue] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def score(self, scorer: Scorer, feeds: Feeds, stages: RequestTimings, deadline: float | None) -> Numbers:
        """The probabilities `(C,)` of a request; `deadline` in seconds from its beginning.

        Raises:
            OverLimitError: too much waits already.
            DeadlineError: the deadline passed before the run began.
            ScoringError: the model failed on the batch.
        """
        assert isinstance(scorer, TiledScorer)  # noqa: S101  # models.py loads no other for a device that is batched for
        stages.enter(None)  # the batch tells how long its requests waited and were scored
        tiles = tiles_of(feeds)
        queued = sum(queue.tiles for queue in self._queues.values())
        if queued and queued + tiles > QUEUE_TILES:
            raise OverLimitError(f"{queued * TILE} candidates wait to be scored already; try again")
        until = None if deadline is None else stages.began + deadline
        answer: asyncio.Future[Numbers] = asyncio.get_running_loop().create_future()
        if scorer not in self._queues:
            self._queues[scorer] = BatchQueue()
            task = asyncio.create_task(self._serve(scorer, self._queues[scorer]))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        self._queues[scorer].add(Waiting(feeds, tiles, stages, time.perf_counter(), until, answer))
        return await answer

    def close(self) -> None:
        """Give up what waits."""
        for task in self._tasks:
            task.cancel()
        for queue in self._queues.values():
            _give_up(queue.waiting)

    async def _serve(self, scorer: TiledScorer, queue: BatchQueue) -> None:
        """Run what comes for one model, until nothing does: a model that was replaced is not kept."""
        batch: list[Waiting] = []
        try:
            reason = await _gathered(queue)
            while batch := queue.take():
                await self._run(scorer, queue, batch, reason)
                reason = "full" if queue.tiles >= MOST else "idle"
        finally:
            del self._queues[scorer]
            _give_up((*batch, *queue.waiting))  # none, unless this task was cancelled or has a fault

    async def _run(self, scorer: TiledScorer, queue: BatchQueue, batch: Sequence[Waiting], reason: str) -> None:
        began = time.perf_counter()
        self._metrics.batch(sum(candidates_of(request.feeds) for request in batch), reason)
        for request in batch:
            request.stages.add("queue", request.since, began)
        run = asyncio.wrap_future(scorer.submit([request.feeds for request in batch]))
        await asyncio.wait([run])
        queue.busy_seconds = time.perf_counter() - began
        error = run.exception()
        for i, request in enumerate(batch):
            request.stages.add("inference", began, began + queue.busy_seconds)
            if request.answer.done():  # its caller has left
                continue
            if error is None:
                request.answer.set_result(run.result()[i][0])
            else:  # each caller its own, since raising one adds to its traceback
                request.answer.set_exception(type(error)(error.detail) if isinstance(error, ServiceError) else error)


def _give_up(requests: Iterable[Waiting]) -> None:
    for request in requests:
        if not request.answer.done():
            request.answer.set_exception(ScoringError("scoring was given up; the service is ending or has a fault"))


async def _gathered(queue: BatchQueue) -> str:
    """Wait until the device, which is idle, should begin; why then."""
    while queue.tiles < MOST:
        at, reason = queue.due()
        left = at - time.perf_counter()
        if left <= 0:
            return reason
        queue.came.clear()
        try:
            async with asyncio.timeout(left):
                await queue.came.wait()
        except TimeoutError:
            return reason
    return "full"
