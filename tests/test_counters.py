import math
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from rich.progress import Progress

from features.counters import Counter, CountTable, counted, counts_before, decayed
from features.counting import numbers_of
from features.encode import AdTable, Encoder
from features.events import Event
from features.schema import SchemaError, parse_schema
from features.state import Ad, MemoryStore
from features.vocabulary import Vocabularies, Vocabulary
from service.catalogue.catalogue import put_ads
from service.feedback.ingest import Ages, Intake
from service.telemetry.metrics import Metrics
from tests.test_csv_table import prepare_csv
from tests.test_datasets import rows
from training.datasets.prepared import DataError, open_prepared
from training.datasets.states import ads
from training.datasets.vocabularies import learn_vocabularies
from training.loading import Loading

FIELDS = """
name = "counted"
[user.user_id]
kind = "category"
[ad.ad_id]
kind = "category"
[ad.topic]
kind = "list"
length = 2
"""
COUNTERS = """
[counter.clicks]
of = "click"
by = "ad"
window = "1h"
[counter.rate]
of = "click/impression"
by = "ad"
window = "1d"
prior = [2, 10]
transform = "none"
[counter.shown]
of = "impression"
by = "user"
window = "10m"
[counter.liked]
of = "click"
by = ["user", "topic"]
window = "7d"
[counter.seen]
of = "impression"
by = ["user", "ad_id"]
window = "1d"
"""
TABLE = '[table]\nts = "time"\nlabel = "click"\nsplit = [0.5, 0.25, 0.25]\nnobody = []\n'


def test_counters_are_fields_of_the_side_that_they_differ_by_and_survive_a_schema_file() -> None:
    schema = parse_schema(FIELDS + COUNTERS)
    assert {field.path: (field.transform, field.missing) for field in schema.fields if field.counter} == {
        "ad.clicks": ("log", 0.0),
        "ad.rate": ("none", 0.2),
        "user.shown": ("log", 0.0),
        "ad.liked": ("log", 0.0),
        "ad.seen": ("log", 0.0),
    }
    assert parse_schema(schema.to_toml()) == schema
    assert schema.told == parse_schema(FIELDS)
    assert "counter" not in schema.told.canonical(), "fingerprints of schemas without counters are what they were"
    assert parse_schema(FIELDS + COUNTERS.replace("7d", "8d")).canonical() != schema.canonical()


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ('of = "view"\nby = "ad"\nwindow = "1h"', "of must be one of click, impression, conversion"),
        ('of = "click/click"\nby = "ad"\nwindow = "1h"', "or two of them as a rate"),
        ('of = "click"\nby = ["ad", "topic"]\nwindow = "1h"', 'by must be "ad", "user", or'),
        ('of = "click"\nby = ["user", "colour"]\nwindow = "1h"', "by names colour, which is no category or list of ads"),
        ('of = "click"\nby = "ad"\nwindow = "0h"', "window must be a time such as"),
        ('of = "click"\nby = "ad"\nwindow = "1h"\nprior = [1, 20]', "prior must be two numbers"),
        ('of = "click"\nby = "ad"\nwindow = "1h"\ntransform = "root"', "transform must be one of"),
        ('of = "click"\nby = "ad"\nwindow = "1h"\nkind = "number"', "unknown settings"),
    ],
)
def test_a_counter_that_cannot_be_is_refused_in_a_sentence(table: str, said: str) -> None:
    with pytest.raises(SchemaError, match=f"counter odd: .*{said}"):
        parse_schema(f"{FIELDS}\n[counter.odd]\n{table}")


def test_a_counter_has_a_name_of_its_own_and_is_no_part_of_a_behaviour() -> None:
    with pytest.raises(SchemaError, match=r"there is a field ad\.topic already"):
        parse_schema(FIELDS + '[counter.topic]\nof = "click"\nby = "ad"\nwindow = "1h"')
    with pytest.raises(SchemaError, match="clicks is a counter, which behaviours do not have"):
        parse_schema(f'{FIELDS}{COUNTERS}\n[history]\nlength = 3\nfields = ["ad_id", "clicks"]')


def test_a_count_decays_and_takes_events_in_any_order() -> None:
    times = [100.0, 160.0, 130.0, 100.0]
    count = (0.0, 0.0)
    for ts in times:
        count = counted(count, ts, 60.0)
    assert count[1] == 160.0
    assert count[0] == pytest.approx(1 + math.exp(-0.5) + 2 * math.exp(-1.0))
    assert decayed(count[0], 220.0 - count[1], 60.0) == pytest.approx(sum(math.exp(-(220 - ts) / 60) for ts in times))
    assert decayed(3.0, -50.0, 60.0) == 3.0, "a count of later is not blown up"


