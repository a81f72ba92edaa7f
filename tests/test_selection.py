"""The candidates `all`: the ads of the catalogue that pass filters are ranked as if they had been listed; every other one is counted."""

import asyncio

import bundles
import pytest
from conftest import until_ready
from test_api import check

from features.served import unpack_served
from features.state import Ad, MemoryStore, StoreError
from service.api.examples import OF_ALL
from service.api.wire import RankAnswer, RankRequest

pytestmark = pytest.mark.anyio
ALL = {"user": {"id": "u1"}, "candidates": "all", "options": {"top_k": 5}}
NEW = {f"n{i}": {"genre": ("opera", "ballet")[i % 2], "tags": ["x", "z"], "price": 1.0} for i in range(6)}
"""Ads of genres that the vocabulary does not have."""
FILTERS = {
    "none": {},
    "one value": {"genre": ["drama"]},
    "one of two values": {"genre": ["drama", "news"]},
    "two filters": {"genre": ["comedy"], "tags": ["x"]},
    "one of an ad's several values": {"tags": ["y"]},
    "a value that the model does not know": {"genre": ["opera"]},
    "known and unknown": {"genre": ["ballet", "news"], "tags": ["x", "nowhere"]},
    "a value that no ad has": {"genre": ["nothing"]},
    "a value in another spelling": {"tags": [True, 7.0]},
}


def passes(features, filters):
    """Whether an ad passes, by its features."""
    return all(
        {str(value).lower().removesuffix(".0") for value in values}
        & set(features[name] if isinstance(features[name], list) else [features[name]])
        for name, values in filters.items()
    )


async def rank(client, **sent):
    answer = await client.post("/rank", json={**ALL, **sent})
    assert answer.status_code == 200, answer.text
    RankAnswer.model_validate_json(answer.content)
    return answer.json()


async def told(client, ads, gone=()):
    """The client's catalogue with these ads more, and without those."""
    before = (await client.get("/readyz")).json()["catalogue"]["ads"]
    await client.store.put_ads(
        [*(Ad(ad_id, features) for ad_id, features in ads.items()), *(Ad(ad_id, {}, active=False) for ad_id in gone)]
    )
    async with asyncio.timeout(10):
        while (await client.get("/readyz")).json()["catalogue"]["ads"] != before + len(ads) - len(gone):
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
async def test_ads_that_pass_are_ranked_as_if_they_were_listed(client, filters):
    more = {**NEW, "t": {"genre": "news", "tags": ["true", "7"], "price": 2.0}}
    await told(client, more, gone=["a1", "a2"])
    ads = {ad_id: features for ad_id, features in {**bundles.ADS, **more}.items() if ad_id not in ("a1", "a2")}
    named = [ad_id for ad_id, features in ads.items() if passes(features, filters)]
    answer = await rank(client, filters=filters)
    listed = (await client.rank("u1", named, options={"top_k": 5}))["ads"] if named else []
    assert (answer["ads"], answer["omitted"]) == (listed, [])
    expected = {"filtered": len(ads) - len(named), "top_k": max(0, len(named) - 5)}
    assert answer["omitted_by_reason"] == {reason: count for reason, count in expected.items() if count}


async def test_floors_rules_and_policies_hold_and_every_ad_is_counted_once(client):
    options = {"top_k": 6, "min_score": 0.2, "rules": {"max_per": {"genre": 2}, "pinned": {"1": "a4"}}}
    answer = await rank(client, options=options)
    listed = await client.rank("u1", [*bundles.ADS], options=options)
    assert answer["ads"] == listed["ads"]
    reasons = [each["reason"] for each in listed["omitted"]]
    assert answer["omitted_by_reason"] == {reason: reasons.count(reason) for reason in set(reasons)}
    assert len(answer["ads"]) + sum(answer["omitted_by_reason"].values()) == len(bundles.ADS)


@pytest.mark.parametrize("explore", [None, {"policy": "epsilon_greedy", "epsilon": 0.5}, {"policy": "plackett_luce", "temperature": 1}])
async def test_no_ad_that_passes_is_an_empty_answer(client, explore):
    rules = {"distance": {"genre": 2}}
    for more in ({}, {"rules": rules}, {"explain": True}, {"min_score": 0.5}):
        answer = await rank(client, filters={"genre": ["nothing"]}, options={"top_k": 3, "explore": explore, **more})
        assert (answer["ads"], answer["omitted_by_reason"]) == ([], {"filtered": 30})


