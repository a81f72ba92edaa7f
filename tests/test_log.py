import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import bundles
import logs
import numpy as np
import polars as pl
import pytest
import small
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import run

from features.encode import Encoder
from features.schema import Schema
from features.served import ServedRecord
from features.state import pack_features
from training.datasets import log as log_module
from training.datasets.encoded import encode_split
from training.datasets.log import ImpressionLog, open_data, open_log
from training.datasets.prepared import SPLITS, DataError, open_prepared
from training.datasets.vocabularies import learn_vocabularies

START = 1_763_798_400  # 2025-11-22 08:00 UTC
ONLY_IDS = 'name = "ids"\nhistory = { length = 2, fields = ["ad_id"] }\n[ad.ad_id]\nkind = "category"\n'
NO_HISTORY = 'name = "plain"\n' + small.USER + small.AD


def served(ad_ids: list[str], number: int = 0, ts: float = START, **changes: Any) -> ServedRecord:
    """A ranking of the ads of `small`."""
    columns = {"ad_ids": ad_ids, "p_click": [0.5] * len(ad_ids), "propensity": [1.0] * len(ad_ids)}
    ads = {ad_id: pack_features(small.ad_features(int(ad_id[1:]))) for ad_id in ad_ids}
    whole = {"user": {"age": "25"}, "context": {"slot": "feed"}, "history": [], "ads": ads, **columns, **changes}
    return ServedRecord(request_id=f"r{number}", ts=ts, model="din", version=1, user_id=f"u{number % 3}", **whole)


def rankings(count: int, step: float = 60, ads: int = 3) -> list[ServedRecord]:
    return [served([f"a{(i + k) % small.ADS}" for k in range(ads)], i, START + i * step) for i in range(count)]


def times(data: ImpressionLog, split: str) -> list[float]:
    return [ts for frame in data.frames(split) for ts in frame["ts"]]


# --- what is encoded from the log is what was served


GENRES = st.sampled_from((*small.GENRES, "new"))
FEATURES = st.fixed_dictionaries(
    {},
    optional={
        "genre": st.none() | GENRES,
        "tags": st.none() | st.lists(st.sampled_from((*small.TAGS, "new")), max_size=3),
        "price": st.none() | st.floats(-5, 1e6),
        "later": st.just("not in the schema"),
    },
)
SENT = FEATURES.map(lambda features: {name: value for name, value in features.items() if name != "later"})
AD_IDS = st.sampled_from([f"a{i}" for i in range(6)] + ["new", "a\x1f1"])
USERS = st.fixed_dictionaries(
    {},
    optional={
        "age": st.none() | st.sampled_from((*small.AGES, "99")) | st.integers(20, 30),
        "interests": st.none() | st.lists(GENRES, max_size=5),
        "income": st.none() | st.floats(0, 1e5) | st.just("mistyped"),
    },
)


@st.composite
def ranked(draw: st.DrawFn) -> list[ServedRecord]:
    found = []
    for number in range(draw(st.integers(1, 5))):
        ad_ids = draw(st.lists(AD_IDS, min_size=1, max_size=4, unique=True))
        history = draw(st.lists(AD_IDS, max_size=6))
        known = draw(st.lists(st.sampled_from(sorted({*ad_ids, *history})), unique=True))
        left = [ad_id for ad_id in ad_ids if ad_id not in known or draw(st.booleans())]
        sent = draw(st.dictionaries(st.sampled_from(ad_ids), SENT))
        found.append(
            replace(
                served(["a0"], number, START + draw(st.floats(0, 9000))),
                ad_ids=ad_ids,
                p_click=[0.5] * len(ad_ids),
                propensity=[1.0] * len(ad_ids),
                user=draw(USERS),
                context=draw(st.sampled_from([{}, {"slot": "feed"}, {"slot": None}])),
                history=history,
                ads={ad_id: pack_features(draw(FEATURES)) for ad_id in known},
                unknown=left,
                sent=sent,
            )
        )
    return found


