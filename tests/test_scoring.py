"""Where the model runs: what the event loop gets to do meanwhile, and what the stages say."""

import asyncio

import bundles
import numpy as np
import pytest

from features.bundle import MODEL
from features.encode import AdTable, Request, encode_request
from features.state import Ad
from service.catalogue import put_ads
from service.errors import DeadlineError
from service.metrics import Stages
from service.scorer import SLICE, Scorer
from service.scoring import Inline, Pool

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
    scoring, stages = make(), Stages("/rank")
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
    await Inline().score(scorer, feeds(4 * SLICE), Stages("/rank"), None)
    task.cancel()
    assert len(turns) >= 3


@pytest.mark.parametrize("make", [Inline, lambda: Pool(1)], ids=["inline", "pool"])
async def test_a_deadline_that_has_passed_is_told_before_the_model_runs(scorer, make):
    stages = Stages("/rank")
    await asyncio.sleep(0.01)
    with pytest.raises(DeadlineError):
        await make().score(scorer, feeds(5), stages, 0.005)
    assert "inference" not in stages.seconds
