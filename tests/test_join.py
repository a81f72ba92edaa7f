"""What becomes of rankings and events, through a real Valkey: raw files, the rows of the log, and the outcome of every event."""

from dataclasses import replace

import bundles
import polars as pl
import pytest
from joining import ADS, T0, click, conversion, impression, ranking, table, tensor_bytes

from features.events import Event, pack_event
from features.served import pack_served
from features.streams import EVENTS, SERVED
from training.datasets.log import open_log
from training.datasets.prepared import DataError
from training.join.attribution import Attribution
from training.join.raw import LATER, revision

pytestmark = pytest.mark.anyio


@pytest.fixture
def server(shared_server):
    return shared_server


async def test_a_row_holds_what_was_served_and_what_came_of_it(streams, joining):
    tensors = {
        "user_ids": tensor_bytes(1, 2, 3),
        "ad_ids": tensor_bytes(1, 2, 3, 4, 5, 6),
        "ad_numbers": tensor_bytes(0.5, 1.5, 2.5, kind="<f4"),
    }
    streams.add(ranking(sent={"a2": {"price": 7}, "new": {"genre": "news"}}, ad_ids=["a1", "a2", "new"], unknown=["new"], tensors=tensors))
    streams.add(click(ad_id="a2", ts=T0 + 20), click(ad_id="a2", ts=T0 + 8), conversion(ad_id="a2"), conversion(ad_id="a2", ts=T0 + 30))
    streams.add(impression(ad_id="new", position=1), impression(ad_id="a1", position=3))
    await joining.once()
    assert [path.parent.name for path in joining.folder.glob("raw/*/date=2025-11-22/*/*.parquet")] == ["hour=08"] * 2
    assert streams.lengths() == (0, 0)
    new, second, first = joining.rows().sort("ad_id", descending=True).to_dicts()
    assert first["ad_id"], second["ad_id"] == ("a1", "a2")
    shared = {"user_id": "u1", "request_id": "r1", "model": "din", "version": 20251122000000, "ts": int(T0), "policy": "greedy"}
    shared |= {"user.age": "25", "user.interests": ["news", "drama"], "user.income": 9.5, "context.slot": "feed", "candidates": None}
    shared |= {"history": ["a4", "gone", "a5"], "history_revisions": [revision(ADS["a4"]), 0, revision(ADS["a5"])]}
    shared |= {"tensors.user_ids": [1, 2, 3], "tensors.history_ids": None, "candidate_revisions": None, "propensity": 1.0}
    for row in (first, second, new):
        assert {name: row[name] for name in shared} == shared
    assert [row["label"] for row in (first, second, new)] == [0, 1, 0]
    assert [row["p_click"] for row in (first, second, new)] == [0.5, 0.25, 0.166667]
    assert [row["position"] for row in (first, second, new)] == [3, 2, 1]
    assert [row["click_ts"] for row in (first, second, new)] == [None, T0 + 8, None]
    assert [(row["conversion"], row["value"]) for row in (first, second, new)] == [(0, None), (1, 5.0), (0, None)]
    assert [row["known"] for row in (first, second, new)] == [True, True, False]
    assert [row["revision"] for row in (first, second, new)] == [revision(ADS["a1"]), revision(ADS["a2"]), 0]
    assert [row["ad.price"] for row in (first, second, new)] == [1.0, 7.0, None]
    assert [row["ad.genre"] for row in (first, second, new)] == ["comedy", "news", "news"]
    assert [row["ad.tags"] for row in (first, second, new)] == [["x"], ["x", "y"], None]
    assert [row["tensors.ad_ids"] for row in (first, second, new)] == [[1, 2], [3, 4], [5, 6]]
    assert [row["tensors.ad_numbers"] for row in (first, second, new)] == [[0.5], [1.5], [2.5]]
    assert joining.counts == {
        "click joined": 2,
        "conversion joined": 2,
        "impression joined": 2,
        "rankings din": 1,
        **{f"rows din {i}": 1 for i in (1, 2, 3)},
    }


async def test_a_sink_writes_each_revision_of_an_ad_once_a_day(streams, joining):
    changed = ranking("r3", T0 + 8000)
    changed = replace(changed, ads={**changed.ads, "a1": ADS["a7"]})
    async with joining.joiner() as sink:
        for record in (ranking("r1"), ranking("r2", T0 + 4000), changed):
            streams.add(record)
            await sink.drain(True)
    ads = table(joining.folder, "ads")
    assert len(list((joining.folder / "ads").iterdir())) == 2
    assert ads.columns == ["ad_id", "revision", "ad.genre", "ad.tags", "ad.price"]
    assert sorted(ads["ad_id"]) == ["a1", "a1", "a2", "a3", "a4", "a5"]
    assert dict(zip(ads["revision"], ads["ad.price"], strict=True))[revision(ADS["a7"])] == 7.0
    found = joining.rows().join(ads, on=["ad_id", "revision"], how="left", suffix="_then")
    assert (found["ad.price"] == found["ad.price_then"]).all()


