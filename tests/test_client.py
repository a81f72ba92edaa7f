"""The Python client: against a service in this process and one of its own, and what it does when answers are late, busy or wrong."""

from pathlib import Path
from typing import Any, get_type_hints

import bundles
import httpx
import pytest
from conftest import Client, Server
from processes import fill, serving
from pydantic import TypeAdapter

import adrank_client
from adrank_client import Adrank, AsyncAdrank, EventResult, RankedAd, RankedAds, RefusedError, event
from features.state import MemoryStore
from service.api import event_wire, wire

pytestmark = pytest.mark.anyio


def is_of(kind: Any, value: dict[str, Any]) -> None:
    """The value has what a `TypedDict` says, and nothing else."""
    hints = get_type_hints(kind)
    assert kind.__required_keys__ <= set(value) <= set(hints)
    for name in set(value) - {"ads"}:
        TypeAdapter(hints[name]).validate_python(value[name], strict=True)


@pytest.mark.parametrize(
    ("kind", "model"), [(RankedAds, wire.RankAnswer), (RankedAd, wire.AdAnswer), (EventResult, event_wire.EventOutcome)]
)
def test_types_have_what_the_service_describes(kind: Any, model: Any) -> None:
    assert set(get_type_hints(kind)) == set(model.model_fields)


async def test_answers_are_of_the_types_that_they_are_said_to_be(client: Client) -> None:
    async with AsyncAdrank("http://adrank", transport=client._transport) as ranker:
        plain = await ranker.rank("u1", [*bundles.ADS])
        columns = {"ad_id": ["a1", "new"], "bid": [0.5, 1.0]}
        options = {"explain": True, "explore": {"policy": "epsilon_greedy", "epsilon": 0.5}}
        explained = await ranker.rank(
            {"id": "u1", "features": {"age": "25"}}, columns, context={"slot": "feed"}, options=options, request_id="r1"
        )
        every = await ranker.rank("u1", "all", filters={"genre": ["news"]}, options={"top_k": 1})
        assert every["omitted_by_reason"] == {"filtered": 20, "top_k": 9}
        for answer in (plain, explained, every):
            is_of(RankedAds, answer)
            for ad in answer["ads"]:
                is_of(RankedAd, ad)
        assert [ad["ad_id"] for ad in plain["ads"]] == [ad["ad_id"] for ad in (await client.rank("u1", [*bundles.ADS]))["ads"]]
        assert (explained["request_id"], {ad["ad_id"] for ad in explained["ads"]}) == ("r1", {"a1", "new"})
        assert {"ecpm", "propensity", "explain"} <= set(explained["ads"][0])
        assert {model["name"] for model in (await ranker.models())["models"]} == {"din", "other"}


async def test_what_is_wrong_is_told_with_its_place(client: Client) -> None:
    async with AsyncAdrank("http://adrank", transport=client._transport) as ranker:
        with pytest.raises(RefusedError, match=r"422 .*/candidates") as caught:
            await ranker.rank("u1", [])
    assert (caught.value.status, caught.value.errors[0]["pointer"]) == (422, "/candidates")


async def test_events_go_in_batches_each_with_its_id(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adrank_client, "EVENTS", 2)
    events = [event("click", user_id=f"u{i}", ad_id="a1") for i in range(4)] + [event("impression", ad_id="a1")]
    async with AsyncAdrank("http://adrank", transport=client._transport) as ranker:
        for statuses in (["accepted"] * 4 + ["rejected"], ["duplicate"] * 4 + ["rejected"]):
            results = await ranker.tell(events)
            for result in results:
                is_of(EventResult, result)
            assert [result["status"] for result in results] == statuses
            assert [result["event_id"] for result in results] == [each["event_id"] for each in events]
        assert await ranker.tell([]) == []
    assert isinstance(client.store, MemoryStore)  # type: ignore[attr-defined]
    assert (await client.store.get_user("u3")).ad_ids == ["a1"]  # type: ignore[attr-defined]


