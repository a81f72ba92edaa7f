"""Events and real processes: many services and one batch, and a Redis that dies in the middle."""

import asyncio
import itertools
import random
import time

import httpx
import pytest
import redis
from conftest import Server, until
from processes import fill, serving

from features.events import unpack_event
from features.state import HISTORY_LIMIT, unpack_user
from features.streams import EVENTS
from service.store.redis import user_key

pytestmark = pytest.mark.anyio


def click(number, user_id, ts):
    return {"type": "click", "event_id": f"c{number}", "ts": ts, "user_id": user_id, "ad_id": f"a{number}", "request_id": f"r{number}"}


def behaviours(raw, user_id):
    state = unpack_user(user_id, raw.get(user_key(user_id)))
    return list(zip(state.ts, state.ad_ids, strict=True))


async def test_the_same_batch_at_once_over_several_services_is_taken_once(repository, server):
    await fill(server.url)
    now = round(time.time())
    events = [click(i, f"e{i % 10}", now - i) for i in range(200)]
    events += [{"type": "ad", "event_id": f"ad{i}", "ts": now - i, "ad_id": "a1", "features": {"price": float(i)}} for i in range(20)]
    async with serving(repository, server.url) as first, serving(repository, server.url) as second:

        async def send(n):
            shuffled = random.Random(n).sample(events, len(events))
            while (answer := await (first, second)[n % 2].post("/v1/events", json={"events": shuffled})).status_code == 429:
                await asyncio.sleep(0.02)
            assert answer.status_code == 202, answer.text
            return {outcome["event_id"]: outcome["status"] for outcome in answer.json()["events"]}

        outcomes = await asyncio.gather(*map(send, range(20)))
        for event in events:
            assert sorted(outcome[event["event_id"]] for outcome in outcomes) == ["accepted", *["duplicate"] * 19]
        with redis.Redis.from_url(server.url) as raw:
            for user in range(10):
                assert behaviours(raw, f"e{user}") == sorted(
                    (event["ts"], event["ad_id"]) for event in events if event.get("user_id") == f"e{user}"
                )
            assert {unpack_event(entry[b"v"]).event_id for _, entry in raw.xrange(EVENTS)} == {f"c{i}" for i in range(200)}
        async with asyncio.timeout(90):  # the newest word on the ad reaches both
            for client in (first, second):
                while (await client.rank("u1", ["a1"]))["ads"] != (await client.rank("u1", [{"ad_id": "a1", "features": {"price": 0.0}}]))[
                    "ads"
                ]:
                    await asyncio.sleep(0.02)
        for client in (first, second):
            log = client.log.read_text()
            assert "Traceback" not in log
            assert "e1" not in log.split()


async def test_a_redis_that_dies_in_the_middle_loses_nothing_that_was_acknowledged(run, tmp_path):
    server = Server("valkey", "--appendonly", "yes", "--appendfsync", "always", "--dir", str(tmp_path))
    now, users, numbers, acknowledged, refusals = round(time.time()), 6, itertools.count(), set(), set()
    stop = asyncio.Event()
    try:
        async with run(redis=server.url, ready=False) as client:

            async def send(sender):
                while not stop.is_set():
                    batch = [click(n, f"u{n % users}", now - n / 100) for n in itertools.islice(numbers, 7)]
                    while (answer := await client.post("/v1/events", json={"events": batch})).status_code != 202:
                        refusals.add(answer.json()["code"])
                        assert answer.headers["retry-after"]
                        await asyncio.sleep(0.01)
                    assert {outcome["status"] for outcome in answer.json()["events"]} <= {"accepted", "duplicate"}
                    acknowledged.update(event["event_id"] for event in batch)

            senders = [asyncio.create_task(send(n)) for n in range(4)]
            for _ in range(3):
                known = len(acknowledged)
                await until(lambda: len(acknowledged) >= known + 100)
                await asyncio.to_thread(server.stop)
                await asyncio.sleep(0.05)
                await asyncio.to_thread(server.start)
            await asyncio.sleep(0.2)
            stop.set()
            await asyncio.gather(*senders)
        with redis.Redis.from_url(server.url) as raw:
            histories = [behaviours(raw, f"u{user}") for user in range(users)]
            logged = {unpack_event(entry[b"v"]).event_id for _, entry in raw.xrange(EVENTS)}
        assert refusals == {"store_down"}
        assert logged == acknowledged
        for user, history in enumerate(histories):
            own = [int(event_id[1:]) for event_id in acknowledged if int(event_id[1:]) % users == user]
            assert history == sorted((now - n / 100, f"a{n}") for n in own)[-HISTORY_LIMIT:]
    finally:
        server.stop()


async def test_a_caller_who_hangs_up_leaves_a_batch_that_can_come_again(repository, server):
    await fill(server.url)
    now = round(time.time())
    events = [click(i, "e1", now - i) for i in range(300)]
    async with serving(repository, server.url) as client:
        for seconds in (0.001, 0.003, 0.01):
            with pytest.raises(httpx.TimeoutException):
                await client.post("/v1/events", json={"events": events}, timeout=seconds)
        answer = await client.post("/v1/events", json={"events": events})
        assert {outcome["status"] for outcome in answer.json()["events"]} <= {"accepted", "duplicate"}
        with redis.Redis.from_url(server.url) as raw:
            assert [ad_id for _, ad_id in behaviours(raw, "e1")] == [f"a{i}" for i in range(299, -1, -1)]