def check_encoded(rankings: list[ServedRecord], schema: Schema, encoder: Encoder) -> None:
    """Each row of the log of these rankings is encoded as the ranking was."""
    with TemporaryDirectory() as folder:
        data = open_log(logs.write_log(Path(folder) / "log", rankings, schema, files=2), shares=(1, 0, 0))
        keys = [(r, a) for frame in data.between(-np.inf, np.inf, ["request_id"]) for r, a in frame[["request_id", "ad_id"]].iter_rows()]
        rows = encode_split(data, "train", encoder)
    assert sorted(keys) == sorted((each.request_id, ad_id) for each in rankings for ad_id in each.ad_ids)
    of = {each.request_id: each for each in rankings}
    for row, (request_id, ad_id) in enumerate(keys):
        feeds = of[request_id].feeds(encoder, [ad_id])
        past = rows.behaviours.take(rows.history[row][: max(1, (rows.history[row] > 0).sum())])
        user, ad = rows.user.take(row), rows.ad.take(row)
        found = {"user_ids": user.ids, "user_numbers": user.numbers, "ad_ids": ad.ids, "ad_numbers": ad.numbers}
        found |= {"history_ids": past.ids, "history_numbers": past.numbers}
        for name, tensor in feeds.items():
            compared = tensor[0, 0] if name.startswith("ad_") else tensor[0]
            assert found[name].dtype == compared.dtype
            assert np.array_equal(found[name], compared), (name, request_id, ad_id)


@settings(max_examples=30)
@given(ranked())
def test_each_row_is_encoded_as_it_was_served(rankings: list[ServedRecord]) -> None:
    check_encoded(rankings, small.schema(), small.encoder())


@settings(max_examples=15)
@given(ranked(), st.sampled_from([ONLY_IDS, NO_HISTORY]))
def test_so_it_is_for_a_schema_of_ids_alone_and_for_one_without_a_history(rankings: list[ServedRecord], text: str) -> None:
    check_encoded(rankings, small.schema(text), small.encoder(text))


def test_an_ad_that_changed_is_seen_as_it_was(tmp_path: Path) -> None:
    before, after = ({"genre": genre, "price": price} for genre, price in (("drama", 1.0), ("news", 2.0)))
    both = [
        served(["a1"], i, START + i, history=["a2"], ads={"a1": pack_features(features), "a2": pack_features(features)})
        for i, features in enumerate((before, after))
    ]
    data = open_log(logs.write_log(tmp_path / "log", both, small.schema()), shares=(1, 0, 0))
    rows = encode_split(data, "train", small.encoder())
    vocabulary = small.vocabularies().categories["genre"]
    assert rows.ad.ids[:, 1].tolist() == vocabulary.encode(["drama", "news"]).tolist()
    assert rows.behaviours.ids[rows.history[:, 0], 1].tolist() == vocabulary.encode(["drama", "news"]).tolist()
    assert len(data.versions()) == 4
    assert data.table("ad")["ad.genre"].to_list() == ["news", "news"]


def test_an_ad_that_the_log_lacks_is_a_damage(tmp_path: Path) -> None:
    folder = logs.write_log(tmp_path / "log", [served(["a1"], history=["a1"])], small.schema())
    pl.read_parquet(ads := folder / "ads" / "00000000.parquet").clear().write_parquet(ads)
    with pytest.raises(DataError, match=r"ads lacks 1 versions of ads that rows name, the first is \d+ of a1"):
        encode_split(open_log(folder, shares=(1, 0, 0)), "train", small.encoder())


def test_vocabularies_hold_ads_not_their_versions(tmp_path: Path) -> None:
    data = open_log(logs.write_log(tmp_path / "log", [served(["a1"], history=["a2", "new"])], small.schema()), shares=(1, 0, 0))
    text = small.SCHEMA.replace('transform = "standard"\n', "")
    data = replace(data, schema=small.schema(text))
    assert learn_vocabularies(data).categories["ad_id"].values == ("a1", "a2", "new")


def test_a_network_is_trained_on_a_log(tmp_path: Path) -> None:
    made = rankings(150)
    clicks = {(each.request_id, ad_id) for each in made for ad_id in each.ad_ids if ad_id in ("a1", "a2", "a3")}
    folder = logs.write_log(tmp_path / "log", [replace(each, user={"age": "25", "income": 5.0}) for each in made], small.schema(), clicks)
    trained = small.quick(open_log(folder), epochs=3)
    assert trained.metrics["test"].auc > 0.9


