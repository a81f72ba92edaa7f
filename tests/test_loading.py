"""A data set is loaded into a store that has taken events, or takes them meanwhile: against memory and real servers."""

import asyncio
import io
import random
import sys
from pathlib import Path

import polars as pl
import pytest
from conftest import Server, redis_store, until
from rich.progress import Progress

from features.entity_updates import by_entity
from features.merging import MergeUser
from features.state import ACTIVE, Ad, StoreError, UserState, pack_user
from service.store import bulk as bulk_store
from service.store.redis import RedisStore, user_key
from tests.test_catalogue import following, one
from tests.test_cli import refused, run, write
from tests.test_store import NOW, ad, applied, click, everything, user
from training.datasets.prepared import DataError, open_prepared
from training.loading import Loaded, Loading, newest_time, refusal

pytestmark = pytest.mark.anyio
UNTIL = NOW - 1_000
SCHEMA = """
name = "shop"
history = { length = 10, fields = ["ad_id"] }
[user]
user_id = { kind = "category" }
age = { kind = "category" }
[ad]
ad_id = { kind = "category" }
price = { kind = "number" }
"""


def data_set(folder: Path, users: int = 30, ads: int = 12, until: int | None = UNTIL, first: int = 0):
    """A prepared data set of users u0.. and ads a0.. with times up to `until`; each user has clicked an ad."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "schema.toml").write_text(SCHEMA)
    rows = [(i % 2, f"u{i}", f"a{first + i % ads}", str(20 + i)) for i in range(users)]
    frame = pl.DataFrame(rows, {"label": pl.Int8, "user_id": pl.String, "ad_id": pl.String, "user.age": pl.String}, orient="row")
    frame = frame.with_columns(history=pl.Series([[f"h{i}"] for i in range(users)]))
    if until is not None:
        frame = frame.with_columns(ts=pl.Series([until - users + 1 + i for i in range(users)]))
    for split in ("train", "valid", "test"):
        (folder / split).mkdir(exist_ok=True)
        frame.head(users if split == "train" else 1).write_parquet(folder / split / "0.parquet")
    pl.DataFrame({"ad_id": [f"a{first + i}" for i in range(ads)], "ad.price": [float(i) for i in range(ads)]}).write_parquet(
        folder / "ads.parquet"
    )
    return open_prepared(folder)


async def merged(store, prepared, whole=False, **more) -> Loaded:
    with Progress(disable=True) as progress:
        return await Loading(store, prepared, progress, **more).merge(whole)


async def states(store, prepared, users=30):
    return {f"u{i}": await store.get_user(f"u{i}") for i in range(users)}, await everything(store)


class TestMerge:
    async def test_what_events_told_since_stays_and_loading_again_changes_nothing(self, store, tmp_path):
        prepared = data_set(tmp_path)
        assert newest_time(prepared) == UNTIL
        first = await merged(store, prepared)
        assert (first.users, first.ads, first.newer) == (30, 12, "")
        before = await states(store, prepared)
        assert before[0]["u3"] == UserState({"age": "23"}, ["h3", "a3"], [UNTIL - 26] * 2)
        assert before[1]["a3"] == Ad("a3", {"price": 3.0})

        sent = [
            click("c", -5, "new", "u3"),
            user("u", {"age": "99"}, -4, "u4"),
            ad("a", {"price": 9.0}, -3, "a5"),
            ad("x", {}, -2, "a6", False),
        ]
        assert set((await applied(store, *sent)).values()) == {"accepted"}
        after = await states(store, prepared)
        done = await merged(store, prepared)
        assert await states(store, prepared) == after
        assert done.summary == (
            "loaded 30 users and 12 ads\nkept what events told since: 1 behaviour and 1 feature of 2 users and what was told of 2 ads"
        )
        assert list(after[0]["u3"].ad_ids) == ["h3", "a3", "new"]
        assert (after[0]["u4"].features, after[1]["a5"].features, after[1]["a6"].active) == ({"age": "99"}, {"price": 9.0}, False)
        assert set((await applied(store, *sent)).values()) == {"duplicate"}
        assert await states(store, prepared) == after

    async def test_a_newer_data_set_replaces_what_an_older_one_told(self, store, tmp_path):
        await merged(store, data_set(tmp_path / "1", until=UNTIL - 500))
        await applied(store, user("u", {"age": "50"}, -1_200, "u1"), ad("a", {"price": 50.0}, -1_200, "a1"))
        assert (await store.get_user("u1")).features == {"age": "50"}
        await merged(store, data_set(tmp_path / "2", users=29))
        assert (await store.get_user("u1")).features == {"age": "21"}
        assert (await everything(store))["a1"].features == {"price": 1.0}
        assert (await store.get_user("u29")).features == {"age": "49"}, "who is not in it stays"

    async def test_events_that_come_meanwhile_are_not_lost(self, store, tmp_path, monkeypatch):
        prepared, chance = data_set(tmp_path), random.Random(7)
        monkeypatch.setattr("training.loading.BATCH", 7)
        sent = [click(f"c{i}", i / 1_000, f"n{i}", f"u{i % 30}") for i in range(300)]
        sent += [ad(f"e{i}", {"price": 1_000.0 + i}, i / 1_000, f"a{i % 12}") for i in range(60)]

        async def send(part):
            for event in part:
                assert set((await applied(store, event)).values()) == {"accepted"}
                await asyncio.sleep(0)

        chance.shuffle(sent)
        loads = [merged(store, prepared), merged(store, prepared, whole=True), merged(store, prepared)]
        await asyncio.gather(*(send(sent[n::6]) for n in range(6)), *loads)
        users, ads = await states(store, prepared)
        for i in range(30):
            loaded = [f"h{i}", f"a{i % 12}"][: 1 + i % 2]
            assert list(users[f"u{i}"].ad_ids) == [*loaded, *(f"n{n}" for n in range(i, 300, 30))]
        assert {ad_id: each.features["price"] for ad_id, each in ads.items()} == {f"a{i}": 1_048.0 + i for i in range(12)}

    async def test_a_load_that_was_broken_off_is_made_whole_by_the_next(self, store, tmp_path, monkeypatch):
        prepared = data_set(tmp_path)
        monkeypatch.setattr("training.loading.BATCH", 7)
        rewrite, calls = store.rewrite, []

        async def dies(kind, rewrites):
            calls.append(kind)
            if len(calls) == 4:
                raise StoreError("store_unreachable", "gone")
            await rewrite(kind, rewrites)

        monkeypatch.setattr(store, "rewrite", dies)
        with pytest.raises(StoreError):
            await merged(store, prepared)
        assert await store.get_user("u29") is None
        await merged(store, prepared)
        assert (await store.get_user("u29")).features == {"age": "49"}

    async def test_a_state_too_large_to_be_read_is_refused(self, store, tmp_path):
        prepared = data_set(tmp_path)
        pl.DataFrame({"user_id": ["u3"], "user.age": ["x" * 2**21]}).write_parquet(tmp_path / "users.parquet")
        with pytest.raises(DataError, match="'u3' would take 2,097"):
            await merged(store, prepared)

    async def test_histories_without_times(self, store, tmp_path):
        prepared = data_set(tmp_path, until=None)
        assert newest_time(prepared) is None
        await merged(store, prepared)
        await applied(store, click("c", 0, "new", "u3"), click("d", 0, "a3", "u3"))
        for _ in range(2):
            await merged(store, prepared)
            assert list((await store.get_user("u3")).ad_ids) == ["h3", "new", "a3"]


class TestOverwrite:
    async def test_it_says_what_is_lost_and_what_is_sent_again_is_taken_again(self, store, tmp_path):
        prepared = data_set(tmp_path)
        await merged(store, prepared)
        before = await states(store, prepared)
        sent = [click("c", -5, "new", "u3"), user("u", {"age": "99"}, -4, "u4"), ad("a", {"price": 9.0}, -3, "a5"), ad("y", {}, -3, "z")]
        await applied(store, *sent)
        with Progress(disable=True) as progress:
            loading = Loading(store, prepared, progress)
            found = await loading.look(False)
            assert found.newer == "1 behaviour and 1 feature of 2 users and what was told of 1 ad"
            assert (await store.get_user("u3")).ad_ids[-1] == "new", "it only looked"
            await loading.overwrite()
        users, ads = await states(store, prepared)
        assert (users, {ad_id: ads[ad_id] for ad_id in before[1]}) == before
        assert await applied(store, *sent) == {"c": "accepted", "u": "accepted", "a": "accepted", "y": "duplicate"}
        assert (await store.get_user("u3")).ad_ids[-1] == "new"


class TestWholeCatalogue:
    async def test_ads_that_it_lacks_leave_running_services_and_come_back(self, store, tmp_path):
        await merged(store, data_set(tmp_path / "1"))
        catalogue = one(store)
        async with following(catalogue):
            await until(lambda: catalogue.ads == 12)
            await applied(store, ad("new", {"price": 1.0}, 0, "told-since"), ad("old", {"price": 1.0}, -2_000, "told-before"))
            done = await merged(store, data_set(tmp_path / "2", ads=10, first=4), whole=True)
            assert (done.retired, done.stayed) == (5, 1)
            ads = await everything(store)
            assert {ad_id for ad_id, each in ads.items() if each.active} == {*(f"a{i}" for i in range(4, 14)), "told-since"}
            assert ads["a1"].features == {"price": 1.0}, "histories hold it"
            await until(lambda: catalogue.ads == 11)
            table = catalogue.table("f")
            assert table.active(table.rows(["a1", "told-before", "a4"])).tolist() == [False, False, True]
            again = await merged(store, data_set(tmp_path / "2", ads=10, first=4), whole=True)
            assert (again.retired, again.stayed) == (0, 1)
            await merged(store, data_set(tmp_path / "1"))
            await until(lambda: catalogue.ads == 15)

    async def test_those_that_left_long_ago_are_deleted(self, store, tmp_path):
        long_ago = NOW - 100_000  # NOW is when the tests began
        gone = [Ad("gone", {"price": 1.0}, False, {ACTIVE: long_ago}), Ad("just", {}, False, {ACTIVE: NOW - 10}), Ad("unknown", {}, False)]
        await store.put_ads(gone)
        done = await merged(store, data_set(tmp_path), whole=True, gone_seconds=50_000.0)
        assert done.forgotten == 1
        assert {"gone", "just", "unknown"} & set(await everything(store)) == {"just", "unknown"}

    def test_an_empty_or_a_small_one_is_refused(self):
        assert "no ads" in str(refusal(Loaded(ads=0), sure=True))
        assert "less than half of the 1,000" in str(refusal(Loaded(ads=499, active=1_000), sure=False))
        assert refusal(Loaded(ads=499, active=1_000), sure=True) is None
        assert refusal(Loaded(ads=500, active=1_000), sure=False) is None
        assert refusal(Loaded(ads=1, active=0), sure=False) is None


class TestRedis:
    async def test_a_state_that_changes_all_the_time_is_a_sentence(self, raw, shared_server, monkeypatch):
        monkeypatch.setattr(bulk_store, "PAUSE_SECONDS", 0.0)
        store, merge = redis_store(shared_server.url), MergeUser("u1", UserState(), None)

        class Contended:
            id = "u1"

            def of(self, stored):
                import redis  # noqa: PLC0415

                with redis.Redis.from_url(shared_server.url) as client:
                    client.append(user_key("u1"), b"x")
                return merge.of(stored)

        with pytest.raises(StoreError, match="60 times over") as caught:
            await store.rewrite("user", [Contended()])
        assert caught.value.reason == "contended"
        await store.close()

    async def test_keys_of_a_wrong_type_give_way(self, raw, shared_server, tmp_path):
        store, prepared = redis_store(shared_server.url), data_set(tmp_path)
        await raw.lpush(user_key("u1"), "x")
        await raw.set(user_key("u2"), b"\0" * 3_000_000)
        for n in range(64):
            await raw.set(f"adrank:ads:{{{n}}}", "x")
        await merged(store, prepared)
        assert (await store.get_user("u1")).features == {"age": "21"}
        assert (await store.get_user("u2")).features == {"age": "22"}
        assert len(await everything(store)) == 12
        assert 0 < await raw.ttl(user_key("u1")) <= 100
        await store.close()

    async def test_it_is_read_by_workers_of_before(self, raw, shared_server, tmp_path):
        store = redis_store(shared_server.url)
        await merged(store, data_set(tmp_path))
        assert await raw.get(user_key("u2")) == pack_user("u2", UserState({"age": "22"}, ["h2"], [UNTIL - 27]))
        await store.close()


class TestCommand:
    def load(self, server: Server, data: Path, *more: object):
        return run("load", "--data", data, "--redis", server.url, *more)

    def test_as_it_is_typed(self, server, tmp_path, monkeypatch):
        first, second, small = (
            data_set(tmp_path / str(start) / str(ads), ads=ads, first=start).folder for ads, start in ((12, 0), (12, 4), (5, 0))
        )
        monkeypatch.setattr(sys, "stdin", io.StringIO())  # a cron has no terminal
        assert self.load(server, first)[:2] == (0, "loaded 30 users and 12 ads\n")

        async def send():
            store = RedisStore(server.url, timeout=2.0, ttl=1_000, on_damaged=lambda: None)
            await store.apply(by_entity([click("c", -5, "new", "u3")]))
            state = await store.get_user("u3")
            await store.close()
            return list(state.ad_ids)

        assert asyncio.run(send()) == ["h3", "a3", "new"]
        kept = "kept what events told since: 1 behaviour of 1 user\n"
        assert self.load(server, first)[:2] == (0, "loaded 30 users and 12 ads\n" + kept)
        code, out, _ = self.load(server, second, "--replace")
        assert (code, out) == (0, f"loaded 30 users and 12 ads\n{kept}4 ads left the catalogue, 0 that left long ago were deleted\n")
        refused(self.load(server, small, "--replace"), "--replace: the data set has 5 ads, less than half of the 12 that are active")
        assert self.load(server, small, "--replace", "--yes")[0] == 0
        (small / "ads.parquet").unlink()
        refused(self.load(server, small, "--replace", "--yes"), "an empty catalogue cannot be meant")
        code, _, complaint = self.load(server, first, "--overwrite")
        assert code == 0
        assert "--overwrite loses 1 behaviour of 1 user, which the store knows from events" in complaint
        assert asyncio.run(send()) == ["h3", "a3", "new"], "sent again, it is taken again"

    def test_a_store_in_memory_is_refused(self, tmp_path):
        refused(run("load", "--data", data_set(tmp_path).folder, "--redis", "memory://"), "would be gone with this command")

    def test_times_that_are_none_are_refused(self, server, tmp_path):
        prepared = data_set(tmp_path)
        frame = pl.read_parquet(tmp_path / "train/0.parquet")
        frame.with_columns(pl.col("ts").cast(pl.String)).write_parquet(tmp_path / "train/0.parquet")
        refused(run("load", "--data", prepared.folder, "--redis", server.url), "ts")
        write(tmp_path, "", "kept")