def brute_force(groups: list[int], ts: list[float], happened: list[int], window: float) -> list[float]:
    """By the definition, and the arithmetic that the service has: each row's group is counted event by event."""
    found = []
    for group, now in zip(groups, ts, strict=True):
        count = (0.0, 0.0)
        for other, at, event in zip(groups, ts, happened, strict=True):
            if other == group and at < now and event:
                count = counted(count, at, window)
        found.append(0.0 if group < 0 else float(decayed(count[0], now - count[1], window)))
    return found


@pytest.mark.parametrize("seed", range(5))
def test_counts_before_rows_are_those_that_the_service_would_have_had(seed: int) -> None:
    random = np.random.default_rng(seed)
    groups, happened = random.integers(-1, 4, 200), random.integers(0, 2, 200)
    ts = np.sort(random.choice([random.integers(0, 40, 200) * 10.0, random.uniform(0, 1e6, 200)]))
    found = counts_before(groups, ts, happened, 60.0)
    assert found == pytest.approx(brute_force(groups.tolist(), ts.tolist(), happened.tolist(), 60.0), rel=1e-9, abs=1e-12)


def test_a_table_of_counts_has_what_each_count_has_become_however_far_apart_times_are() -> None:
    counters = [Counter(("click", "impression"), ("ad",), 60.0, (2.0, 10.0)), Counter(("click",), ("ad",), 86_400.0)]
    table, random, now = CountTable(counters, 1), np.random.default_rng(2), 1.8e9
    keys = ("click@60", "impression@60", "click@86400")
    table.grow(20)
    kept: dict[int, dict[str, dict[str, tuple[float, float]]]] = {row: {} for row in range(20)}
    for step in range(200):
        now += float(random.choice([0.0, 5.0, 3_000.0, 40_000.0, 3e6, -3_000.0]))
        row, when = int(random.integers(20)), now + float(random.choice([-1e6, -50.0, 0.0, 290.0]))
        key = keys[step % 3]
        kept[row] |= {key: {"": (float(random.uniform(0, 9)), when)}}
        table.put([row], [kept[row]])
        click, shown, daily = (np.array([kept[i].get(key, {}).get("", (0.0, 0.0)) for i in range(20)]) for key in keys)
        rate = (2.0 + decayed(click[:, 0], now - click[:, 1], 60.0)) / (10.0 + decayed(shown[:, 0], now - shown[:, 1], 60.0))
        assert table.numbers(np.arange(20), now) == pytest.approx(
            np.array([rate, decayed(daily[:, 0], now - daily[:, 1], 86_400.0)]), rel=1e-9
        )


@pytest.mark.parametrize("values", [3, 40])
@pytest.mark.parametrize("known", [20, 12_000])
def test_a_users_numbers_are_those_of_the_values_that_ads_have(values: int, known: int) -> None:
    """However many values the vocabulary knows and the user has; ads whose value it does not know have nothing."""
    schema = parse_schema(
        FIELDS.replace('kind = "list"\nlength = 2', 'kind = "category"')
        + COUNTERS.replace('click"\nby = ["user"', 'click/impression"\nby = ["user"')
    )
    topics = [f"t{i}" for i in range(known)]
    encoder = Encoder(schema, Vocabularies({"user_id": Vocabulary([]), "ad_id": Vocabulary([]), "topic": Vocabulary(topics)}, {}))
    table, ad_ids = AdTable(encoder), [f"a{i}" for i in range(60)]
    of = [topics[i % 30 % known] if i % 7 else "unheard of" for i in range(60)]
    table.put(ad_ids, encoder.encode("ad", {"ad_id": ad_ids, "topic": of}, 60))
    counts = {
        f"{event}@604800@topic": {f"t{i}": (1.0 + i, 100.0 * i) for i in range(skip, values)}
        for skip, event in enumerate(("click", "impression"))
    }
    counts["click@604800@topic"]["unheard of"] = counts["click@604800@topic"]["another"] = (9.0, 0.0)
    counts["impression@86400@ad_id"] = {f"a{i}": (2.0, 50.0) for i in range(50, 50 + values)}
    _, found = numbers_of(table, ad_ids, table.rows(ad_ids), counts, 5_000.0)

    def much(key: str, value: str, window: float) -> float:
        count = counts[key].get(value, (0.0, 0.0))
        return 0.0 if value == "unheard of" else float(decayed(count[0], 5_000.0 - count[1], window))

    liked = [(1 + much("click@604800@topic", each, 604_800.0)) / (20 + much("impression@604800@topic", each, 604_800.0)) for each in of]
    assert found[encoder.counted.index("liked")] == pytest.approx(liked)
    assert found[encoder.counted.index("seen")] == pytest.approx([much("impression@86400@ad_id", ad_id, 86_400.0) for ad_id in ad_ids])