# --- a window, and its splits


def test_a_second_with_many_rows_leaves_some_to_validate_on(tmp_path: Path) -> None:
    """A burst holds the ends of two shares: 70 of 100 rankings in a second, and 10 after it."""
    burst = [START + min(i, 20) if i < 90 else START + 20 + (i - 89) for i in range(100)]
    served_then = [served(["a1", "a2"], i, float(ts)) for i, ts in enumerate(burst)]
    data = open_log(logs.write_log(tmp_path / "log", served_then, small.schema()), shares=(0.5, 0.2, 0.3))
    found = {split: times(data, split) for split in SPLITS}
    assert {split: len(rows) for split, rows in found.items()} == {"train": 40, "valid": 140, "test": 20}
    assert max(found["train"]) < min(found["valid"]) <= max(found["valid"]) < min(found["test"])


def test_it_is_split_by_time_and_rankings_stay_together(tmp_path: Path) -> None:
    shuffled = [rankings(100)[i] for i in np.random.default_rng(1).permutation(100)]
    data = open_log(logs.write_log(tmp_path / "log", shuffled, small.schema(), files=3))
    found = {split: times(data, split) for split in SPLITS}
    assert [len(set(ts)) for ts in found.values()] == [80, 10, 10]
    assert sorted(ts for each in found.values() for ts in each) == sorted(each.ts for each in shuffled for _ in range(3))
    assert max(found["train"]) < min(found["valid"]) <= max(found["valid"]) < min(found["test"])


def test_a_cut_inside_a_ranking_moves_before_it(tmp_path: Path) -> None:
    folder = logs.write_log(tmp_path / "log", [served(["a1", "a2"], i, START + (i >= 2)) for i in range(4)], small.schema())
    data = open_log(folder, shares=(0.8, 0.2, 0.0))
    assert (times(data, "train"), times(data, "valid")) == ([START] * 4, [START + 1] * 4)


def test_a_window_takes_the_rows_of_its_seconds(tmp_path: Path) -> None:
    folder = logs.write_log(tmp_path / "log", rankings(200), small.schema())
    data = open_log(folder, START + 3600, START + 7200, shares=(0.5, 0.25, 0.25))
    found = [ts for split in SPLITS for ts in times(data, split)]
    assert (min(found), max(found), len(found)) == (START + 3600, START + 7140, 180)
    assert len(data.parts) == 1
    assert sum(map(len, data.between(START + 3600, START + 3661))) == 6
    assert sum(map(len, data.between(-np.inf, np.inf))) == 180


def test_the_position_where_it_was_shown_stands_in_for_a_context_field(tmp_path: Path) -> None:
    text = small.SCHEMA.replace("[ad.ad_id]", '[context.position]\nkind = "category"\n[ad.ad_id]')
    shown = served(["a1", "a2"], context={"slot": "feed", "position": "1"}, positions=[3, 5])
    folder = logs.write_log(tmp_path / "log", [shown], small.schema(text))
    for position_as, expected in ((None, ["1", "1"]), ("context.position", ["3", "5"])):
        (frame,) = open_log(folder, shares=(1, 0, 0), position_as=position_as).frames("train")
        assert frame["context.position"].to_list() == expected
    with pytest.raises(DataError, match=r"context\.place cannot take the position: the schema 'small' has no context category"):
        open_log(folder, position_as="context.place")


def test_frames_are_of_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "ROWS_PER_FILE", 50)
    folder = logs.write_log(tmp_path / "log", rankings(180), small.schema(), files=10)
    frames = list(open_log(folder, shares=(1, 0, 0)).frames("train"))
    assert max(map(len, frames)) <= 50
    assert sum(map(len, frames)) == 540
    assert len(frames) < 20
    monkeypatch.setattr(log_module, "ROWS_PER_FILE", 5)
    assert {len(frame) for frame in open_log(folder, shares=(1, 0, 0)).frames("train")} <= {1, 2, 3, 4, 5}


