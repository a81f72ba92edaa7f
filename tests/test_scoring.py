"""Where the model runs: what the event loop gets to do meanwhile, and what the stages say."""

import asyncio

import bundles
import numpy as np
import pytest

from features.bundle import MODEL
from features.encode import AdTable, Request, encode_request
from features.state import Ad
from service.catalogue.catalogue import put_ads
from service.errors import DeadlineError, ScoringError
from service.ranking.executor import TOGETHER, Inline, Pool
from service.ranking.scorer import SLICE, Scorer
from service.telemetry.metrics import RequestTimings

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def scorer(repository):
    return Scorer(next((repository / "din").glob("2*")) / MODEL, "cpu", 1)


def feeds(count):
    table = AdTable(bundles.encoder())
    put_ads(table, [Ad(ad_id, features) for ad_id, features in bundles.ADS.items()])
    return encode_request(table, Request("u1", {}, {}, ["a1", "a2"], [f"a{i}" for i in range(count)]))[0]


@pytest.mark.parametrize("count", [1, SLICE, SLICE + 1, 3 * SLICE])
@pytest.mark.parametrize("make", [Inline, lambda: Pool(2)], ids=["inline", "pool"])
async def test_scores_are_the_models_whatever_the_size(scorer, make, count):
    scoring, stages = make(), RequestTimings("/rank")
    scores = await scoring.score(scorer, feeds(count), stages, None)
    scoring.close()
    stages.enter(None)
    assert np.array_equal(scores, bundles.expected(feeds(count))[0]) or np.abs(scores - bundles.expected(feeds(count))[0]).max() < 1e-6
    assert {"queue", "inference"} <= stages.seconds.keys()


async def test_others_get_their_turn_between_slices(scorer):
    turns = []

    async def other():
        while True:
            turns.append(1)
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    await Inline().score(scorer, feeds(4 * SLICE), RequestTimings("/rank"), None)
    task.cancel()
    assert len(turns) >= 3


@pytest.mark.parametrize("make", [Inline, lambda: Pool(1)], ids=["inline", "pool"])
async def test_a_deadline_that_has_passed_is_told_before_the_model_runs(scorer, make):
    stages = RequestTimings("/rank")
    await asyncio.sleep(0.01)
    with pytest.raises(DeadlineError):
        await make().score(scorer, feeds(5), stages, 0.005)
    assert "inference" not in stages.seconds


class Recording:
    """A scorer that tells when it ran."""

    def __init__(self, scorer):
        self._scorer, self.runs, self.failing = scorer, [], set()

    def slices(self, feeds):
        return self._scorer.slices(feeds)

    def run(self, feeds):
        self.runs.append(feeds["ad_ids"].shape[1])
        if self.runs[-1] in self.failing:
            raise ScoringError("the model failed")
        return self._scorer.run(feeds)


async def asked(inline, recording, counts, deadline=None):
    """Requests of so many candidates at the same time, and what became of each."""
    return await asyncio.gather(
        *(inline.score(recording, feeds(count), RequestTimings("/rank"), deadline) for count in counts), return_exceptions=True
    )


async def test_each_of_several_gets_its_own_scores_and_its_own_error(scorer):
    recording = Recording(scorer)
    recording.failing = {7}
    answers = await asked(Inline(), recording, [3, 7, 5])
    assert isinstance(answers[1], ScoringError)
    for count, answer in ((3, answers[0]), (5, answers[2])):
        assert np.abs(answer - bundles.expected(feeds(count))[0]).max() < 1e-6
    assert recording.runs == [3, 7, 5]


async def test_those_that_are_ready_are_scored_before_any_is_answered_up_to_a_limit(scorer):
    recording, order = Recording(scorer), []
    inline = Inline()

    async def one(count):
        await inline.score(recording, feeds(count), RequestTimings("/rank"), None)
        order.append((count, len(recording.runs)))

    assert TOGETHER == 1_024
    await asyncio.gather(*(one(count) for count in (500, 500, 30, 40)))
    assert order == [(500, 3), (500, 3), (30, 3), (40, 4)]


async def test_a_caller_who_left_is_not_scored(scorer):
    recording, inline = Recording(scorer), Inline()
    leaving = asyncio.create_task(inline.score(recording, feeds(9), RequestTimings("/rank"), None))
    staying = asyncio.create_task(inline.score(recording, feeds(4), RequestTimings("/rank"), None))
    asyncio.get_running_loop().call_soon(leaving.cancel)
    await staying
    with pytest.raises(asyncio.CancelledError):
        await leaving
    assert 4 in recording.runs
    assert len(await inline.score(recording, feeds(2), RequestTimings("/rank"), None)) == 2
