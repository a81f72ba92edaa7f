"""What is an impression, and whose click and conversion it is: through a real Valkey, and against a recomputation event by event."""

import random
from collections import Counter, defaultdict
from dataclasses import replace
from math import inf

import logs
import polars as pl
import pytest
import small
from joining import T0, click, conversion, impression, messy, ranking
from test_cli import run

from training.datasets.log import open_log
from training.join.attribution import SETTINGS, Attribution, RawLog, settings_of, settle

pytestmark = pytest.mark.anyio
DAY = 86_400.0


@pytest.fixture
def server(shared_server):
    return shared_server


def ads_of(joining, name="r1"):
    return joining.rows().filter(request_id=name)["ad_id"].to_list()


async def test_an_ad_that_was_neither_said_nor_reported_to_be_shown_is_no_impression(streams, joining):
    streams.add(ranking(shown=0), click(), conversion(ad_id="a2"))
    streams.add(ranking("r2", shown=0), impression("r2", "a3"), click("r2", "a3"), click("r2", "a1"))
    streams.add(ranking("r3", shown=2), impression("r3", "a3"), click("r3", "a3"))
    streams.add(ranking("r4", shown=1))
    await joining.once()
    found = joining.rows().group_by("request_id", maintain_order=True).agg("ad_id").rows()
    assert found == [("r2", ["a3"]), ("r3", ["a1", "a2", "a3"]), ("r4", ["a1"])]
    assert joining.rows()["label"].to_list() == [1, 0, 0, 1, 0]
    assert joining.watch.known == {"unknown": 1, "reported": 1, "said": 2}
    assert (joining.counts["click no_impression"], joining.counts["conversion no_impression"]) == (2, 1)


@pytest.mark.parametrize(("mode", "counts"), [("told", [1, 1]), ("reported", [0, 1]), ("served", [3, 3])])
async def test_modes_of_what_an_impression_is(streams, joining, mode, counts):
    joining.settings = replace(joining.settings, shown=mode)
    streams.add(ranking(shown=1), ranking("r2", shown=0), impression("r2", "a2"))
    await joining.once()
    assert [ads_of(joining, name) for name in ("r1", "r2")] == [
        ["a1", "a2", "a3"][: counts[0]],
        ["a1", "a2", "a3"] if mode == "served" else ["a2"],
    ]


async def test_the_sink_says_that_rankings_do_not_train(streams, joining):
    streams.add(ranking(shown=0), ranking("r2", shown=1))
    async with joining.joiner() as sink:
        await sink.drain(True)
        assert "1 of 2 rankings do not train, since nobody said what of them was shown: let callers send options.top_k" in sink.summary()


async def test_an_event_of_another_user_is_not_joined(streams, joining):
    streams.add(ranking(), click(user_id="u2"), conversion(ad_id="a2", user_id="u2"), click(ad_id="a2"), conversion(ad_id="a3", user_id=""))
    streams.add(ranking("r2", user_id="u2"), ranking("r2", T0 + 10, user_id="u1"), click("r2", "a1", T0 + 20, user_id="u2"))
    await joining.once()
    found = joining.rows()
    assert found.filter(label=1).select("request_id", "user_id", "ad_id").rows() == [("r1", "u1", "a2"), ("r2", "u2", "a1")]
    assert found.filter(conversion=1)["ad_id"].to_list() == ["a3"]
    assert (joining.counts["click other_user"], joining.counts["conversion other_user"]) == (1, 1)


