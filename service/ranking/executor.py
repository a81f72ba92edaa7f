"""Where the model runs: on the event loop, or in threads beside it. Times the stages `queue` and `inference`."""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from features.encode import Feeds
from features.vocabulary import Numbers

from ..errors import DeadlineError
from ..telemetry.metrics import RequestTimings
from .scorer import Scorer

TOGETHER = 1_024
"""Candidates after which answers go out before more are scored: the first to be scored waits for the last."""


class Scoring(Protocol):
    """Scores requests with whichever model each is for."""

    async def score(self, scorer: Scorer, feeds: Feeds, stages: RequestTimings, deadline: float | None) -> Numbers:
        """The probabilities `(C,)` of one request's candidates, or `(C, H)`; `deadline` in seconds from the request's beginning.

        Raises:
            DeadlineError: the deadline passed before the model began.
            ScoringError: the model failed.
        """

    def close(self) -> None:
        """Let go of threads."""


@dataclass(eq=False, slots=True)
class _Waiting:
    """A request, or a slice of one, that waits for its turn; `scores` is cancelled when its caller leaves."""

    scorer: Scorer
    feeds: Feeds
    stages: RequestTimings
    deadline: float | None
    scores: "asyncio.Future[Numbers]"


class Inline:
    """Runs the model on the event loop, for a worker that scores one request at a time.

    Deliberately against the rule that the loop never blocks: a thread could only let the loop take in requests that then wait for
    the same processor, and handing one over costs more than encoding it. docs/decisions/2026-11-22-request-path.md has the figures.
    Requests that are ready together are scored one right after the other: each run of a model throws the program out of the
    caches, and the program the model.
    """

    def __init__(self) -> None:
        self._waiting: deque[_Waiting] = deque()

    async def score(self, scorer: Scorer, feeds: Feeds, stages: RequestTimings, deadline: float | None) -> Numbers:
        """See `Scoring`."""
        stages.enter("queue")
        parts = [await self._in_turn(scorer, some, stages, deadline) for some in scorer.slices(feeds)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _in_turn(self, scorer: Scorer, feeds: Feeds, stages: RequestTimings, deadline: float | None) -> "asyncio.Future[Numbers]":
        loop = asyncio.get_running_loop()
        if not self._waiting:
            loop.call_soon(self._turn)  # after those that the loop has ready now
        waiting = _Waiting(scorer, feeds, stages, deadline, loop.create_future())
        self._waiting.append(waiting)
        return waiting.scores

    def _turn(self) -> None:
        room = TOGETHER
        while self._waiting and room > 0:
            waiting = self._waiting.popleft()
            if waiting.scores.done():  # its caller has left
                continue
            try:
                scores = _score(waiting.scorer.run, waiting.feeds, waiting.stages, waiting.deadline)
            except Exception as error:  # noqa: BLE001  # the caller's to raise, as from a thread
                waiting.scores.set_exception(error)
            else:
                waiting.stages.enter("queue")
                waiting.scores.set_result(scores)
                room -= len(scores)
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._turn)

    def close(self) -> None:
        """See `Scoring`."""


class Pool:
    """Runs models in threads, one request to a thread."""

    def __init__(self, threads: int) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="score")

    async def score(self, scorer: Scorer, feeds: Feeds, stages: RequestTimings, deadline: float | None) -> Numbers:
        """See `Scoring`."""
        stages.enter("queue")
        return await asyncio.get_running_loop().run_in_executor(self._threads, _score, scorer.score, feeds, stages, deadline)

    def close(self) -> None:
        """See `Scoring`."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _score(score: Callable[[Feeds], Numbers], feeds: Feeds, stages: RequestTimings, deadline: float | None) -> Numbers:
    if deadline is not None and stages.total > deadline:
        raise DeadlineError("the deadline passed before the candidates were scored")
    stages.enter("inference")
    scores: Numbers = score(feeds)[0]
    return scores