async def test_what_a_policy_drew_from_is_logged(client):
    await rank(client, filters={"genre": ["drama"]}, options={"top_k": 2, "explore": {"policy": "plackett_luce", "temperature": 1}})
    async with asyncio.timeout(10):
        while not client.store.served:
            await asyncio.sleep(0.01)
    served = unpack_served(client.store.served[0])
    assert (sorted(served.candidates), served.shown, len(served.ad_ids)) == (sorted(ad for ad in bundles.ADS if int(ad[1:]) % 3 == 0), 2, 2)


BAD = {
    "no top_k": ({"options": {}}, "/options/top_k"),
    "a word that is not all": ({"candidates": "al"}, "/candidates"),
    "filters of listed candidates": ({"candidates": ["a1"], "filters": {"genre": ["news"]}}, "/filters"),
    "an unknown feature": ({"filters": {"colour": ["red"]}}, "/filters/colour"),
    "a number": ({"filters": {"price": [3]}}, "/filters/price"),
    "the id": ({"filters": {"ad_id": ["a1"]}}, "/filters/ad_id"),
    "a text": ({"filters": {"genre": "news"}}, "/filters/genre"),
    "no values": ({"filters": {"genre": []}}, "/filters/genre"),
    "null": ({"filters": {"genre": [None]}}, "/filters/genre"),
    "a number that is none": ({"filters": {"genre": [1e17]}}, "/filters/genre"),
    "values in values": ({"filters": {"genre": [["news"]]}}, "/filters/genre"),
    "an object": ({"filters": {"genre": {"not": ["news"]}}}, "/filters/genre"),
    "a list": ({"filters": [["genre", "news"]]}, "/filters"),
    "1,001 values": ({"filters": {"genre": ["news"] * 1_001}}, "/filters/genre"),
    "a long value": ({"filters": {"genre": ["x" * 1_025]}}, "/filters/genre"),
    "100,000 filters": ({"filters": {f"f{i}": ["x"] for i in range(100_000)}}, "/filters"),
    "an order that needs bids": ({"options": {"top_k": 1, "objective": "ecpm"}}, "/candidates"),
    "a reserve": ({"options": {"top_k": 1, "reserve": 1}}, "/candidates"),
    "a pinned ad that does not pass": (
        {"filters": {"genre": ["news"]}, "options": {"top_k": 1, "rules": {"pinned": {"1": "a1"}}}},
        "/options/rules/pinned/1",
    ),
}


@pytest.mark.parametrize(("sent", "pointer"), BAD.values(), ids=BAD)
async def test_what_cannot_be_is_refused_with_its_place(client, sent, pointer):
    check(await client.post("/rank", json={**ALL, **sent}), 422, "invalid", pointer)


def test_the_example_is_one() -> None:
    assert RankRequest.model_validate(OF_ALL).filters == {"category": ["travel", "food"]}


async def test_filters_nested_beyond_reason_are_no_json(client):
    body = '{"user": {"id": "u1"}, "candidates": "all", "options": {"top_k": 1}, "filters": {"genre": %s}}' % (
        "[" * 100_000 + "]" * 100_000
    )
    answer = await client.post("/rank", content=body, headers={"content-type": "application/json"})
    check(answer, 400, "not_json")


@pytest.mark.parametrize("filters", [{}, {"genre": ["drama", "news", "comedy"]}, {"genre": ["opera"]}])
async def test_more_candidates_than_are_ranked_at_once_are_refused(run, ads, filters):
    await ads.put_ads([Ad(f"n{i}", {"genre": ("opera", "ballet")[i % 2]}) for i in range(40)])
    async with run(ads, max_candidates=20) as client:
        await until_ready(client)
        check(
            await client.post("/rank", json={**ALL, "filters": filters}),
            422,
            "invalid",
            "/filters" if "opera" in str(filters) else "/candidates",
        )


class Silent(MemoryStore):
    async def cursor(self):
        raise StoreError("store_timeout", "it does not answer")


async def test_a_catalogue_that_has_not_been_read_ranks_nothing(run):
    async with run(Silent(), ready=False) as client:
        check(await client.post("/rank", json=ALL), 503, "not_ready")