def test_prepare_makes_counters_of_what_was_before_each_row(tmp_path: Path) -> None:
    table = pl.DataFrame(
        {
            "time": [0, 0, 600, 600, 1200, 4800, 4800, 9000],
            "user_id": ["u1", "u1", "u1", "u2", "u1", "", "u2", "u1"],
            "ad_id": ["a1", "a2", "a1", "a1", "a2", "a1", "a3", "a1"],
            "topic": ["t|x", "s", "t", "t", "t", "t", None, "t"],
            "click": [1, 0, 1, 0, 1, 1, 1, 0],
        }
    )
    rate = '[counter.unsaid]\nof = "click/impression"\nby = "ad"\nwindow = "1d"\n'
    prepared = prepare_csv(tmp_path, table, FIELDS + COUNTERS + rate + TABLE)
    data = rows(prepared)
    hour, day, week = (lambda *ages, w=w: sum(math.exp(-age / w) for age in ages) for w in (3600, 86_400, 604_800))
    assert data["ad.clicks"].to_list() == pytest.approx([0, 0, hour(600), hour(600), 0, hour(4800, 4200), 0, hour(9000, 8400, 4200)])
    rate = [0.2, 0.2, (2 + day(600)) / (10 + day(600)), (2 + day(600)) / (10 + day(600)), 2 / (10 + day(1200))]
    assert data["ad.rate"].to_list()[:5] == pytest.approx(rate)
    assert open_prepared(prepared).schema.counters["unsaid"].prior == (10, 20), "of the four rows of train two are clicks"
    assert data["ad.unsaid"].to_list()[:3] == pytest.approx([0.5, 0.5, (10 + day(600)) / (20 + day(600))])
    ten = [math.exp(-age / 600) for age in range(9001)]
    shown = [0, 0, 2 * ten[600], 0, 2 * ten[1200] + ten[600], 0, ten[4200], 2 * ten[9000] + ten[8400] + ten[7800]]
    assert data["user.shown"].to_list() == pytest.approx(shown)
    assert data["ad.liked"].to_list() == pytest.approx([0, 0, week(600), 0, week(1200, 600), 0, 0, week(9000, 8400, 7800)])
    assert data["ad.seen"].to_list() == pytest.approx([0, 0, day(600), 0, day(1200), 0, 0, day(9000, 8400)])


