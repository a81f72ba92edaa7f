"""The candidates `all`: the ads of the catalogue that pass filters are ranked as if they had been listed; every other one is counted."""

import asyncio

import bundles
import numpy as np
import onnx
import pytest
from conftest import until_ready
from test_api import check

from features.bundle import AD_VECTOR, REQUEST_VECTOR
from features.encode import Request, encode_request
from features.served import unpack_served
from features.state import Ad, MemoryStore, StoreError
from service.api.examples import OF_ALL
from service.api.wire import RankAnswer, RankRequest
from service.ranking import selection

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
    "listed candidates to retrieve": ({"candidates": ["a1"], "options": {"retrieve": 3}}, "/options/retrieve"),
    "more than are ranked": ({"options": {"top_k": 1, "retrieve": 10_001}}, "/options/retrieve"),
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


def waves(part, factors):
    """A tower: of the ids of a part the sums of sines and of cosines."""
    axes = "R, W" if part == "user" else "R, C, W"
    sums = "".join(
        f"x{i} = Mul(x, f{i}) s{i} = {wave}(x{i}) v{i} = ReduceSum<keepdims=1>(s{i}, last) " for i, wave in enumerate(("Sin", "Cos"))
    )
    constants = ", ".join(f"float f{i} = {{{factor}}}" for i, factor in enumerate(factors))
    return onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 18]> tower (int64[{axes}] {part}_ids) => (float[{axes[:-1]} 2] vector)
        <int64[1] last = {{-1}}, {constants}> {{ x = Cast<to=1>({part}_ids) {sums} vector = Concat<axis=-1>(v0, v1) }}"""
    ).SerializeToString()


TOWERS = {REQUEST_VECTOR: waves("user", (0.7, 0.4)), AD_VECTOR: waves("ad", (0.9, 0.3))}


def nearest(table, user_id, ad_ids, count):
    """So many of the ads, by inner products in numpy."""
    feeds, _ = encode_request(table, Request(user_id, {}, {}, [], ad_ids))
    user, ads = feeds["user_ids"][0].astype(np.float32), feeds["ad_ids"][0].astype(np.float32)
    products = [np.sin(np.float32(0.7) * user).sum() * np.sin(np.float32(0.9) * ads).sum(-1)]
    products += [np.cos(np.float32(0.4) * user).sum() * np.cos(np.float32(0.3) * ads).sum(-1)]
    return [ad_ids[i] for i in np.argsort(-sum(products))[:count]]


@pytest.fixture(scope="module")
def with_towers(tmp_path_factory):
    """A repository with `din`, and `towers`, which has vectors."""
    models = tmp_path_factory.mktemp("towers")
    bundles.publish(models, "din")
    bundles.publish(models, "towers", files=TOWERS)
    return models


@pytest.mark.parametrize("model", ["din", "towers"])
@pytest.mark.parametrize("genres", [["drama"], ["drama", "news"], ["drama", "news", "opera", "ballet", "comedy"]])
async def test_the_nearest_are_ranked_as_if_they_were_listed_however_the_catalogue_changes(run, ads, with_towers, model, genres):
    async with run(ads, models=with_towers) as client:
        client.store = ads
        await told(client, NEW, gone=["a3", "a4"])
        await ads.put_ads([Ad("a5", {"genre": "drama", "tags": ["y"]})])
        catalogue = client.app.state.service.ranker.catalogue
        async with asyncio.timeout(10):
            while catalogue.features(["a5"])["a5"]["tags"] != ["y"]:
                await asyncio.sleep(0.01)
        features = {**bundles.ADS, **NEW, "a5": {"genre": "drama"}}
        fit = [ad_id for ad_id, each in features.items() if each["genre"] in genres and ad_id not in ("a3", "a4")]
        table = catalogue.table(client.app.state.service.ranker.models.loaded["towers"].bundle.fingerprint)
        for user_id in ("u1", "u2"):
            for count in (1, 4, len(fit) - 1, len(fit), 50):
                options = {"top_k": 3, "retrieve": count, "model": model}
                answer = await rank(client, user={"id": user_id}, filters={"genre": genres}, options=options)
                expected = nearest(table, user_id, fit, count)
                assert answer["ads"] == (await client.rank(user_id, expected, options={"top_k": 3, "model": model}))["ads"]
                omitted = {"filtered": 34 - len(fit), "not_retrieved": len(fit) - len(expected), "top_k": len(expected) - 3}
                assert answer["omitted_by_reason"] == {reason: number for reason, number in omitted.items() if number > 0}
        far = nearest(table, "u1", fit, len(fit))[-1]
        answer = await rank(client, options={"top_k": 2, "retrieve": 2, "rules": {"pinned": {"2": far}}})
        assert answer["ads"][1]["ad_id"] == far


async def test_a_version_that_comes_is_searched_by_its_own_vectors(run, ads, tmp_path):
    bundles.publish(tmp_path, "towers", files=TOWERS)
    async with run(ads, models=tmp_path) as client:
        first = await rank(client, options={"top_k": 5, "retrieve": 5})
        bundles.publish(tmp_path, "towers", files=TOWERS | {AD_VECTOR: waves("ad", (-0.9, 0.3 + np.pi))})
        async with asyncio.timeout(30):
            while (second := await rank(client, options={"top_k": 5, "retrieve": 5}))["model"]["version"] == first["model"]["version"]:
                await asyncio.sleep(0.02)
        assert {ad["ad_id"] for ad in first["ads"]} != {ad["ad_id"] for ad in second["ads"]}
        assert len(client.app.state.service.ranker.catalogue.table(first["model"]["schema"]).vectors) == 1


def test_the_nearest_are_those_of_a_sort_whatever_the_sample_says(monkeypatch):
    monkeypatch.setattr(selection, "SAMPLE", 8)
    random = np.random.default_rng(0)
    for count in (1, 5, 30, 100, 198) * 20:
        vectors, vector, rows = random.standard_normal((200, 3)), random.standard_normal(3), np.arange(1, 200)
        best = rows[np.argsort(-(vectors[1:] @ vector))][: count - 1]
        pinned = int(np.setdiff1d(rows, best)[-1])
        found = selection._nearest(vectors, rows, vector, count, np.array([pinned]))
        assert found.tolist() == sorted([*best.tolist(), pinned])


async def test_without_vectors_nothing_is_retrieved(client):
    check(await client.post("/rank", json={**ALL, "options": {"top_k": 1, "retrieve": 10}}), 422, "invalid", "/options/retrieve")
