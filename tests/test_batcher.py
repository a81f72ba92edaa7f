import asyncio
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import bundles
import numpy as np
import pytest
from conftest import until
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scorer import feeds

from service.app import _scoring
from service.errors import DeadlineError, OverLimitError, ScoringError
from service.ranking import gpu_batching as module
from service.ranking.executor import Inline
from service.ranking.gpu_batching import QUEUE_TILES, Batcher
from service.ranking.scorer import TiledScorer
from service.ranking.tiles import MOST, TILE
from service.settings import Settings
from service.telemetry.metrics import Metrics, RequestTimings

pytestmark = pytest.mark.anyio


class Failing(TiledScorer):
    """A model that fails on some of its runs, as told in advance."""

    def __init__(self, scorer, runs):
        self.scorer, self.runs = scorer, list(runs)

    def submit(self, requests):
        if self.runs and self.runs.pop():
            failed = Future()
            failed.set_exception(ScoringError("the model failed: as it was told to"))
            return failed
        return self.scorer.submit(requests)


class Held(TiledScorer):
    """A model that begins no run until it is let go, and notes the candidates of each."""

    def __init__(self, scorer):
        self.scorer, self.go, self.begun, self.sizes = scorer, threading.Event(), threading.Event(), []
        self._thread = ThreadPoolExecutor(1)

    def submit(self, requests):
        self.sizes.append([request["ad_ids"].shape[1] for request in requests])
        return self._thread.submit(self._run, requests)

    def _run(self, requests):
        self.begun.set()
        assert self.go.wait(90)
        return self.scorer.submit(requests).result()


@pytest.fixture(scope="module")
def scorers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batcher")
    for bias in (0, 1):
        (folder / f"{bias}.onnx").write_bytes(bundles.model(bias))
    return [TiledScorer(folder / f"{bias}.onnx", "cpu", 5) for bias in (0, 1)]


@pytest.fixture
def held(scorers):
    held = Held(scorers[0])
    yield held
    held.go.set()


def request(candidates, behaviours=2, seed=0):
    return feeds([f"a{seed}-{i}" for i in range(candidates)], [f"a{seed + i}" for i in range(behaviours)])


def counted(metrics):
    """Batches by why they began, and all candidates that were in them."""
    text = metrics.exposition().decode()
    rows = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if not line.startswith("#")}
    reasons = {name.split('"')[1]: int(count) for name, count in rows.items() if name.startswith("adrank_batch_flush_total{") and count}
    assert sum(reasons.values()) == rows["adrank_batch_rows_count"]
    return reasons, int(rows["adrank_batch_rows_sum"])


MILLISECONDS = st.integers(0, 3)
REQUESTS = st.lists(
    st.fixed_dictionaries(
        {
            "candidates": st.integers(1, 300),
            "behaviours": st.integers(0, 5),
            "model": st.integers(0, 1),
            "comes": MILLISECONDS,
            "leaves": st.none() | MILLISECONDS,
            "deadline": st.none() | st.sampled_from([0.0, 0.002, 30.0]),
        }
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=25)
@given(REQUESTS, st.lists(st.booleans(), max_size=4), st.booleans())
def test_each_caller_gets_what_it_would_get_alone(scorers, requests, failing, small):
    """Whoever comes, leaves or is late, and whatever fails: each answer is that of the request's own model, user and candidates."""

    async def ask(batcher, models, seed, wanted):
        tensors = request(wanted["candidates"], wanted["behaviours"], seed)
        await asyncio.sleep(wanted["comes"] / 1000)
        scores = await batcher.score(models[wanted["model"]], tensors, RequestTimings("/rank"), wanted["deadline"])
        np.testing.assert_allclose(scores, bundles.expected(tensors, wanted["model"])[0], atol=1e-6)

    async def everything():
        batcher, models = Batcher(Metrics()), [Failing(scorer, failing) for scorer in scorers]
        tasks = [asyncio.create_task(ask(batcher, models, seed, wanted)) for seed, wanted in enumerate(requests)]
        for task, wanted in zip(tasks, requests, strict=True):
            if wanted["leaves"] is not None:
                asyncio.get_running_loop().call_later(wanted["leaves"] / 1000, task.cancel)
        outcomes = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 30)
        for outcome, wanted in zip(outcomes, requests, strict=True):
            allowed = {
                asyncio.CancelledError: wanted["leaves"] is not None,
                DeadlineError: wanted["deadline"] in (0.0, 0.002),
                ScoringError: any(failing),
                type(None): True,
            }
            assert allowed.get(type(outcome)), outcome
        await until(lambda: not batcher._tasks)  # a batch that all have left still ends
        assert batcher._queues == {}

    with pytest.MonkeyPatch.context() as patch:
        if small:  # so that batches fill
            patch.setattr(module, "MOST", 4)
        asyncio.run(everything())