async def test_a_token_opens_a_service_over_a_socket(tmp_path: Path, repository: Path, server: Server) -> None:
    (tmp_path / "tokens").write_text("rank,events,read 0123456789abcdef0123456789abcdef\n")
    await fill(server.url)
    async with serving(repository, server.url, tokens=tmp_path / "tokens") as client:
        url = str(client.base_url)
        with Adrank(url, token="0123456789abcdef0123456789abcdef", timeout=20) as ranker:
            assert len(ranker.rank("u1", ["a1", "a2"])["ads"]) == 2
            assert ranker.tell([event("click", user_id="u1", ad_id="a2")])[0]["status"] == "accepted"
        with Adrank(url, timeout=20) as stranger, pytest.raises(RefusedError, match=r"^401"):
            stranger.rank("u1", ["a1"])


RANKED = {"request_id": "r", "model": {}, "ads": [], "omitted": [], "degraded": [], "timings_ms": {}}
BUSY = httpx.Response(503, headers={"retry-after": "3"}, json={"detail": "busy"})


@pytest.mark.parametrize("kind", ["ranking", "events"])
@pytest.mark.parametrize(
    ("answers", "asked", "slept"),
    [
        ([BUSY, None], {"ranking": 2, "events": 2}, [3.0]),
        ([httpx.ConnectError("away"), None], {"ranking": 2, "events": 2}, None),
        ([httpx.ReadTimeout("late"), None], {"ranking": 1, "events": 2}, None),
        ([httpx.Response(502, text="<html>"), None], {"ranking": 1, "events": 2}, None),
        ([BUSY] * 9, {"ranking": 3, "events": 9}, None),
        ([httpx.Response(422, json={"detail": "wrong"})], {"ranking": 1, "events": 1}, []),
    ],
)
async def test_what_is_tried_again(kind: str, answers: list[Any], asked: dict[str, int], slept: list[float] | None, monkeypatch) -> None:
    """A ranking that may have been made is not asked for twice; an event is told until there is an answer, as late as that asks for."""
    waited: list[float] = []

    async def asleep(seconds: float) -> None:
        waited.append(seconds)

    monkeypatch.setattr("httpx_retries.retry.time.sleep", waited.append)
    monkeypatch.setattr("httpx_retries.retry.asyncio.sleep", asleep)
    good = {"ranking": RANKED, "events": {"request_id": "r", "events": []}}[kind]

    def transport(sent: list[httpx.Request]) -> httpx.MockTransport:
        def answer(request: httpx.Request) -> httpx.Response:
            sent.append(request)
            found = answers[len(sent) - 1]
            if isinstance(found, Exception):
                raise found
            return (
                httpx.Response(200, json=good)
                if found is None
                else httpx.Response(found.status_code, headers=found.headers, text=found.text)
            )

        return httpx.MockTransport(answer)

    sent, sent_too, ends = list[httpx.Request](), list[httpx.Request](), list[str]()
    events = [event("click", user_id="u", ad_id="a")]
    with Adrank(transport=transport(sent)) as ranker:
        try:
            ends.append(str(ranker.rank("u", ["a"]) if kind == "ranking" else ranker.tell(events)))
        except (RefusedError, httpx.TransportError) as error:
            ends.append(repr(error))
    slept_before = [*waited]
    waited.clear()
    async with AsyncAdrank(transport=transport(sent_too)) as other:
        try:
            ends.append(str(await (other.rank("u", ["a"]) if kind == "ranking" else other.tell(events))))
        except (RefusedError, httpx.TransportError) as error:
            ends.append(repr(error))
    assert ends[0] == ends[1]
    assert ("Error" in ends[0] or "late" in ends[0]) == (answers[asked[kind] - 1] is not None)
    assert len(sent) == len(sent_too) == asked[kind]
    assert len({request.content for request in sent}) == 1
    if slept is not None:
        assert slept_before == waited == slept