async def test_each_type_of_event_has_a_window_of_its_own_and_they_may_be_chosen_anew(streams, joining):
    joining.settings = replace(joining.settings, click_window=100, impression_window=10, conversion_window=1000)
    streams.add(ranking(shown=0), ranking("r2"), impression(ts=T0 + 10), impression(ad_id="a2", ts=T0 + 11))
    streams.add(click(ts=T0 + 100), click("r2", ts=T0 + 101), conversion(ts=T0 + 1000), conversion("r2", ts=T0 + 1001))
    await joining.once()
    found = joining.rows()
    assert ads_of(joining) == ["a1"]
    assert found.filter(label=1)["request_id"].to_list() == ["r1"]
    assert found.filter(conversion=1)["request_id"].to_list() == ["r1"]
    assert [joining.counts[f"{kind} late"] for kind in ("click", "conversion", "impression")] == [1, 1, 1]
    joining.settings = Attribution(click_window=101, conversion_window=999)
    found = joining.rows()
    assert found.filter(label=1)["request_id"].to_list() == ["r1", "r2"]
    assert found.filter(conversion=1).is_empty()
    assert len(found.filter(request_id="r1")) == 2


async def test_conversions_are_joined_whenever_they_came(streams, joining):
    joining.at = T0 + 2000
    streams.add(ranking(), conversion(ad_id="a2", value=1.0))
    await joining.once()
    assert joining.rows()["value"].to_list() == [None, 1.0, None]
    streams.add(conversion(ad_id="a2", ts=T0 + 3 * DAY), conversion(ts=T0 + 5 * DAY, value=None), conversion(ad_id="a9", ts=T0 + 9))
    streams.add(conversion(ad_id="a3", ts=T0 + 6 * DAY, user_id="u2"), conversion(ad_id="a3", ts=T0 + 7 * DAY + 1))
    await joining.once()
    (frame,) = open_log(joining.folder).between(0, 1e12, ["conversion", "value"])
    assert frame.sort("position").select("ad_id", "conversion", "value").rows() == [("a1", 1, 0.0), ("a2", 1, 3.5), ("a3", 0, None)]
    assert "value" not in next(open_log(joining.folder).between(0, 1e12)).columns


def test_a_log_says_with_what_it_was_written_and_readers_may_say_otherwise(streams, joining, shared_server, repository):
    streams.add(ranking(ts=T0), click(ts=T0 + 8), conversion(ts=T0 + 9))
    options = ("--redis", shared_server.url, "--log", joining.folder, "--models", repository, "--name", "din")
    code, out, err = run("join", *options, "--window", 5, "--lateness", 1, "--conversion-window", 60, "--drain")
    assert code == 0, (out, err)
    assert settings_of(joining.folder) == Attribution(5, None, 60, 1, "told")
    frames = [open_log(joining.folder, shares=(1, 0, 0), settings=each) for each in (None, settings_of(joining.folder, click_window=8))]
    assert [next(each.frames("train"))["label"].sum() for each in frames] == [0, 1]
    for wrong in ("click_window = ", 'click_window = "5"', "windows = 5"):
        (joining.folder / SETTINGS).write_text(wrong)
        code, out, err = run("skew", "--log", joining.folder, "--models", repository)
        assert code == 2
        assert str(joining.folder / SETTINGS) in err
    code, out, err = run("train", "--log", repository, "--model", "din", "--click-window", 5)
    assert (code, "is not a log, so it has no windows: leave out --click-window" in err) == (2, True)


def expected(log, events, settings) -> tuple[list[tuple], Counter[str]]:
    """The same, event by event: rows of (request, time, ad, label, position, value), and outcomes."""
    came, outcomes, seen = defaultdict(list), Counter[str](), set()
    for event in events:
        subject = event.user_id if event.type == "click" else event.request_id
        if (event.type, subject, event.event_id) in seen:
            outcomes["duplicate"] += 1
            continue
        seen.add((event.type, subject, event.event_id))
        named = [each for each in log if each.request_id == event.request_id]
        answered = [each for each in named if event.ad_id in each.ad_ids]
        own = [each for each in answered if event.user_id in ("", each.user_id)]
        fits = [each for each in own if each.ts <= event.ts + 60]
        before = [each for each in fits if each.ts <= event.ts]
        if not fits:
            outcomes["before_ranking" if own else "other_user" if answered else "not_shown" if named else "unknown_request"] += 1
            continue
        chosen = max(before, key=lambda each: each.ts) if before else min(fits, key=lambda each: each.ts)
        late = event.ts > chosen.ts + settings.windows[event.type]
        outcomes["late" if late else "joined"] += 1
        if not late:
            came[id(chosen), event.ad_id].append(event)
    rows = []
    for each in log:
        for i, ad_id in enumerate(each.ad_ids):
            of = came[id(each), ad_id]
            reports = sorted((event.ts, event.event_id, event.position) for event in of if event.type == "impression")
            if i < each.shown or reports:
                values = [event.value or 0.0 for event in of if event.type == "conversion"]
                label = int(any(event.type == "click" for event in of))
                position = (reports[0][2] if reports else None) or i + 1
                rows.append((each.request_id, int(each.ts), ad_id, label, position, round(sum(values), 6) if values else None))
    return sorted(rows), outcomes