async def begun(held):
    await until(held.begun.is_set)


async def test_what_comes_during_a_run_is_the_next_batch(held):
    metrics = Metrics()
    batcher = Batcher(metrics)
    first = asyncio.create_task(batcher.score(held, request(5), RequestTimings("/rank"), None))
    await begun(held)
    others = [asyncio.create_task(batcher.score(held, request(i, seed=i), RequestTimings("/rank"), None)) for i in (7, 8, 9)]
    await asyncio.sleep(0.01)
    assert held.sizes == [[5]]
    held.go.set()
    assert [scores.shape for scores in await asyncio.gather(first, *others)] == [(5,), (7,), (8,), (9,)]
    assert held.sizes == [[5], [7, 8, 9]]
    assert counted(metrics) == ({"timer": 1, "idle": 1}, 29)


async def test_a_full_batch_does_not_wait(scorers, monkeypatch):
    monkeypatch.setattr(module, "WAIT_SECONDS", 30)
    metrics = Metrics()
    batcher = Batcher(metrics)
    asking = [batcher.score(scorers[0], request(TILE + 1, seed=i), RequestTimings("/rank"), None) for i in range(MOST // 2)]
    await asyncio.wait_for(asyncio.gather(*asking), 20)
    assert counted(metrics) == ({"full": 1}, (TILE + 1) * (MOST // 2))


async def test_a_request_larger_than_a_batch_is_scored_whole(scorers):
    batcher, large = Batcher(Metrics()), request(MOST * TILE + 5)
    answers = await asyncio.gather(
        *(batcher.score(scorers[0], tensors, RequestTimings("/rank"), None) for tensors in (request(3), large, request(4)))
    )
    np.testing.assert_allclose(answers[1], bundles.expected(large)[0], atol=1e-6)
    assert [len(scores) for scores in answers] == [3, MOST * TILE + 5, 4]


async def test_a_batch_begins_in_time_for_a_deadline(scorers, monkeypatch):
    monkeypatch.setattr(module, "WAIT_SECONDS", 30)
    monkeypatch.setattr(module, "EARLY_SECONDS", 9)
    metrics = Metrics()
    batcher = Batcher(metrics)
    asking = [batcher.score(scorers[0], request(3), RequestTimings("/rank"), deadline) for deadline in (None, 9.1)]
    await asyncio.wait_for(asyncio.gather(*asking), 8)
    assert counted(metrics) == ({"deadline": 1}, 6)


async def test_who_left_and_who_is_late_is_not_scored(held):
    batcher = Batcher(Metrics())
    first = asyncio.create_task(batcher.score(held, request(5), RequestTimings("/rank"), None))
    await begun(held)
    left = asyncio.create_task(batcher.score(held, request(6), RequestTimings("/rank"), None))
    late = asyncio.create_task(batcher.score(held, request(7), RequestTimings("/rank"), 0.005))
    stays = asyncio.create_task(batcher.score(held, request(8), RequestTimings("/rank"), 60))
    await asyncio.sleep(0.02)
    left.cancel()
    held.go.set()
    outcomes = await asyncio.gather(first, left, late, stays, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [np.ndarray, asyncio.CancelledError, DeadlineError, np.ndarray]
    assert held.sizes == [[5], [8]]


async def test_too_much_that_waits_is_refused(held):
    metrics = Metrics()
    batcher = Batcher(metrics)
    asking = [asyncio.create_task(batcher.score(held, request(1), RequestTimings("/rank"), None)) for _ in range(3)]
    await begun(held)
    asking += [
        asyncio.create_task(batcher.score(held, request(64 * TILE), RequestTimings("/rank"), None)) for _ in range(QUEUE_TILES // 64)
    ]
    await asyncio.sleep(0)
    with pytest.raises(OverLimitError, match=r"^65536 candidates wait to be scored already; try again$"):
        await batcher.score(held, request(1), RequestTimings("/rank"), None)
    held.go.set()
    assert len(await asyncio.gather(*asking)) == 3 + QUEUE_TILES // 64
    # The last holds two of 64 tiles, so it was full; those of 64 tiles went by twos.
    assert counted(metrics) == ({"timer": 1, "full": QUEUE_TILES // MOST}, 3 + QUEUE_TILES * TILE)
    assert (await batcher.score(held, request(1), RequestTimings("/rank"), None)).shape == (1,)


async def test_an_error_is_every_callers_own(scorers):
    batcher = Batcher(Metrics())
    asking = [
        batcher.score(failing, request(2), RequestTimings("/rank"), None) for failing in [Failing(scorers[0], [True])] for _ in range(3)
    ]
    errors = await asyncio.gather(*asking, return_exceptions=True)
    assert [str(error) for error in errors] == ["the model failed: as it was told to"] * 3
    assert len(set(map(id, errors))) == 3


async def test_stages_know_how_long_a_request_waited_and_ran(held):
    batcher, stages = Batcher(Metrics()), RequestTimings("/rank")
    asking = asyncio.create_task(batcher.score(held, request(5), stages, None))
    await begun(held)
    held.go.set()
    await asking
    assert 0 < stages.seconds["queue"] <= stages.total
    assert 0 < stages.seconds["inference"] <= stages.total


@pytest.mark.parametrize("running", [True, False])
async def test_closing_lets_nobody_wait(held, running):
    batcher = Batcher(Metrics())
    asking = [asyncio.create_task(batcher.score(held, request(5), RequestTimings("/rank"), None)) for _ in range(2)]
    await asyncio.sleep(0)
    if running:
        await begun(held)
        asking.append(asyncio.create_task(batcher.score(held, request(6), RequestTimings("/rank"), None)))
        await asyncio.sleep(0)
    batcher.close()
    outcomes = await asyncio.wait_for(asyncio.gather(*asking, return_exceptions=True), 5)
    assert {str(outcome) for outcome in outcomes} == {"scoring was given up; the service is ending or has a fault"}


async def test_the_service_ranks_through_it(run, ads, monkeypatch):
    """The whole way of `--device cuda`, with the CPU's memory in the device's place: the same answers as alone."""
    asked = [{"user": f"u{i}", "candidates": [f"a{j}" for j in range(i + 1)] + ["new"]} for i in range(8)]
    async with run(ads) as client:
        alone = [await client.rank(**each) for each in asked]
    monkeypatch.setattr("service.app._scoring", lambda settings, metrics: Batcher(metrics))
    monkeypatch.setattr("service.models.loaded.Scorer", lambda path, device, _threads, _ads: TiledScorer(path, device, 5))
    async with run(ads) as client:
        together = await asyncio.gather(*(client.rank(**each) for each in asked))
        assert await client.metric("adrank_batch_rows_sum") == sum(len(each["candidates"]) for each in asked)
        assert await client.metric('adrank_stage_duration_seconds_count{stage="queue"}') == 8
        assert await client.metric('adrank_stage_duration_seconds_count{stage="inference"}') == 8
        late = await client.post("/rank", json={"user": {"id": "u"}, "candidates": ["a1"], "options": {"deadline_ms": 0.001}})
        assert late.status_code == 504
    for one, other in zip(alone, together, strict=True):
        assert [ad["ad_id"] for ad in one["ads"]] == [ad["ad_id"] for ad in other["ads"]]
        np.testing.assert_allclose([ad["p_click"] for ad in one["ads"]], [ad["p_click"] for ad in other["ads"]], atol=1e-6)


def test_it_is_for_a_device_only():
    chosen = [_scoring(Settings(device=device, threads=1), Metrics()) for device in ("cpu", "cuda")]
    assert [type(each) for each in chosen] == [Inline, Batcher]
