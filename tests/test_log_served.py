"""The log of a service that really served: joined by the joiner, it shows no skew and can be replayed."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import joining
import numpy as np
import polars as pl
import pytest
import small
from conftest import Server, until_ready
from processes import serving
from test_cli import run

from features import bundle
from features.bundle import current_path, load_bundle
from features.encode import Encoder
from features.events import Event
from features.policy import EpsilonGreedy, PlackettLuce
from features.state import Ad, UserState
from service.store.redis import RedisStore
from training.calibrate import Calibration
from training.datasets.log import open_log
from training.export.export import ServedNetwork, score
from training.offpolicy.replay import replay as replayed
from training.skew import find_skew

pytestmark = pytest.mark.anyio
REQUESTS = 60
EXPLORED = {"policy": "plackett_luce", "temperature": 0.5}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with a DIN, whose random weights make every field matter."""
    served, folder = ServedNetwork(small.network("din"), Calibration(), small.schema()).eval(), tmp_path_factory.mktemp("served") / "models"
    vocabularies = small.vocabularies()
    goldens = [bundle.Golden("u1", {"age": "25"}, {"slot": "feed"}, ["a1", "gone"], ["a2", "a3"], {"a2": small.ad_features(2)}, [])]
    goldens = [replace(each, p_click=score(served, each.feeds(small.encoder()))[0].tolist()) for each in goldens]
    files = {
        bundle.MODEL: small.traced(served),
        bundle.SCHEMA: small.schema().to_toml().encode(),
        bundle.VOCABULARIES: vocabularies.to_json().encode(),
        bundle.GOLDENS: bundle.goldens_json(goldens),
    }
    bundle.publish(folder, "din", files, {})
    return folder


@pytest.fixture(scope="module")
def valkey() -> Iterator[Server]:
    server = Server("valkey")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


def asked(number: int) -> dict[str, Any]:
    """A request: stored and sent features, ads that are unknown, that left, with features sent, and histories of both kinds."""
    random = np.random.default_rng(number)
    candidates: list[Any] = [{"ad_id": f"a{i}"} for i in random.permutation(small.ADS)[:6]] + [{"ad_id": "new"}]
    if not number % 3:  # not where it explores: of candidates that are not shown, the log does not hold what was sent
        candidates[0]["features"] = {"genre": "news", "price": 2.5, "tags": None}
        candidates[-1]["features"] = [{}, {"genre": "drama"}, {"tags": [], "price": 4}][number // 3 % 3]
    user: dict[str, Any] = {"id": f"u{number % 8}", "features": [{}, {"age": 35}, {"interests": ["news", "?"], "income": None}][number % 3]}
    if number % 5 == 0:
        user["history"] = [{"ad_id": f"a{i}", "ts": 5 + i} for i in range(number % 7)] + [{"ad_id": "gone", "ts": 99}]
    options: dict[str, Any] = {"top_k": 3} | ({"explore": EXPLORED} if number % 3 else {})
    return {
        "request_id": f"r{number}",
        "user": user,
        "context": {"slot": "feed"} if number % 4 else {},
        "candidates": candidates,
        "options": options,
    }


async def fill(store: RedisStore) -> None:
    await store.put_ads(Ad(f"a{i}", small.ad_features(i)) for i in range(small.ADS))
    histories = ([f"a{(user * 5 + i) % (small.ADS + 1)}" for i in range(user)] for user in range(6))
    await store.put_users(
        (f"u{user}", UserState({"age": "25", "income": 3.5}, past, range(len(past)))) for user, past in enumerate(histories)
    )


async def change(store: RedisStore, client: Any) -> None:
    """Change an ad and take one away, and wait until the service ranks by it."""
    await store.put_ads([Ad("a2", {"genre": "comedy", "price": 77.0}), Ad("a3", small.ad_features(3), active=False)])
    async with asyncio.timeout(90):
        while (await client.rank("u9", ["a3"], request_id="waiting"))["ads"][0].get("known") is not False:
            await asyncio.sleep(0.01)


@pytest.fixture(scope="module")
async def log(models: Path, valkey: Server, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Path]:
    """A log of rankings before and after ads changed, half of them with tensors."""
    store = RedisStore(valkey.url, timeout=2, ttl=1000, on_damaged=lambda: None)
    await fill(store)
    writer, folder = joining.Writer(valkey.url), tmp_path_factory.mktemp("joined") / "log"
    async with serving(models, valkey.url, log_tensors_share=0.5, store_timeout_ms=5000) as client:
        await until_ready(client)
        for number in range(REQUESTS):
            if number == REQUESTS // 2:
                await change(store, client)
            answer = await client.post("/rank", json=asked(number))
            assert answer.status_code == 200, answer.text
            ads = answer.json()["ads"]
            assert not answer.json()["degraded"]
            for ad in ads[: number % 3]:
                writer.add(Event("click", f"e{number}{ad['ad_id']}", time.time(), f"u{number % 8}", f"r{number}", ad["ad_id"]))
    await store.close()
    joining.join_once(valkey.url, folder, models, "--drain")
    return folder


def of_requests(folder: Path) -> pl.DataFrame:
    return joining.rows(folder).filter(pl.col("request_id") != "waiting")


async def test_it_has_no_skew(log: Path, models: Path) -> None:
    rows = of_requests(log)
    assert len(rows) == REQUESTS * 3
    assert rows["known"].n_unique() == rows["label"].n_unique() == rows["policy"].n_unique() == 2
    assert rows["history_revisions"].list.explode().n_unique() > 5
    skew = find_skew(open_log(log), models)
    assert not skew.found, skew.as_dict()
    assert skew.compared == skew.rows >= len(rows)
    assert skew.max_difference <= 1e-5
    assert 0 < skew.with_tensors < skew.rows
    assert set(skew.fields) == {
        *(field.path for field in small.schema().fields),
        *(f"history.{name}" for name in small.schema().history_fields),
    }
    code, out, _ = run("skew", "--log", log, "--models", models, "--json")
    assert (code, json.loads(out)["skew"]) == (0, False)


async def test_a_feature_computed_otherwise_is_found(log: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if offline code scaled prices in its own way."""
    plain = Encoder._numbers
    monkeypatch.setattr(
        Encoder, "_numbers", lambda self, field, values, rows: plain(self, field, values, rows) * (1 + (field.name == "price"))
    )
    skew = find_skew(open_log(log), models)
    assert {path for path, seen in skew.fields.items() if seen.differ} == {"ad.price", "history.price"}
    assert skew.found


async def test_the_policy_that_served_is_worth_what_the_log_says(log: Path, models: Path) -> None:
    target = load_bundle(current_path(models, "din"))
    explored = of_requests(log).filter(pl.col("policy") != "greedy")
    found = replayed(open_log(log), target, PlackettLuce(0.5))
    assert (found.rankings, found.impressions, found.unfit) == (REQUESTS * 2 // 3, len(explored), 0)
    assert found.greedy >= REQUESTS
    assert found.estimates.largest_weight == pytest.approx(1, rel=1e-4)
    assert found.estimates.log.value == explored["label"].mean()
    assert [found.estimates.ips.value, found.estimates.snips.value] == pytest.approx([found.estimates.log.value] * 2, rel=1e-4)
    assert replayed(open_log(log), target, EpsilonGreedy(0.0), top_k=1).rankings == found.rankings