async def test_every_event_has_one_outcome(streams, joining):
    at = T0 + 1
    streams.add(ranking("r1", ad_ids=["a1", "a2"]), click(ts=at), click(ts=at), click(ad_id="a9"), click("nobody"), click(ts=T0 - 100))
    streams.add(click(ad_id="a2", ts=T0 + 1801), click("", ad_id="a1"), Event("ad", "e9", T0, ad_id="a1", features={"price": 1.0}))
    streams.add(conversion("long ago"))
    streams.add((EVENTS, b"\xc1 no record"), (SERVED, b"nor this"), (EVENTS, pack_event(click(ts=float("inf")))))
    streams.add((SERVED, pack_served(ranking("bad", p_click=[0.1, float("nan"), 0.3]))))
    streams.add(click(ad_id="a2", ts=at + 1), at=T0 + 1861)
    await joining.once()
    assert {name: count for name, count in joining.counts.items() if not name.startswith("r")} == {
        "click joined": 1,
        "click duplicate": 1,
        "click not_shown": 1,
        "click unknown_request": 2,
        "click before_ranking": 1,
        "click late": 2,
        "conversion deferred": 1,
        "foreign foreign": 1,
        "damaged damaged": 4,
    }
    aside = table(joining.folder, "raw/aside")
    assert dict(aside["why"].value_counts().iter_rows()) == {"foreign": 1, "damaged": 4}
    assert set(aside["packed"]) >= {b"\xc1 no record", b"nor this"}
    assert sorted(aside.filter(why="damaged")["stream"]) == [EVENTS, EVENTS, SERVED, SERVED]
    assert joining.rows()["label"].to_list() == [1, 0]


async def test_a_repeated_request_id_gets_the_click_that_came_after_it(streams, joining):
    first, second, third = ranking(ts=T0), ranking(ts=T0 + 100), ranking(ts=T0 + 200, ad_ids=["a9"])
    streams.add(first, second, third, click(ts=T0 + 50), click(ad_id="a2", ts=T0 + 150), click(ad_id="a3", ts=T0 + 250))
    streams.add(click(ad_id="a9", ts=T0 + 190))
    await joining.once()
    clicked = joining.rows().filter(label=1).select("ts", "ad_id").rows()
    assert clicked == [(int(T0), "a1"), (int(T0) + 100, "a2"), (int(T0) + 100, "a3"), (int(T0) + 200, "a9")]


async def test_an_impression_is_open_until_its_window_and_lateness_are_over(streams, joining):
    streams.add(ranking(), ranking("later", T0 + 5000), click(ts=T0 + 1700))
    for at, expected in ((T0 + 1859, []), (T0 + 1860, ["r1"]), (T0 + 6859, ["r1"]), (T0 + 6860, ["r1", "later"])):
        joining.at = at
        await joining.once()
        closed = joining.rows() if expected else pl.DataFrame({"request_id": [], "label": []})
        assert set(closed["request_id"]) == set(expected)
    with pytest.raises(DataError, match=r"has no row before 2025-11-22 09:00:00 UTC; 1 rankings are open: their windows are not over"):
        open_log(joining.folder, until=int(T0) + 1800, settings=Attribution(click_window=9e3))
    assert len(open_log(joining.folder, shares=(1, 0, 0), settings=Attribution(click_window=10, lateness=5)).parts) == 2
    assert joining.rows()["label"].to_list() == [0, 0, 0, 1, 0, 0]
    assert joining.counts["rows din 1"] == 2  # live figures tell each once


async def test_draining_closes_all(streams, joining):
    joining.at = T0 + 1
    streams.add(ranking(), click(ts=T0 + 1), click("other"))
    await joining.once(everything=True)
    assert joining.rows()["label"].to_list() == [1, 0, 0]
    assert joining.counts["click unknown_request"] == 1


async def test_files_from_before_there_were_bids_are_read_beside_others(streams, joining):
    streams.add(ranking())
    await joining.once()
    (older,) = joining.folder.glob("raw/impressions/*/*/*.parquet")
    frame = pl.read_parquet(older)
    frame.drop(*LATER).write_parquet(older)
    streams.add(ranking("r2", T0 + 1, bids=[5, -1, 7], bid_types=["cpa", "cpc", "cpc"], prices=[4, 0, 0], objective="ecpm"))
    await joining.once()
    rows = joining.rows().sort("request_id", "position").select("bid", "bid_type", "price", "objective").rows()
    assert rows == [(None,) * 4] * 3 + [(5, "cpa", 4, "ecpm"), (None, None, None, "ecpm"), (7, "cpc", 0, "ecpm")]


