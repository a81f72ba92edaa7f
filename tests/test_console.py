"""The console's routes: who may read them, what they tell, and that they tell no path."""

import asyncio
import json

import bundles
import httpx
import pytest
from test_tokens import RANK, READ, bearer

from features.state import Ad, MemoryStore, StoreError, UserState
from service.api.console import ADS, FIGURES, OPEN, PAGES, REPORTS, STATIC, USER, VERSION, VERSIONS

pytestmark = pytest.mark.anyio


async def test_the_root_leads_to_the_console_whose_pages_may_load_nothing_from_elsewhere(client):
    moved = await client.get("/")
    assert (moved.status_code, moved.headers["location"]) == (307, "/console")
    for path, name in PAGES.items():
        page = await client.get(path)
        assert (page.status_code, page.content) == (200, (STATIC / name).read_bytes())
        assert page.headers["content-security-policy"].startswith("default-src 'self'; ")
        assert "unsafe" not in page.headers["content-security-policy"]
    assert {path.name for path in STATIC.iterdir()} == {*PAGES.values(), "docs.html", "docs.js"}


async def test_behind_a_prefix_the_root_leads_to_the_console_there(run):
    async with run(root_path="/ads", ready=False) as client:
        assert (await client.get("/ads/")).headers["location"] == "/ads/console"
        assert (await client.get("/ads/console/page.js")).status_code == 200


async def test_it_can_be_switched_off(run):
    async with run(console=False, ready=False) as client:
        for path in (*OPEN, ADS, USER, VERSIONS, VERSION, FIGURES, REPORTS):
            assert (await client.get(path)).status_code == 404, path


async def test_pages_are_open_and_what_they_read_is_not(run, ads, tmp_path):
    (tmp_path / "tokens").write_text(f"rank {RANK}\nread {READ}\n")
    async with run(ads, tokens=tmp_path / "tokens") as client:
        assert {(await client.get(path)).status_code for path in OPEN} == {200, 307}
        for path in (ADS, USER, VERSIONS, VERSION, FIGURES, REPORTS):
            assert (await client.get(path)).status_code == 401
            answers = {token: (await client.get(path, headers=bearer(token))).status_code for token in (RANK, READ)}
            assert (answers[RANK] == 403, answers[READ] == 403) == ((False, True) if path == USER else (True, False)), path


async def sampled(client: httpx.AsyncClient, **query: object) -> set[str]:
    answer = await client.get(ADS, params=query)
    assert answer.status_code == 200, answer.text
    return {ad["ad_id"] for ad in answer.json()["ads"]}


async def test_a_sample_is_of_active_ads_with_a_value(client):
    await client.store.put_ads([Ad("gone", {"genre": "news"}, active=False), Ad("late", {"genre": "news", "price": 2.5})])
    while "late" not in await sampled(client, count=1000):
        pass
    news = {f"a{i}" for i in range(2, 30, 3)} | {"late"}
    assert await sampled(client, count=1000, field="genre", value="news") == news
    assert await sampled(client, count=1000, field="tags", value="y") == {f"a{i}" for i in range(2, 30, 3)}
    assert await sampled(client, count=1000, field="price", value="2.5") == {"late"}
    assert await sampled(client, count=1000, field="ad_id", value="a2") == {"a2", *(f"a{i}" for i in range(20, 30))}
    some = [await sampled(client, count=4) for _ in range(30)]
    assert {len(each) for each in some} == {4}
    assert len(set.union(*some)) > 15, "always the same"
    for count in ("0", "1001", "-1", "x", "", "１"):
        assert (await client.get(ADS, params={"count": count})).json()["detail"] == "count is a number from 1 to 1,000"


async def test_what_takes_long_is_done_once_at_a_time_however_many_ask(client, monkeypatch):
    """Of 100,000 ads a search takes a second: 200 requests whose callers had left held up rankings for minutes."""
    answers = await asyncio.gather(*(client.get(ADS, params={"field": "genre", "value": "none"}) for _ in range(8)))
    assert sorted(answer.status_code for answer in answers) == [200, *[429] * 7]
    assert (await client.get(ADS)).status_code == 200
    listed = []
    monkeypatch.setattr("service.api.console._versions", lambda models: listed.append(models) or {})
    monkeypatch.setattr("service.api.console._reports", lambda models: listed.append(models) or [])
    for path in (VERSIONS, REPORTS):
        assert {answer.status_code for answer in await asyncio.gather(*(client.get(path) for _ in range(8)))} == {200}
    assert len(listed) == 2


