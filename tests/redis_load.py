"""Rankings and events sent to a service while its Redis is in trouble, and what came of each."""

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from conftest import until
from redis_servers import client_of

from features.events import unpack_event
from features.streams import EVENTS

RANK_SECONDS, SEND_SECONDS = 0.005, 0.02
"""Between two rankings, and between two batches of one sender."""
BATCH = 5


class Ranked(NamedTuple):
    """When it was answered, for whom, with which status, and what was missing."""

    at: float
    user: str
    status: int
    degraded: tuple[str, ...]


@dataclass
class Load:
    """What came of it."""

    client: Any
    users: list[str]
    ranked: list[Ranked] = field(default_factory=list)
    acknowledged: dict[str, float] = field(default_factory=dict)
    """When, by event."""
    refused: list[tuple[float, int, str]] = field(default_factory=list)

    async def rank(self) -> None:
        chance = random.Random(1)
        while True:
            user = chance.choice(self.users)
            answer = await self.client.post("/rank", json={"user": {"id": user}, "candidates": ["a1", "a2"], "options": {"top_k": 2}})
            missing = tuple(sorted(each["reason"] for each in answer.json().get("degraded", [])))
            self.ranked.append(Ranked(time.monotonic(), user, answer.status_code, missing))
            await asyncio.sleep(RANK_SECONDS)

    async def send(self, numbers: "itertools.count[int]", users: list[str]) -> None:
        chance = random.Random(2)
        while True:
            events: list[dict[str, Any]] = [
                {"type": "click", "event_id": f"e{n}", "ts": round(time.time(), 3), "user_id": chance.choice(users), "ad_id": "a1"}
                for n in itertools.islice(numbers, BATCH)
            ]
            while (answer := await self.client.post("/v1/events", json={"events": events})).status_code != 202:
                self.refused.append((time.monotonic(), answer.status_code, answer.json()["code"]))
                await asyncio.sleep(SEND_SECONDS)
            self.acknowledged |= {event["event_id"]: time.monotonic() for event in events}
            await asyncio.sleep(SEND_SECONDS)

    async def until(self, events: int = 0, rankings: int = 0, seconds: float = 90) -> None:
        """Wait for so many more events to be acknowledged, and rankings to be answered."""
        events, rankings = events + len(self.acknowledged), rankings + len(self.ranked)
        await until(lambda: len(self.acknowledged) >= events and len(self.ranked) >= rankings, seconds)

    def degraded(self, since: float = 0.0) -> list[Ranked]:
        return [each for each in self.ranked if each.degraded and each.at >= since]

    async def recovered(self, since: float, seconds: float = 90) -> float:
        """How long after that time rankings of all users became whole, and events were taken again; both for 100 rankings on end."""
        async with asyncio.timeout(seconds):
            while True:
                await asyncio.sleep(0.02)
                whole = max([since, *(each.at for each in self.degraded(since)), *(at for at, *_ in self.refused if at > since)])
                after = [each.at for each in self.ranked if each.at > whole]
                if len(after) > 100 and max(self.acknowledged.values(), default=0) > whole:
                    return after[0] - since


@asynccontextmanager
async def load(client: Any, users: list[str], senders: int = 2) -> AsyncIterator[Load]:
    """Rankings and events until this ends."""
    made, numbers = Load(client, users), itertools.count()
    work = [asyncio.create_task(made.rank()), *(asyncio.create_task(made.send(numbers, users)) for _ in range(senders))]
    try:
        yield made
        assert not [task for task in work if task.done()], "a sender has failed"
    finally:
        for task in work:
            task.cancel()
        results = await asyncio.gather(*work, return_exceptions=True)
        unexpected = [each for each in results if isinstance(each, Exception)]
        if unexpected:
            raise unexpected[0]


def kept(url: str) -> set[str]:
    """Ids of the events that the store has for the joiner."""
    with client_of(url) as client:
        return {unpack_event(entry[b"v"]).event_id for _, entry in client.xrange(EVENTS)}
