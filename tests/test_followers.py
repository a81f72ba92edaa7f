"""What a service does in the background: one thing that fails takes nothing else down with it."""

import asyncio

import bundles
import pytest
from conftest import redis_store, running
from older_redis import editing, without

from features.challenger import Challenger, challenge
from features.state import Ad, ChangesLostError, MemoryStore
from service import app as module
from service.models.watcher import ModelWatcher
from service.public import of_store
from service.settings import Settings
from service.store.redis import CHANGES
from tests.test_store import ad, applied, everything

pytestmark = pytest.mark.anyio
AGED = (b"entries-added", b"max-deleted-entry-id", b"recorded-first-entry-id")
"""What XINFO STREAM tells from Redis 7 on."""


class Odd(MemoryStore):
    """A store whose change stream fails in a way that nobody foresaw, as long as it is told to."""

    odd = True

    async def cursor(self):
        if self.odd:
            raise RuntimeError("nobody foresaw this")
        return await super().cursor()


def live_version(status):
    return next((model["version"] for model in status["models"] if model["name"] == "din"), None)


class TestFollowers:
    async def test_models_are_followed_and_canaries_judged_while_the_catalogue_fails(self, tmp_path, monkeypatch):
        monkeypatch.setattr(module, "WELL_SECONDS", 0.2)
        monkeypatch.setattr(module, "START_OVER_SECONDS", (0.01, 0.02))
        bundles.publish(tmp_path, "din")
        store, judged = Odd(), asyncio.Event()
        await store.put_ads([Ad("a1", bundles.ADS["a1"])])
        judge = ModelWatcher.judge

        async def judging(self):
            judged.set()
            await judge(self)

        monkeypatch.setattr(ModelWatcher, "judge", judging)
        async with running(Settings(models=tmp_path, redis="memory://"), store, ready=False) as client:
            status = await client.until("/readyz", lambda status: any("catalogue" in reason for reason in status["reasons"]))
            assert "following the catalogue failed (RuntimeError) and starts over; the log says where" in status["reasons"]
            assert "nobody foresaw" not in str(status)
            assert judged.is_set()
            second = bundles.publish(tmp_path, "din", bias=1.0)
            await client.until("/v1/models", lambda status: live_version(status) == second.name)
            third = bundles.publish(tmp_path, "din", bias=0.5, make_current=False)
            challenge(tmp_path, "din", Challenger(int(third.name), "canary", 0.5))
            await client.until("/v1/models", lambda status: any(each.get("challenger") for each in status["models"]))
            assert await client.metric('adrank_degraded_total{reason="failed",stage="background"}') >= 1
            store.odd = False
            status = await client.until("/readyz", lambda status: status["status"] == "ready")
            assert status["reasons"] == []

    async def test_a_repository_that_fails_leaves_the_catalogue_followed(self, ads, repository, monkeypatch):
        async def fails(_):
            raise RuntimeError("nobody foresaw this")

        monkeypatch.setattr(ModelWatcher, "judge", fails)
        monkeypatch.setattr(ModelWatcher, "follow", fails)
        async with running(Settings(models=repository, redis="memory://"), ads) as client:
            await ads.put_ads([Ad("new", {"genre": "news"})])
            status = await client.until("/readyz", lambda status: status["catalogue"]["ads"] == len(bundles.ADS) + 1)
            assert (status["status"], len(status["reasons"])) == ("degraded", 2)


class TestOlderServers:
    """What a server before Redis 7, or one that is only compatible, does not tell."""

    async def test_changes_are_followed_without_a_count_of_them(self, raw, shared_server):
        async with editing(shared_server.port, without(*AGED)) as url:
            store = redis_store(url)
            cursor = await store.cursor()
            assert (await store.changed_ads(cursor, 0.01)) == ([], cursor)
            await store.put_ads([Ad("a1", {})])
            with pytest.raises(ChangesLostError, match="does not count"):
                await store.changed_ads(cursor, 0.01)  # some might have gone before the first that is there
            cursor = await store.cursor()
            await applied(store, ad("e1", {"n": 1}, ad_id="a2"))
            ads, cursor = await store.changed_ads(cursor, 0.01)
            assert [each.ad_id for each in ads] == ["a2"]
            await raw.xtrim(CHANGES, maxlen=0, approximate=False)
            assert await store.changed_ads(cursor, 0.01) == ([], cursor)  # nothing came after it
            await store.put_ads([Ad("a3", {})])
            with pytest.raises(ChangesLostError, match="does not count"):
                await store.changed_ads(cursor, 0.01)
            assert set(await everything(store)) == {"a1", "a2", "a3"}
            await store.close()

    async def test_a_cursor_of_a_newer_server_is_good_at_an_older_one(self, raw, shared_server):
        newer = redis_store(shared_server.url)
        await newer.put_ads([Ad("a1", {})])
        cursor = await newer.cursor()
        async with editing(shared_server.port, without(*AGED)) as url:
            older = redis_store(url)
            assert await older.changed_ads(cursor, 0.01) == ([], cursor)
            await newer.put_ads([Ad("a2", {})])
            ads, cursor = await older.changed_ads(cursor, 0.01)
            assert [each.ad_id for each in ads] == ["a2"]
            assert await newer.changed_ads(await older.cursor(), 0.01) == ([], await older.cursor())
            await older.close()
        await newer.close()

    async def test_a_service_is_ready_and_in_step(self, raw, shared_server, repository):
        async with editing(shared_server.port, without(*AGED)) as url, running(Settings(models=repository, redis=url)) as client:
            store = redis_store(url)
            await store.put_ads([Ad("a1", bundles.ADS["a1"])])
            await client.until("/readyz", lambda status: status["catalogue"]["ads"] == 1 and status["status"] == "ready")
            await store.put_ads([Ad("a2", bundles.ADS["a2"])])
            await client.until("/readyz", lambda status: status["catalogue"]["ads"] == 2)
            await store.close()

    async def test_a_reply_of_another_form_is_a_sentence_and_no_crash(self, raw, shared_server, repository, caplog):
        edit = without(b"last-generated-id")
        async with editing(shared_server.port, edit) as url, running(Settings(models=repository, redis=url), ready=False) as client:
            store = redis_store(shared_server.url)
            await store.put_ads([Ad("a1", {})])
            status = await client.until("/readyz", lambda status: status["catalogue"]["detail"])
            assert status["catalogue"]["detail"] == of_store(status["catalogue"]["reason"])
            assert "another form" in caplog.text
            assert "last-generated-id" in caplog.text
            assert status["models"]["loaded"] == ["din", "other"]
            await store.close()