async def test_a_user_is_told_with_the_features_of_what_they_clicked(client):
    await client.store.put_users([("7", UserState({"age": "25"}, [f"a{i % 30}" for i in range(299)] + ["new"], list(range(300))))])
    told = (await client.get(USER, params={"id": "7"})).json()
    assert (told["known"], told["features"], told["behaviours"], len(told["history"])) == (True, {"age": "25"}, 300, 200)
    assert told["history"][-1] == {"ad_id": "new", "ts": 299, "features": {}}
    assert told["history"][-2] == {"ad_id": "a28", "ts": 298, "features": bundles.ADS["a28"]}
    assert (await client.get(USER)).json() == {"known": False, "features": {}, "behaviours": 0, "history": []}


class Broken(MemoryStore):
    async def get_user(self, user_id: str) -> UserState | None:
        raise StoreError("store_timeout", "10.0.0.1 did not answer")

    async def figures(self) -> bytes:
        raise StoreError("store_timeout", "10.0.0.1 did not answer")


async def test_a_store_that_is_down_is_told_without_its_address(run):
    async with run(Broken()) as client:
        for path in (USER, FIGURES):
            answer = await client.get(path, params={"id": "u1"})
            assert answer.status_code == 503
            assert "the store did not answer in time" in answer.json()["detail"]
            assert "10.0.0.1" not in answer.text


async def test_every_version_is_told_with_its_manifest_and_what_is_wrong_without_a_path(run, tmp_path):
    old, live = bundles.publish(tmp_path, "din"), bundles.publish(tmp_path, "din", files={"metrics.json": b'{"test": {"auc": 0.75}}'})
    (old / "manifest.json").write_text("{")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "current").write_text("7")
    async with run(models=tmp_path, ready=False) as client:
        listed = await client.get(VERSIONS)
        first, second = listed.json()["versions"]
        assert (first["version"], first["role"], first["metrics"], first["wrong"]) == (live.name, "live", {"auc": 0.75}, None)
        assert (second["version"], second["wrong"]) == (old.name, "its manifest cannot be read")
        assert list(listed.json()["wrong"]) == ["empty"]
        one = await client.get(VERSION, params={"model": "din", "version": live.name})
        assert one.json()["metrics"] == {"test": {"auc": 0.75}}
        assert one.json()["report"] == {}
        for text, told in ((b'{"epochs": [1], "worst": ["a7"]}', {"epochs": [1]}), (b"[]", {}), (b"{", {}), (b"[" * 100_000, {})):
            (live / "report.json").write_bytes(text)
            assert (await client.get(VERSION, params={"model": "din", "version": live.name})).json()["report"] == told
        assert one.json()["manifest"]["graphs"]["model.onnx"] == {"ir": 10, "opset": 18}
        wrong = [{"model": "din", "version": old.name}, {"model": "../x", "version": "1"}, {"model": "din", "version": "../1"}, {}]
        answers = [await client.get(VERSION, params=each) for each in wrong]
        assert [answer.status_code for answer in answers] == [422] * len(wrong)
        assert all(str(tmp_path) not in answer.text for answer in (listed, one, *answers))


async def test_a_repository_that_is_not_there_is_said_so(run, tmp_path):
    async with run(models=tmp_path / "none", ready=False) as client:
        told = (await client.get(VERSIONS)).json()
        assert told["versions"] == []
        assert told["notice"].startswith("the model repository cannot be read")


async def test_retrainings_are_told_the_newest_first_and_what_is_no_report_is_not(run, tmp_path):
    whole = {"verdict": "Refused din: few rows", "accepted": False, "reasons": ["few rows"], "version": None, "window": {"rows": 3}}
    published = {"verdict": "Published din 20261130101112", "accepted": True, "version": 20261130101112}
    texts = {"20261129": json.dumps(whole), "20261130": json.dumps(published), "20261128": "[]", "20261127": "{", "20261126": "{}"}
    for folder, text in texts.items():
        (tmp_path / "din" / "reports" / folder).mkdir(parents=True)
        (tmp_path / "din" / "reports" / folder / "report.json").write_text(text)
    async with run(models=tmp_path, ready=False) as client:
        told = (await client.get(REPORTS)).json()["reports"]
        assert told == [{**published, "version": "20261130101112"}, {name: whole[name] for name in whole if name != "window"}]
        assert (await client.get(FIGURES)).json()["figures"] == []
