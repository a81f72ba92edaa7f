"""The catalogue on a store in memory, then on real servers that are emptied, stopped and started again under it."""

import asyncio
import contextlib
import time

import bundles
import numpy as np
import pytest
import redis.asyncio
from conftest import until

from features.encode import AdTable
from features.merging import RetireAd
from features.state import ACTIVE, Ad, MemoryStore, StoreError, pack_features, unpack_features
from service.catalogue import catalogue as module
from service.catalogue.catalogue import Catalogue, put_ads
from service.store.redis import CHANGES, RedisStore
from service.telemetry.metrics import Metrics

pytestmark = pytest.mark.anyio


def one(store, metrics=None):
    return Catalogue(store, {"f": bundles.encoder()}, metrics or Metrics())


@contextlib.asynccontextmanager
async def following(catalogue):
    task = asyncio.create_task(catalogue.follow())
    yield catalogue
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def test_bulk_encoding_is_the_same_as_one_by_one():
    bulk, single = AdTable(bundles.encoder()), AdTable(bundles.encoder())
    assert put_ads(bulk, [Ad(ad_id, features) for ad_id, features in bundles.ADS.items()]) == {}
    for ad_id, features in bundles.ADS.items():
        single.put([ad_id], single.encoder.encode_one("ad", features, ad_id))
    assert np.array_equal(bulk.block.ids, single.block.ids)
    assert np.array_equal(bulk.block.numbers, single.block.numbers)
    assert len(bulk) == len(bundles.ADS)


def test_an_ad_that_does_not_fit_is_left_out_and_the_others_are_not():
    table = AdTable(bundles.encoder())
    bad = [{"price": "dear"}, {"genre": []}, {"tags": "x"}, {"price": float("nan")}, {"price": []}]
    ads = [Ad(f"bad{i}", features) for i, features in enumerate(bad)] + [Ad("good", {"price": 1.0, "unheard_of": [1, {}]})]
    mistyped = put_ads(table, ads)
    assert set(mistyped) == {f"bad{i}" for i in range(5)}
    assert "ad.price" in mistyped["bad0"]
    assert len(table) == 1
    assert table.rows(["good"])[0] == 1


def test_an_ad_that_left_stays_for_histories():
    table = AdTable(bundles.encoder())
    put_ads(table, [Ad("a1", {"genre": "news"}), Ad("a2", {"genre": "news"})])
    before = table.block.take(table.rows(["a1", "a2"])).ids.copy()
    put_ads(table, [Ad("a1", {"genre": "news"}, active=False), Ad("a2", {}, active=False), Ad("a3", {}, active=False)])
    assert len(table) == 0
    assert np.array_equal(table.block.take(table.rows(["a1", "a2"])).ids, before)


async def test_a_table_that_is_added_while_ads_change_is_in_step_with_the_others(monkeypatch):
    monkeypatch.setattr(module, "AT_ONCE_UNDER_LOAD", 3)
    store = MemoryStore()
    await store.put_ads([*(Ad(ad_id, features) for ad_id, features in bundles.ADS.items()), Ad("a7", bundles.ADS["a7"], active=False)])
    catalogue = one(store)
    async with following(catalogue):
        await until(lambda: catalogue.loaded)
        adding = asyncio.create_task(catalogue.add("g", bundles.encoder()))
        await asyncio.sleep(0)
        await store.put_ads([Ad("new", {"genre": "news"}), Ad("a29", {"genre": "drama"}), Ad("a1", {}, active=False)])
        await adding
        await until(lambda: catalogue.table("f").rows(["new"])[0] > 0)
        ids = [*bundles.ADS, "new"]
        tables = [catalogue.table(fingerprint) for fingerprint in "fg"]
        blocks = [table.take(table.rows(ids)) for table in tables]
        assert np.array_equal(blocks[0].ids, blocks[1].ids)
        assert np.array_equal(blocks[0].numbers, blocks[1].numbers)
        assert [table.active(table.rows(ids)).tolist() for table in tables] == [[ad_id not in ("a1", "a7") for ad_id in ids]] * 2
        catalogue.keep(["g"])
        with pytest.raises(KeyError):
            catalogue.table("f")
        assert catalogue.ads == 29


