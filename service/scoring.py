"""Where the model runs: on the event loop, or in threads beside it. Times the stages `queue` and `inference`."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from features.encode import Feeds
from features.vocabulary import Numbers

from .errors import DeadlineError
from .metrics import Stages
from .scorer import Scorer


class Scoring(Protocol):
    """Scores requests with whichever model each is for."""

    async def score(self, scorer: Scorer, feeds: Feeds, stages: Stages, deadline: float | None) -> Numbers:
        """The probabilities `(C,)` of one request's candidates; `deadline` in seconds from the request's beginning.

        Raises:
            DeadlineError: the deadline passed before the model began.
            ScoringError: the model failed.
        """

    def close(self) -> None:
        """Let go of threads."""


class Inline:
    """Runs the model on the event loop, for a worker that scores one request at a time.

    Deliberately against the rule that the loop never blocks: a thread could only let the loop take in requests that then wait for
    the same processor, and handing one over costs more than encoding it. docs/decisions/2026-11-22-request-path.md has the figures.
    """

    async def score(self, scorer: Scorer, feeds: Feeds, stages: Stages, deadline: float | None) -> Numbers:
        """See `Scoring`. Between the slices of a large request others get their turn."""
        stages.enter("queue")
        _check(stages, deadline)
        stages.enter("inference")
        first, *rest = scorer.slices(feeds)
        scores = [scorer.run(first)[0]]
        for some in rest:
            stages.enter("queue")
            await asyncio.sleep(0)
            stages.enter("inference")
            scores.append(scorer.run(some)[0])
        return scores[0] if not rest else np.concatenate(scores)

    def close(self) -> None:
        """See `Scoring`."""


class Pool:
    """Runs models in threads, one request to a thread."""

    def __init__(self, threads: int) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="score")

    async def score(self, scorer: Scorer, feeds: Feeds, stages: Stages, deadline: float | None) -> Numbers:
        """See `Scoring`."""
        stages.enter("queue")
        return await asyncio.get_running_loop().run_in_executor(self._threads, _score, scorer, feeds, stages, deadline)

    def close(self) -> None:
        """See `Scoring`."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _score(scorer: Scorer, feeds: Feeds, stages: Stages, deadline: float | None) -> Numbers:
    _check(stages, deadline)
    stages.enter("inference")
    scores: Numbers = scorer.score(feeds)[0]
    return scores


def _check(stages: Stages, deadline: float | None) -> None:
    if deadline is not None and stages.total > deadline:
        raise DeadlineError("the deadline passed before the candidates were scored")
