"""What is an impression, and whose click and conversion it is: through a real Valkey, and against a recomputation row by row."""

import random
from dataclasses import replace

import polars as pl
import pytest
from joining import T0, Joining, Writer, click, conversion, impression, ranking, rows, table

from training.datasets.log import CONVERSIONS, attributed, open_log, with_later

pytestmark = pytest.mark.anyio
DAY = 86_400.0


@pytest.fixture
def streams(shared_server):
    writer = Writer(shared_server.url)
    writer.redis.flushall()
    return writer


@pytest.fixture
def joining(shared_server, streams, tmp_path, repository):
    return Joining(shared_server.url, tmp_path / "log", repository, at=T0 + 10_000)


def ads_of(folder, name="r1"):
    return rows(folder).filter(request_id=name)["ad_id"].to_list()


async def test_an_ad_that_was_neither_said_nor_reported_to_be_shown_is_no_impression(streams, joining):
    streams.add(ranking(shown=0), click(), conversion(ad_id="a2"))
    streams.add(ranking("r2", shown=0), impression("r2", "a3"), click("r2", "a3"), click("r2", "a1"))
    streams.add(ranking("r3", shown=2), impression("r3", "a3"), click("r3", "a3"))
    streams.add(ranking("r4", shown=1))
    await joining.once()
    assert set(rows(joining.folder)["request_id"]) == {"r2", "r3", "r4"}
    assert (ads_of(joining.folder, "r2"), ads_of(joining.folder, "r3"), ads_of(joining.folder, "r4")) == (
        ["a3"],
        ["a1", "a2", "a3"],
        ["a1"],
    )
    assert rows(joining.folder)["label"].to_list() == [1, 0, 0, 1, 0]
    assert joining.watch.known == {"unknown": 1, "reported": 1, "said": 2}
    lost = table(joining.folder, "unjoined").select("request_id", "type", "outcome").sort("request_id", "type").rows()
    assert lost == [("r1", "click", "no_impression"), ("r1", "conversion", "no_impression"), ("r2", "click", "no_impression")]


@pytest.mark.parametrize(("mode", "counts"), [("told", [1, 1]), ("reported", [0, 1]), ("served", [3, 3])])
async def test_modes_of_what_an_impression_is(streams, joining, mode, counts):
    joining.settings = replace(joining.settings, shown=mode)
    streams.add(ranking(shown=1), ranking("r2", shown=0), impression("r2", "a2"))
    await joining.once()
    assert [ads_of(joining.folder, name) for name in ("r1", "r2")] == [
        ["a1", "a2", "a3"][: counts[0]],
        ["a1", "a2", "a3"] if mode == "served" else ["a2"],
    ]


async def test_the_joiner_says_that_rankings_do_not_train(streams, joining):
    streams.add(ranking(shown=0), ranking("r2", shown=1))
    async with joining.joiner() as joiner:
        await joiner.drain(True)
        assert "1 of 2 rankings do not train, since nobody said what of them was shown: let callers send options.top_k" in joiner.summary()


async def test_an_event_of_another_user_is_not_joined(streams, joining):
    streams.add(ranking(), click(user_id="u2"), conversion(ad_id="a2", user_id="u2"), click(ad_id="a2"), conversion(ad_id="a3", user_id=""))
    streams.add(ranking("r2", user_id="u2"), ranking("r2", T0 + 10, user_id="u1"), click("r2", "a1", T0 + 20, user_id="u2"))
    await joining.once()
    found = rows(joining.folder)
    assert found.filter(label=1).select("request_id", "user_id", "ad_id").rows() == [("r1", "u1", "a2"), ("r2", "u2", "a1")]
    assert found.filter(conversion=1)["ad_id"].to_list() == ["a3"]
    assert table(joining.folder, "unjoined").select("type", "outcome", "user_id").sort("type").rows() == [
        ("click", "other_user", "u2"),
        ("conversion", "other_user", "u2"),
    ]


async def test_each_type_of_event_has_a_window_of_its_own(streams, joining):
    joining.settings = replace(joining.settings, click_window=100, impression_window=10, conversion_window=1000)
    streams.add(ranking(shown=0), impression(ts=T0 + 10), impression(ad_id="a2", ts=T0 + 11), ranking("r2"))
    streams.add(click(ts=T0 + 100), click("r2", ts=T0 + 101), conversion(ts=T0 + 1000), conversion("r2", ts=T0 + 1001))
    await joining.once()
    found = rows(joining.folder)
    assert ads_of(joining.folder) == ["a1"]
    assert found.filter(label=1)["request_id"].to_list() == ["r1"]
    assert found.filter(conversion=1)["request_id"].to_list() == ["r1"]
    late = table(joining.folder, "unjoined").filter(outcome="late")
    assert sorted(late["type"]) == ["click", "conversion", "impression"]