async def test_it_is_what_a_recomputation_says(streams, joining, monkeypatch):
    """Request ids that come again, in other hours too; events of all kinds, repeated, early, late, of others; records that stand twice."""
    chance = random.Random(7)
    monkeypatch.setattr("training.join.live.HOURS", 48)
    joining.settings = replace(joining.settings, click_window=4000.0, impression_window=900.0, conversion_window=9000.0)
    log, events = messy(chance)
    streams.add(*log, *events)
    await joining.once(everything=True)
    for path in list(joining.folder.glob("raw/*/*/*/*.parquet")):  # as if a sink had been killed before it acknowledged
        path.with_name(f"again-{path.name}").write_bytes(path.read_bytes())
    names = ["request_id", "ts", "ad_id", "label", "position", "value"]
    rows, outcomes = expected(log, events, joining.settings)
    assert sorted(joining.rows().with_columns(pl.col("value").round(6)).select(names).rows()) == rows
    assert sum(row[3] for row in rows) > 15
    raw = RawLog(joining.folder, open_log(joining.folder).schema)
    settled = settle(raw.events(0, inf), raw.rankings(0, inf, joining.settings), joining.settings).collect()
    assert Counter(settled["outcome"]) == outcomes
    live_counts = joining.watch.counts  # live figures, which look at the newest hours for what belongs to nothing
    assert (
        sum(live_counts[kind, outcome] for kind in joining.settings.windows for outcome in ("joined", "no_impression"))
        == outcomes["joined"]
    )
    assert sum(count for (kind, *_), count in live_counts.items() if kind in joining.settings.windows) == len(events)


def test_a_log_of_the_layout_of_before_is_read_with_the_conversions_that_came_later(tmp_path):
    log = [ranking("r1"), ranking("r1", T0 + 30), ranking("r2", T0 + 4000)]
    folder = logs.write_log(tmp_path / "log", [replace(each, ads={}) for each in log], small.schema(), {("r1", "a2")}, files=2)
    (folder / "conversions").mkdir()
    came = [("e1", T0 + 20, "u1", "r1", "a1", 1.0), ("e1", T0 + 20, "u1", "r1", "a1", 1.0), ("e2", T0 + 5000, "", "r1", "a1", 2.0)]
    came += [
        ("e3", T0 + 5000, "u2", "r2", "a1", 4.0),
        ("e4", T0 + 9 * DAY, "u1", "r2", "a1", 8.0),
        ("e5", T0 + 5000, "u1", "r2", "a3", None),
    ]
    names = ["event_id", "ts", "user_id", "request_id", "ad_id", "value"]
    pl.DataFrame(came, names, orient="row").with_columns(window=7 * DAY).write_parquet(folder / "conversions" / "00000001.parquet")
    frames = pl.concat(open_log(folder).between(0, 1e12, ["conversion", "value", "request_id"])).filter(pl.col("conversion") == 1)
    found = frames.sort("ts", "ad_id").select("request_id", "ts", "ad_id", "value").rows()
    assert found == [("r1", T0, "a1", 1.0), ("r1", T0 + 30, "a1", 2.0), ("r2", T0 + 4000, "a3", 0.0)]
    assert pl.concat(open_log(folder).between(0, 1e12))["label"].sum() == 2