def test_what_the_joiner_adds_meanwhile_is_left_for_the_next_time(tmp_path: Path) -> None:
    folder = logs.write_log(tmp_path / "log", rankings(10), small.schema())
    data = open_log(folder, shares=(1, 0, 0))
    logs.write_log(folder, rankings(5), small.schema(), number=7)
    (folder / "day=2025-11-22" / "hour=08" / ".00000009.parquet").write_bytes(b"half")
    assert (len(times(data, "train")), len(times(open_log(folder, shares=(1, 0, 0)), "train"))) == (30, 45)


def test_a_log_opens_as_data_and_so_does_a_prepared_data_set(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    small.data_set(tmp_path / "data")
    folder = logs.write_log(tmp_path / "log", rankings(20), small.schema())
    assert isinstance(open_data(folder), ImpressionLog)
    assert open_data(tmp_path / "data") == open_prepared(tmp_path / "data")


def test_a_log_can_be_evaluated_on_from_the_command_line(tmp_path: Path) -> None:
    path = bundles.publish(tmp_path / "models", files={"calibration.json": b"{}"})
    made = [replace(each, ads={}) for each in rankings(40)]
    clicks = {(each.request_id, each.ad_ids[0]) for each in made}
    folder = logs.write_log(tmp_path / "log", made, bundles.encoder().schema, clicks)
    code, out, _ = run("evaluate", "--bundle", path, "--data", folder, "--json")
    assert (code, json.loads(out)["rows"], json.loads(out)["clicks"]) == (0, 12, 4)


# --- mistakes


def test_a_folder_that_is_no_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a prepared data set"):
        open_log(tmp_path)
    small.data_set(tmp_path)
    with pytest.raises(DataError, match="is not a log: it has no folder such as day=2026-11-22; adrank join writes one"):
        open_log(tmp_path)


def test_a_window_without_rows_is_refused(tmp_path: Path) -> None:
    folder = logs.write_log(tmp_path / "log", rankings(3), small.schema())
    with pytest.raises(DataError, match="has no row from 2025-11-22 08:03:00 UTC before 2025-11-22 09:00:00 UTC"):
        open_log(folder, START + 180, START + 3600)
    with pytest.raises(DataError, match=r"the test split of .* is empty: the window has too few rows, or too many of one moment"):
        open_log(folder).files("test")
    (empty := tmp_path / "empty").mkdir()
    (empty / ".join").mkdir()
    (empty / "schema.toml").write_text(small.SCHEMA)
    with pytest.raises(DataError, match=r"has no row$"):
        open_data(empty)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda frame: frame.drop("ts"), "column ts is missing"),
        (lambda frame: frame.with_columns(ts=pl.lit("now")), "holds something that is no time"),
        (lambda frame: frame.with_columns(ts=pl.lit(None, pl.Float64)), "holds something that is no time"),
        (lambda frame: frame.with_columns(label=pl.lit(2, pl.Int8)), "labels are not 0 or 1"),
        (lambda frame: frame.drop("known"), "column known is missing"),
        (lambda frame: frame.with_columns(history_revisions=pl.lit([], pl.List(pl.UInt64))), "differ in length"),
        (lambda frame: frame.with_columns(history=pl.lit([None], pl.List(pl.String))), "differ in length, or have gaps"),
        (lambda frame: frame.with_columns(pl.lit(1.5).alias("ad.genre")), r"column ad\.genre is Float64, expected String"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, change: Any, complaint: str) -> None:
    folder = logs.write_log(tmp_path / "log", [served(["a1"], history=["a2"])], small.schema())
    (path,) = folder.glob("day=*/hour=*/*")
    change(pl.read_parquet(path)).write_parquet(path)
    with pytest.raises(DataError, match=f"00000000.parquet: .*{complaint}"):
        list(open_log(folder, shares=(1, 0, 0)).frames("train"))


def test_what_is_no_parquet_or_no_hour_is_named(tmp_path: Path) -> None:
    folder = logs.write_log(tmp_path / "log", rankings(2), small.schema())
    (path,) = folder.glob("day=*/hour=*/*")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"00000000\.parquet cannot be read as parquet"):
        open_log(folder)
    (folder / "day=today" / "hour=9").mkdir(parents=True)
    with pytest.raises(DataError, match="is not an hour of a log, such as"):
        open_log(folder)