async def test_a_table_that_is_added_while_the_ads_are_read_is_read_too():
    class Slow(MemoryStore):
        async def all_ads(self):
            async for batch in super().all_ads():
                reading.set()
                await added.wait()
                yield batch

    reading, added, store = asyncio.Event(), asyncio.Event(), Slow()
    await store.put_ads(Ad(ad_id, features) for ad_id, features in bundles.ADS.items())
    catalogue = one(store)
    loading = asyncio.create_task(catalogue.load())
    await reading.wait()
    await catalogue.add("g", bundles.encoder())
    added.set()
    await loading
    assert len(catalogue.table("g")) == len(catalogue.table("f")) == 30


async def test_a_table_that_is_let_go_of_while_the_ads_are_read_does_not_come_back():
    store = MemoryStore()
    await store.put_ads(Ad(ad_id, features) for ad_id, features in bundles.ADS.items())
    catalogue = Catalogue(store, {"f": bundles.encoder(), "g": bundles.encoder()}, Metrics())
    reading, go_on, all_ads = asyncio.Event(), asyncio.Event(), store.all_ads

    async def slow():
        async for batch in all_ads():
            reading.set()
            await go_on.wait()
            yield batch

    store.all_ads = slow
    loading = asyncio.create_task(catalogue.load())
    await reading.wait()
    catalogue.keep(["f"])
    go_on.set()
    await loading
    assert len(catalogue.table("f")) == 30
    with pytest.raises(KeyError):
        catalogue.table("g")
    await catalogue.add("g", bundles.encoder())
    assert len(catalogue.table("g")) == 30