async def test_rows_wait_for_clicks_and_conversions_are_joined_when_the_log_is_read(streams, joining):
    joining.time.wall = T0 + 2000
    streams.add(ranking(), conversion(ad_id="a2", value=1.0))
    await joining.once()
    assert rows(joining.folder)["value"].to_list() == [None, 1.0, None]
    joining.time.forward(6 * DAY)
    streams.add(conversion(ts=T0 + 5 * DAY, value=None), conversion(ad_id="a2", ts=T0 + 3 * DAY), conversion(ad_id="a9", ts=T0 + 9))
    streams.add(conversion(ad_id="a3", ts=T0 + 6 * DAY, user_id="u2"), conversion("never", ts=T0 + DAY))
    for _ in range(2):
        await joining.once()
        joining.time.forward(2 * DAY)
    streams.add(conversion(ad_id="a3", ts=T0 + 7 * DAY + 1))
    await joining.once()
    joining.time.forward(400)
    await joining.once()
    assert rows(joining.folder)["value"].to_list() == [None, 1.0, None]  # what is written stays as it is
    (frame,) = open_log(joining.folder).between(0, 1e12, ["conversion", "value"])
    assert frame.sort("position").select("ad_id", "conversion", "value").rows() == [("a1", 1, 0.0), ("a2", 1, 3.5), ("a3", 0, None)]
    assert len(next(open_log(joining.folder).between(0, 1e12))) == 3
    assert "value" not in next(open_log(joining.folder).between(0, 1e12)).columns


async def test_a_request_id_of_several_files_gets_a_late_conversion_once(streams, joining):
    joining.settings = replace(joining.settings, rows_per_file=3)
    streams.add(ranking(), ranking(ts=T0 + 0.5), ranking(ts=T0 + 4000))
    await joining.once(everything=True)
    joining.time.forward(DAY)
    streams.add(conversion(ts=T0 + 3000, value=1.0), conversion(ad_id="a2", ts=T0 + 5000, value=2.0))
    await joining.once(everything=True)
    frames = open_log(joining.folder).between(0, 1e12, ["value"])
    assert pl.concat(frames).filter(pl.col("value") > 0).select("ts", "ad_id", "value").rows() == [
        (int(T0), "a1", 1.0),
        (int(T0) + 4000, "a2", 2.0),
    ]


def by_hand(log, later):
    """The same, conversion by conversion."""
    log = [dict(row) for row in log]
    seen = set()
    for each in later:
        if (each["request_id"], each["event_id"]) in seen:
            continue
        seen.add((each["request_id"], each["event_id"]))
        fits = [
            row
            for row in log
            if (row["request_id"], row["ad_id"]) == (each["request_id"], each["ad_id"])
            and each["user_id"] in ("", row["user_id"])
            and -60 <= each["ts"] - row["ts"] <= each["window"]
        ]
        before = [row for row in fits if row["ts"] <= each["ts"]]
        if fits:
            row = max(before, key=lambda row: row["ts"]) if before else min(fits, key=lambda row: row["ts"])
            row["conversion"], row["value"] = 1, (row["value"] or 0.0) + (each["value"] or 0.0)
    return [(row["conversion"], None if row["value"] is None else round(row["value"], 6)) for row in log]


def test_what_is_joined_at_reading_is_what_a_recomputation_joins():
    chance = random.Random(7)
    log = [
        {"request_id": f"r{chance.randrange(12)}", "ad_id": f"a{chance.randrange(3)}", "user_id": f"u{chance.randrange(2)}", "ts": i * 37}
        | {"conversion": chance.randrange(2), "value": None}
        for i in range(300)
    ]
    for row in log:
        row["value"] = chance.random() if row["conversion"] else None
    later = [
        {"event_id": f"e{chance.randrange(300)}", "request_id": chance.choice(log)["request_id"], "ad_id": f"a{chance.randrange(3)}"}
        | {"user_id": chance.choice(["", "u0", "u1", "u2"]), "ts": chance.random() * 14_000 - 100, "window": chance.choice([50.0, 4000.0])}
        | {"value": chance.choice([None, 1.5, 2.0])}
        for _ in range(400)
    ]
    types = {"ts": pl.Int64, "conversion": pl.Int8, "value": pl.Float64}
    frame = pl.DataFrame(log, schema_overrides=types).with_row_index("row").with_columns(file=pl.lit("one"))
    found = with_later(frame, attributed(frame.drop("conversion", "value"), pl.DataFrame(later, schema=CONVERSIONS)))
    told = [(c, None if v is None else round(v, 6)) for c, v in found.select("conversion", "value").rows()]
    assert told == by_hand(log, later)
    assert told != [(row["conversion"], row["value"]) for row in log]