async def test_only_what_is_reported_counts_where_that_is_asked_for(streams, joining):
    joining.settings = replace(joining.settings, shown="reported")
    bids = {"bids": [-1, 250_000], "bid_types": ["cpc", "cpm"], "prices": [3, 2, 1], "objective": "ecpm"}
    streams.add(ranking(candidates=["a9", "a1"], ads={"a1": ADS["a1"], "a9": ADS["a9"]}, policy="epsilon_greedy 0.1", **bids))
    streams.add(click(ad_id="a2"), conversion(ad_id="a2"), impression(ad_id="a2"), click(), impression(ad_id="a3", position=9))
    streams.add(ranking("r2"))
    await joining.once()
    found = joining.rows()
    assert found.select("ad_id", "label", "position").rows() == [("a2", 1, 2), ("a3", 0, 9)]
    assert found["candidates"].to_list() == [["a9", "a1"], None]
    assert found["candidate_revisions"].to_list() == [[revision(ADS["a9"]), revision(ADS["a1"])], None]
    assert found["candidate_bids"].to_list() == [[-1, 250_000], None]
    assert found["candidate_bid_types"].to_list() == [["cpc", "cpm"], None]
    assert found.select("bid", "bid_type", "price", "objective").rows() == [(None, None, None, "ecpm")] * 2  # neither bids
    assert joining.counts["click no_impression"] == 1
    assert joining.counts["rankings din"] == 2


async def test_rankings_stand_by_the_hour_in_which_they_were_made_and_events_by_that_in_which_they_came(streams, joining):
    joining.sizes = {"rows_per_file": 2}
    streams.add(*(ranking(f"r{i}", T0 + 700 * i) for i in range(6)))
    for i in range(3):
        streams.add(click("r0", ts=T0 + i), at=T0 + 1700 * i)
    await joining.once()
    hours = {kind: {path.parent.name for path in joining.folder.glob(f"raw/{kind}/*/*/*")} for kind in ("impressions", "events")}
    assert hours == {"impressions": {"hour=08", "hour=09"}, "events": {"hour=08", "hour=09"}}
    for path in joining.folder.glob("raw/impressions/*/*/*"):
        assert {f"hour={ts % 86_400 // 3600:02.0f}" for ts in pl.read_parquet(path)["ts"]} == {path.parent.name}


async def test_what_the_schema_lacks_or_cannot_read_is_left_out_and_counted(streams, joining):
    odd = ranking(user={"age": 2.0**60, "hat": "red", "income": 3}, context={"slot": None}, sent={"a1": {"genre": ["no"], "x": 1}})
    streams.add(
        replace(odd, ads={**odd.ads, "a2": b"\xc1", "a5": b"\xc1 not looked at more than once"}, tensors={"ad_ids": b"12345", "what": b""})
    )
    await joining.once()
    row = joining.rows().to_dicts()[0]
    assert (row["user.age"], row["user.income"], row["context.slot"], row["ad.genre"], row["tensors.ad_ids"]) == (
        None,
        3.0,
        None,
        None,
        None,
    )
    assert (joining.counts["field_unknown"], joining.counts["value_unfit"]) == (3, 5)


async def test_the_schema_is_that_of_the_log_even_when_the_model_changes(streams, joining, tmp_path):
    models = tmp_path / "models"
    bundles.publish(models, "din")
    joining.models = models
    await joining.once()
    kept = (joining.folder / "schema.toml").read_text()
    richer = bundles.SCHEMA + '[context.hour]\nkind = "category"\nbuckets = 24\n'
    bundles.publish(models, "din", files={"schema.toml": richer.encode()})
    streams.add(ranking(context={"slot": "feed", "hour": "8"}))
    await joining.once()
    assert (joining.folder / "schema.toml").read_text() == kept
    assert "context.hour" not in joining.rows().columns
    assert joining.counts["field_unknown"] == 1


async def test_models_that_the_repository_lacks_share_one_name(streams, joining):
    streams.add(ranking(model="../../etc"), ranking("r2", model="other"))
    await joining.once()
    assert joining.counts["rankings _other"] == joining.counts["rankings other"] == 1
    assert set(joining.rows()["model"]) == {"../../etc", "other"}


async def test_a_ranking_without_ads_makes_no_row(streams, joining):
    streams.add(ranking(ad_ids=[]))
    streams.add(ranking("r2"))
    await joining.once()
    assert set(joining.rows()["request_id"]) == {"r2"}
    assert joining.counts["rankings din"] == 2
    assert joining.watch.known == {"unknown": 1, "said": 1}