async def test_a_table_that_could_not_be_filled_is_not_kept_half_full(monkeypatch):
    store = MemoryStore()
    await store.put_ads(Ad(ad_id, features) for ad_id, features in bundles.ADS.items())
    catalogue = Catalogue(store, {}, Metrics())
    await catalogue.load()
    with monkeypatch.context() as patch:
        patch.setattr(module, "put_ads", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            await catalogue.add("f", bundles.encoder())
    with pytest.raises(KeyError):
        catalogue.table("f")
    await catalogue.add("f", bundles.encoder())
    assert len(catalogue.table("f")) == 30


async def test_it_keeps_the_features_that_it_encoded():
    store = MemoryStore()
    await store.put_ads([Ad("a1", {"price": 1.5}), Ad("a2", {"genre": "news"})])
    catalogue = one(store)
    async with following(catalogue):
        await until(lambda: catalogue.loaded)
        await store.put_ads([Ad("a1", {"price": 2.5}), Ad("a2", {}, active=False)])
        await until(lambda: catalogue.ads == 1)
        features = catalogue.view("f").features(["a2", "a1", "none"])
        assert features == {"a1": pack_features({"price": 2.5}), "a2": pack_features({"genre": "news"})}


async def test_a_view_is_of_its_moment():
    store = MemoryStore()
    await store.put_ads([Ad("a1", {"price": 1.0}), Ad("a2", {"price": 2.0}), Ad("bad", {"price": "dear"})])
    catalogue = one(store)
    cursor = await catalogue.load()
    ad_ids = ["a1", "a2", "bad", "new"]
    views, expected = [], []
    for ads in (
        [Ad("a1", {"price": 1.5})],
        [Ad("a1", {"price": "dear"}), Ad("a2", {}, active=False)],
        [Ad("a1", {"price": "dearer"}), Ad("new", {"price": 1.0})],
        [Ad("a1", {}, active=False), Ad("bad", {"price": 3.0})],
        [Ad("a1", {"price": 4.0}), Ad("bad", {"price": "dear"}), Ad("new", {"price": 1.0}, active=False)],
    ):
        views.append(catalogue.view("f"))
        table = catalogue.table("f")
        expected.append({ad_id: table.take(table.rows([ad_id])).numbers.tolist() for ad_id in ad_ids if table.rows([ad_id])[0]})
        await store.put_ads(ads)
        cursor = await catalogue._step(cursor)
    encoder = bundles.encoder()
    for view, numbers in zip(views, expected, strict=True):
        found = {
            ad_id: encoder.encode_one("ad", unpack_features(packed)).numbers.tolist() for ad_id, packed in view.features(ad_ids).items()
        }
        assert found == numbers
    assert [sorted(each) for each in expected] == [
        ["a1", "a2"],
        ["a1", "a2"],
        ["a1", "a2"],
        ["a1", "a2", "new"],
        ["a1", "a2", "bad", "new"],
    ]
    await catalogue.add("late", bundles.encoder())
    assert sorted(catalogue.view("late").features(ad_ids)) == ["a1", "a2", "new"], "a misfit has no row in a table that is new"
    later = [view.features(["a1"])["a1"] for view in views]
    assert later == [pack_features({"price": price}) for price in (1.0, 1.5, 1.5, 1.5, 1.5)]


async def test_a_view_goes_on_when_all_ads_are_read_anew_and_when_its_table_is_dropped():
    store = MemoryStore()
    await store.put_ads([Ad("a1", {"price": 1.0}), Ad("a2", {"price": "dear"}), Ad("a3", {"price": 3.0})])
    catalogue = Catalogue(store, {"f": bundles.encoder(), "g": bundles.encoder()}, Metrics())

    async def change(*ads):
        nonlocal cursor
        await store.put_ads(ads)
        cursor = await catalogue._step(cursor)

    cursor, view = await catalogue.load(), catalogue.view("f")
    await change(Ad("a3", {"price": "dear"}))
    misfit = catalogue.view("f")
    await store.put_ads([Ad("a1", {"price": 2.0})])
    cursor = await catalogue.load()
    for each in (view, misfit):
        assert each.features(["a1", "a2", "a3"]) == {"a1": pack_features({"price": 1.0}), "a3": pack_features({"price": 3.0})}
    assert catalogue.view("f").features(["a1", "a2", "a3"]) == {"a1": pack_features({"price": 2.0})}

    early, late = catalogue.view("f"), catalogue.view("f")
    await change(Ad("a1", {"price": 2.5}), Ad("a2", {"price": 2.0}))
    catalogue.keep(["g"])
    with pytest.raises(KeyError):
        catalogue.view("f")
    await change(Ad("a1", {"price": 3.0}), Ad("a2", {"price": "dear"}), Ad("a3", {"price": 4.0}))
    late.renew()
    assert early.features(["a1", "a2", "a3"]) == {"a1": pack_features({"price": 2.0})}
    assert late.features(["a1", "a2", "a3"]) == {"a1": pack_features({"price": 2.5}), "a2": pack_features({"price": 2.0})}
    assert float(late.table.take(late.table.rows(["a1"])).numbers[0, 0]) == pytest.approx(np.log1p(2.5))


async def test_it_loads_then_follows():
    store = MemoryStore()
    await store.put_ads(Ad(ad_id, features) for ad_id, features in bundles.ADS.items())
    catalogue = one(store)
    assert not catalogue.loaded
    async with following(catalogue):
        await until(lambda: catalogue.loaded)
        assert catalogue.ads == 30
        await store.put_ads([Ad("new", {"genre": "news"}), Ad("a1", {}, active=False)])
        await until(lambda: catalogue.table("f").rows(["new"])[0] > 0)
        assert catalogue.ads == 30
        await until(lambda: catalogue.lag < 1)


async def test_damaged_ads_are_counted():
    store, metrics = MemoryStore(), Metrics()
    await store.put_ads([Ad("bad", {"price": "dear"}), Ad("good", {})])
    catalogue = one(store, metrics)
    await catalogue.load()
    assert catalogue.ads == 1
    text = metrics.exposition().decode()
    assert 'adrank_degraded_total{reason="ad_mistyped",stage="catalogue"} 1.0' in text
    assert "adrank_catalogue_ads 1.0" in text


async def test_the_loop_gets_its_turns_while_a_big_catalogue_loads():
    store = MemoryStore()
    await store.put_ads(Ad(f"a{i}", bundles.ADS["a1"]) for i in range(20_000))
    turns = 0

    async def count():
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    await one(store).load()
    counting.cancel()
    assert turns >= 20_000 / module.AT_ONCE


async def test_a_server_that_is_emptied_and_one_that_restarts(server, monkeypatch):
    monkeypatch.setattr(module, "POLL_SECONDS", 0.05)
    store = RedisStore(server.url, timeout=1, ttl=100, on_damaged=lambda: None)
    raw = redis.asyncio.Redis.from_url(server.url, protocol=2)
    server.stop()
    catalogue = one(store)
    async with following(catalogue):
        await until(lambda: catalogue.reason == "store_unreachable")
        assert not catalogue.loaded
        server.start()
        await until(lambda: catalogue.loaded and catalogue.reason is None)

        await store.put_ads([Ad("a1", {}), Ad("a2", {})])
        await until(lambda: catalogue.ads == 2)
        table = catalogue.table("f")

        await raw.flushall()
        await until(lambda: catalogue.reason == "store_emptied")
        assert catalogue.ads == 2
        assert catalogue.table("f") is table
        await store.put_ads([Ad("a2", {})])
        await until(lambda: catalogue.reason is None)
        assert catalogue.ads == 2

        await raw.flushall()
        await store.put_ads([Ad("a3", {})])
        await until(lambda: catalogue.ads == 1)
        assert catalogue.table("f") is not table

        await store.put_ads([Ad("a4", {})])
        await raw.xtrim(CHANGES, maxlen=0, approximate=False)
        await until(lambda: catalogue.ads == 2)

        server.stop()
        await until(lambda: catalogue.reason == "store_unreachable")
        assert catalogue.ads == 2
        server.start()
        await until(lambda: catalogue.reason == "store_emptied")
        assert catalogue.ads == 2
        await store.put_ads([Ad("a5", {})])
        await until(lambda: catalogue.table("f").rows(["a5"])[0] > 0)
        await until(lambda: catalogue.reason is None)
    await raw.aclose()
    await store.close()


async def test_the_change_stream_is_bounded_in_bytes(arrangements, monkeypatch):
    monkeypatch.setattr("service.store.redis.CHANGES_BYTES", 2**16)
    url = arrangements("valkey")
    store, raw = RedisStore(url, timeout=5, ttl=100, on_damaged=lambda: None), redis.asyncio.Redis.from_url(url)
    await store.put_ads(Ad(f"{n:040}", {}) for n in range(5_000))  # an entry has 500 ids of 42 bytes
    assert await raw.xlen(CHANGES) == 3
    for n in range(5):
        await store.put_ads([Ad(f"{n}", {})])
    assert await raw.xlen(CHANGES) == 8
    await raw.aclose()
    await store.close()


class TestWhatIsFreed:
    """Ads that left stay for the histories that hold them, and not for ever."""

    @pytest.fixture(params=["memory", "valkey"])
    async def store(self, request, arrangements):
        if request.param == "memory":
            yield MemoryStore()
            return
        store = RedisStore(arrangements("valkey"), timeout=5, ttl=100, on_damaged=lambda: None)
        yield store
        await store.close()

    async def test_ads_that_left_long_ago_are_not_read_and_are_deleted(self, store):
        now = time.time()
        left = [Ad("long", {"price": 1.0}, False, {ACTIVE: now - 100}), Ad("just", {"price": 1.0}, False, {ACTIVE: now - 10})]
        await store.put_ads([Ad("a1", {"price": 1.0}), Ad("unknown", {"price": 1.0}, active=False), *left])
        catalogue = one(store)
        catalogue.gone_seconds = 50
        await catalogue.load()
        assert catalogue.table("f").rows(["long", "just", "a1", "unknown"]).astype(bool).tolist() == [False, True, True, True]
        assert {ad.ad_id async for batch in store.all_ads() for ad in batch} == {"a1", "just", "unknown"}

    async def test_memory_is_freed_once_there_is_much_of_it(self, store, monkeypatch):
        monkeypatch.setattr(module, "POLL_SECONDS", 0.05)
        monkeypatch.setattr(module, "FREE_SECONDS", 0.0)
        monkeypatch.setattr(module, "FREE_AT_LEAST", 20)
        await store.put_ads(Ad(ad_id, features) for ad_id, features in bundles.ADS.items())
        catalogue = one(store)
        async with following(catalogue):
            await until(lambda: catalogue.ads == 30)
            now = int(time.time())
            ended = [ad_id for ad_id in bundles.ADS if ad_id != "a1"]
            await store.rewrite("ad", [RetireAd(ad_id, None, now) for ad_id in ended])
            await until(lambda: catalogue.ads == 1)
            assert len(catalogue.view("f").features(ended)) == 29
            catalogue.gone_seconds = -10
            await until(lambda: not catalogue.view("f").features(ended))
            assert catalogue.table("f").rows(ended).sum() == 0
            async with asyncio.timeout(90):  # the store is told after the memory
                while {ad.ad_id async for batch in store.all_ads() for ad in batch} != {"a1"}:
                    await asyncio.sleep(0.02)
            await store.put_ads([Ad("a2", {"price": 1.0})])
            await until(lambda: catalogue.ads == 2)

    async def test_deleting_may_fail_without_harm(self, monkeypatch):
        store = MemoryStore()
        await store.put_ads([Ad("a1", {}), Ad("long", {"price": 1.0}, False, {ACTIVE: 1})])

        async def fails(*_):
            raise StoreError("store_denied", "the store's user lacks a permission")

        monkeypatch.setattr(store, "rewrite", fails)
        catalogue = one(store)
        await catalogue.load()
        assert (catalogue.loaded, catalogue.ads) == (True, 1)


class Sums:
    """A tower that adds up an ad's ids."""

    width = 1

    def vectors(self, ads):
        return ads.ids.sum(1, keepdims=True).astype(np.float32)


async def test_vectors_are_in_step_with_the_ads_whenever_a_tower_comes_and_go_with_it(monkeypatch):
    monkeypatch.setattr(module, "AT_ONCE", 7)
    store, first, later, early = MemoryStore(), Sums(), Sums(), Sums()
    await store.put_ads(Ad(ad_id, features) for ad_id, features in bundles.ADS.items())
    catalogue = one(store)
    loading = asyncio.create_task(catalogue.load())
    await asyncio.sleep(0)
    await catalogue.add("f", bundles.encoder(), early)
    await loading

    def in_step(*towers):
        table = catalogue.table("f")
        rows = len(table.block)
        return set(table.vectors) == set(towers) and all(
            np.array_equal(table.vectors[tower][1:rows, 0], table.block.ids[1:].sum(1)) for tower in towers
        )

    assert in_step(early)
    await catalogue.add("f", bundles.encoder(), first)
    async with following(catalogue):
        adding = asyncio.create_task(catalogue.add("f", bundles.encoder(), later))
        await store.put_ads(
            [*(Ad(f"n{i}", {"genre": "news"}) for i in range(40)), Ad("a29", {"genre": "drama"}), Ad("a1", {}, active=False)]
        )
        await adding
        await until(lambda: catalogue.table("f").rows(["n39"])[0] > 0)
        assert in_step(early, first, later)
        catalogue.keep(["f"], {first})
        assert in_step(first)
        await catalogue.load()
        assert in_step(first)


async def a_tower_with_a_new_table(catalogue, towers):
    await catalogue.add("g", bundles.encoder(), towers[1])


async def a_tower_with_a_table_that_is_there(catalogue, towers):
    await catalogue.add("f", bundles.encoder(), towers[1])


async def a_table_and_then_a_tower_less(catalogue, towers):
    await catalogue.add("g", bundles.encoder())
    catalogue.keep(["f", "g"], set())


async def a_table_that_goes_again(catalogue, towers):
    await catalogue.add("g", bundles.encoder(), towers[1])
    catalogue.keep(["f"], {towers[0]})


@pytest.mark.parametrize(
    "change", [a_tower_with_a_new_table, a_tower_with_a_table_that_is_there, a_table_and_then_a_tower_less, a_table_that_goes_again]
)
@pytest.mark.parametrize("gone", [0, 90])  # so many more ads are there than are read, so that the reading is done sooner
async def test_tables_and_vectors_are_those_of_the_models_at_whichever_turn_of_a_reading_these_change(monkeypatch, change, gone):
    monkeypatch.setattr(module, "AT_ONCE", 7)
    monkeypatch.setattr(module, "AT_ONCE_UNDER_LOAD", 7)
    monkeypatch.setattr("service.catalogue.ads.AT_ONCE", 7)
    for turns in range(60):
        store, towers = MemoryStore(), (Sums(), Sums())
        left = [Ad(f"left{i}", {"genre": "news"}, False, {ACTIVE: 1}) for i in range(gone)]
        await store.put_ads([*(Ad(ad_id, features) for ad_id, features in bundles.ADS.items()), *left])
        catalogue = one(store)
        catalogue.gone_seconds = time.time() + 100
        await catalogue.load()
        await catalogue.add("f", bundles.encoder(), towers[0])
        catalogue.gone_seconds = 0
        loading = asyncio.create_task(catalogue.load())
        for _ in range(turns):
            await asyncio.sleep(0)
        await change(catalogue, towers)
        await loading
        kept = {towers[0]: "f", towers[1]: "g" if change is a_tower_with_a_new_table else "f"}
        wanted = {
            a_tower_with_a_new_table: ({"f", "g"}, kept),
            a_tower_with_a_table_that_is_there: ({"f"}, kept),
            a_table_and_then_a_tower_less: ({"f", "g"}, {}),
            a_table_that_goes_again: ({"f"}, {towers[0]: "f"}),
        }[change]
        tables = catalogue._ads.tables
        assert tables.keys() == wanted[0], turns
        assert {tower: name for name, table in tables.items() for tower in table.vectors} == wanted[1], turns
        for table in tables.values():
            rows = len(table.block)
            assert (rows, len(table)) == (31, 30), turns
            assert all(np.array_equal(vectors[1:rows, 0], table.block.ids[1:].sum(1)) for vectors in table.vectors.values()), turns