def test_a_log_that_kept_half_of_the_non_clicks_counts_as_the_whole_does(tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    told = {name: random.choice(values, 60).tolist() for name, values in {"user_id": ["u1", "u2"], "ad_id": ["a1", "a2"]}.items()}
    half = pl.DataFrame(told | {"topic": "t", "time": np.arange(60) * 600, "click": random.integers(0, 2, 60)})
    whole = pl.concat([half, half.filter(click=0)]).sort("time")
    rate = '[counter.unsaid]\nof = "click/impression"\nby = "ad"\nwindow = "1d"\n'
    found = []
    for name, table, share in (("half", half, 0.5), ("whole", whole, 1.0)):
        (folder := tmp_path / name).mkdir()
        settings = TABLE.replace("[0.5, 0.25, 0.25]", f'"split"\nnegative_sampling = {share}')
        split = pl.when(pl.col("time") < 30_000).then(pl.lit("train")).otherwise(pl.when(pl.col("time") < 33_000).then(pl.lit("valid")))
        data = open_prepared(prepare_csv(folder, table.with_columns(split=split.fill_null("test")), FIELDS + COUNTERS + rate + settings))
        counted = rows(data.folder).unique("ts", maintain_order=True).select(each.path for each in data.schema.fields if each.counter)
        found.append((counted.rows(), data.schema.counters["unsaid"].prior, {ad.ad_id: ad.counts for ad in ads(data)}))
    (ours, prior, stored), (theirs, their_prior, their_stored) = found
    assert np.array(ours) == pytest.approx(np.array(theirs))
    assert prior == their_prior
    for ad_id, counts in stored.items():
        for key, tally in counts.items():
            assert {value: much for value, (much, _) in tally.items()} == pytest.approx(
                {value: much for value, (much, _) in their_stored[ad_id][key].items()}
            )


@pytest.mark.anyio
async def test_counts_that_are_loaded_are_those_of_the_same_events_and_of_the_rows_that_come_next(tmp_path: Path) -> None:
    """Offline, by `adrank load` and event by event; loading twice changes nothing, and what comes after is counted on top."""
    random, now, end = np.random.default_rng(3), float(round(time.time())), 50_000
    shown = {
        "time": np.sort(random.integers(0, 40_000, 300)) + int(now) - end,
        "user_id": random.choice(["u1", "u2", "u3"], 300),
        "ad_id": random.choice(["a1", "a2", "a3"], 300),
        "click": random.integers(0, 2, 300),
    }
    table = pl.DataFrame(shown).with_columns(topic=pl.col("ad_id").replace({"a1": "t|x", "a2": "t", "a3": "s"}))
    pairs = [(user, ad) for user in ("u1", "u2", "u3") for ad in ("a1", "a2", "a3")]
    asked = pl.DataFrame(pairs, ["user_id", "ad_id"], orient="row").with_columns(time=pl.lit(int(now), pl.Int64), click=pl.lit(0, pl.Int64))
    probes = asked.join(table.select("ad_id", "topic").unique(), on="ad_id", maintain_order="left").select(table.columns)
    (tmp_path / "probed").mkdir()
    offline = open_prepared(prepare_csv(tmp_path / "probed", pl.concat([table, probes]), FIELDS + COUNTERS + TABLE))
    last, names = rows(offline.folder).tail(len(pairs)).to_dicts(), [each.path for each in offline.schema.fields if each.counter]
    expected = {(row["user_id"], row["ad_id"], name): row[name] for row in last for name in names}
    prepared = open_prepared(prepare_csv(tmp_path, table, FIELDS + COUNTERS + TABLE))
    encoder = Encoder(prepared.schema, learn_vocabularies(prepared))
    loaded, told = MemoryStore(), MemoryStore()
    features = {ad.ad_id: ad.features for ad in ads(prepared)}

    async def tell(store: MemoryStore, kinds: pl.DataFrame) -> None:
        taken = Intake(store, Metrics(), lambda: [encoder], Ages(1e6, 1e6), lambda: now)
        taken.features = lambda ad_ids: {ad_id: features[ad_id] for ad_id in ad_ids}
        events = [
            Event(kind, f"{kind}{i}-{row['time']}", float(row["time"]), row["user_id"], "r", row["ad_id"])
            for i, row in enumerate(kinds.to_dicts())
            for kind in (["impression", "click"] if row["click"] else ["impression"])
        ]
        assert {outcome.status for outcome in await taken.take(events)} == {"accepted"}

    async def numbers(store: MemoryStore) -> dict[tuple[str, str, str], float]:
        ad_ids = list(features)
        table = AdTable(encoder)
        put_ads(table, stored := [ad async for batch in store.all_ads() for ad in batch])
        table.count([ad.ad_id for ad in stored], [ad.counts for ad in stored])
        found = {}
        for user in ("u1", "u2", "u3"):
            of_user, of_ads = numbers_of(table, ad_ids, table.rows(ad_ids), (await store.get_user(user)).counts, now)
            for ad, row in zip(ad_ids, of_ads.T.tolist(), strict=True):
                found |= {(user, ad, f"user.{name}"): each for name, each in of_user.items()}
                found |= {(user, ad, f"ad.{name}"): each for name, each in zip(encoder.counted, row, strict=True)}
        return found

    await told.put_ads(Ad(ad_id, known) for ad_id, known in features.items())
    await tell(told, table)
    with Progress(disable=True) as progress:
        for _ in range(2):
            await Loading(loaded, prepared, progress).merge()
            assert await numbers(loaded) == pytest.approx(expected, rel=1e-9)
        assert await numbers(loaded) == pytest.approx(await numbers(told), rel=1e-9)
        for store in (loaded, told):
            await tell(store, asked)
        await Loading(loaded, prepared, progress).merge()
        assert await numbers(loaded) == pytest.approx(await numbers(told), rel=1e-9)


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        (FIELDS + COUNTERS + TABLE.replace('ts = "time"\n', ""), "tables need times: name ts"),
        (FIELDS + COUNTERS.replace('"click"', '"conversion"') + TABLE, "does not say when its conversion came"),
    ],
)
def test_what_a_table_cannot_count_is_refused(tmp_path: Path, schema: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        prepare_csv(tmp_path, "time,user_id,ad_id,topic,click\n1,u,a,t,1\n", schema)
