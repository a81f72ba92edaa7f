"""The ages of behaviours, from the clock of the service over the log to training: an age that was served is the age that is trained on."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import small
import torch

from features.ages import ages_of
from features.encode import AdTable, Encoder, Request, encode_request
from features.schema import SchemaError, parse_schema
from features.served import ServedRecord, pack_served, unpack_served
from features.streams import SERVED, Entry
from service.api.requests import parse_request, to_query
from service.ranking.tiles import fill, runs
from training.datasets import csv_table
from training.datasets.encoded import encode_split
from training.datasets.prepared import SPLITS, DataError, Prepared, open_prepared
from training.datasets.vocabularies import learn_vocabularies
from training.export.export import random_feeds
from training.export.graph import feeds_of
from training.importance import dealt
from training.join.raw import LogColumns, impressions_of
from training.unknown import Hiding

HISTORY = 'history = { length = 4, fields = ["ad_id", "genre", "tags", "price"], ages = true }\n'
SCHEMA = small.SCHEMA.replace(small.HISTORY, HISTORY)
NOW = 1_763_800_000


def test_an_age_is_counted_from_the_whole_second_and_is_never_below_0() -> None:
    ages = ages_of(100.9, [99.5, 90, 100, 101, 0, float("nan"), float("inf")])
    assert ages.dtype == np.float32
    assert ages.tolist() == [0.5, 10, 0, 0, 100, 100, 100]
    assert ages_of(np.array([[10], [20]]), np.array([[4.0, 5.0], [5.0, 0.0]])).tolist() == [[6, 5], [15, 20]]


def test_a_schema_says_whether_it_has_ages_and_is_the_same_as_ever_without() -> None:
    without, with_ages = small.schema(), parse_schema(SCHEMA)
    assert not without.history_ages
    assert "history_ages" not in without.tensors
    assert "ages" not in without.canonical()
    assert with_ages.tensors == {**without.tensors, "history_ages": ("history", 0)}
    assert [name for name in with_ages.tensors if name.startswith("history")] == ["history_ids", "history_numbers", "history_ages"]
    assert parse_schema(with_ages.to_toml()) == with_ages
    assert with_ages.canonical() != without.canonical()
    with pytest.raises(SchemaError, match=r"^\[history\]: ages must be true or false$"):
        parse_schema(SCHEMA.replace("ages = true", 'ages = "yes"'))


@pytest.mark.parametrize(
    ("history", "ts", "expected"),
    [
        (["a1", "a2"], [NOW - 60, NOW - 2.5], [60, 2.5]),
        ([f"a{i}" for i in range(6)], [NOW - 10 + i for i in range(6)], [8, 7, 6, 5]),
        (["a1", "0", "a2"], [NOW - 9, NOW - 8, NOW - 7], [9, 7]),
        (["a1", "a2"], [], [np.float32(NOW)] * 2),
        ([], [], [0]),
    ],
    ids=["as they are", "the newest", "padding left out", "not known", "no behaviour"],
)
def test_a_request_is_encoded_with_the_ages_of_its_behaviours(history: list[str], ts: list[float], expected: list[float]) -> None:
    encoder = small.encoder(SCHEMA.replace("ages = true", 'ages = true, padding = ["0"]'))
    request = Request("u1", {}, {}, history, ["a1"], history_ts=ts, ts=NOW + 0.9)
    feeds = encode_request(AdTable(encoder), request)[0]
    assert feeds["history_ages"].dtype == np.float32
    assert feeds["history_ages"].tolist() == [expected]
    assert feeds["history_ages"].shape == feeds["history_ids"].shape[:2]


def test_the_times_of_a_sent_history_are_sorted_with_it() -> None:
    body = b'{"user": {"id": "u", "history": [{"ad_id": "a2", "ts": 20}, {"ad_id": "a1", "ts": 10}]}, "candidates": ["a1"]}'
    query = to_query(parse_request(body), most=10)
    assert (query.history, query.history_ts) == (["a1", "a2"], [10, 20])
    query = to_query(parse_request(body.replace(b', "ts": 20', b"").replace(b', "ts": 10', b"")), most=10)
    assert (query.history, query.history_ts) == (["a2", "a1"], ())


def test_a_device_is_filled_with_ages_beside_behaviours() -> None:
    feeds = random_feeds(parse_schema(SCHEMA), {}, 1, 3, 70)
    buffers = {"history_ages": np.full((4, 5), 9, np.float32), "ad_ids": np.zeros((4, 64, feeds["ad_ids"].shape[2]), np.int64)}
    fill(buffers, next(runs([feeds])), [feeds])
    assert buffers["history_ages"].tolist() == [[*feeds["history_ages"][0], 0, 0]] * 2 + [[0] * 5] * 2


def test_a_record_without_times_is_as_it_was_and_one_with_them_keeps_them() -> None:
    record = ServedRecord("r", float(NOW), "m", 1, "u", {}, {}, ["a1", "a2"], ["a3"], [0.5], [1.0])
    assert unpack_served(pack_served(record)).history_ts == []
    timed = replace(record, history_ts=[NOW - 5, NOW - 1.5])
    assert unpack_served(pack_served(timed)).history_ts == [NOW - 5, NOW - 1.5]
    assert pack_served(record)[:10] != pack_served(timed)[:10]  # another format, so that older programs refuse it


def test_the_log_has_times_where_its_schema_has_ages() -> None:
    record = ServedRecord("r", NOW + 0.5, "m", 1, "u", {}, {}, ["a1", "a2"], ["a3"], [0.5], [1.0], history_ts=[NOW - 5, NOW - 1.5])
    for text, expected in ((SCHEMA, [NOW - 5, NOW - 1.5]), (small.SCHEMA, None)):
        entries = [Entry("1-1", pack_served(each)) for each in (record, replace(record, history_ts=[]))]
        (rows,) = impressions_of(entries, SERVED, LogColumns(parse_schema(text))).frames.values()
        assert ("history_ts" in rows.columns) == (expected is not None)
        if expected:
            assert rows["history_ts"].to_list() == [expected, None]


def data_set(folder: Path) -> Prepared:
    """That of `small`, with times: of some behaviours unknown, of some later than their row."""
    small.data_set(folder)
    (folder / "schema.toml").write_text(SCHEMA)
    random = np.random.default_rng(2)
    for split in SPLITS:
        path = folder / split / "0.parquet"
        frame = pl.read_parquet(path)
        ts = NOW + np.arange(len(frame)) * 100
        back = [[int(2 ** random.uniform(-1, 20)) - 50 for _ in history] for history in frame["history"]]
        times = [[None if seconds % 7 == 3 else int(at - seconds) for seconds in each] for at, each in zip(ts, back, strict=True)]
        typed = pl.Series("history_ts", times, pl.List(pl.Int64))
        frame.with_columns(pl.Series("ts", ts), typed).write_parquet(path)
    return open_prepared(folder)


def test_rows_are_encoded_with_their_ages(tmp_path: Path) -> None:
    data, encoder = data_set(tmp_path), small.encoder(SCHEMA)
    rows, frame = encode_split(data, "test", encoder), next(data.frames("test"))
    unknown = 0
    for i, row in enumerate(frame.iter_rows(named=True)):
        times = [0 if ts is None else ts for ts in row["history_ts"]]
        feeds = encode_request(AdTable(encoder), Request("u", {}, {}, row["history"], ["a1"], history_ts=times, ts=row["ts"]))[0]
        ages = rows.batch(np.array([i])).ages
        assert ages is not None
        assert ages.tolist() == feeds["history_ages"].tolist()
        assert feeds_of(encoder.schema, rows, np.array([i]))["history_ages"].tolist() == feeds["history_ages"].tolist()
        unknown += None in row["history_ts"][-4:]
    assert unknown > 5
    together = rows.batch(np.arange(len(rows))).ages
    assert together is not None
    assert together.shape == (len(rows), 4)
    assert not together[torch.from_numpy(rows.history == 0)].any()


def test_ages_go_where_their_histories_go(tmp_path: Path) -> None:
    rows, order = encode_split(data_set(tmp_path), "test", small.encoder(SCHEMA)), np.array([7, 3, 3, 90])
    assert rows.ages is not None
    taken = rows.take(order).ages
    assert taken is not None
    assert np.array_equal(taken, rows.ages[order])
    every = np.arange(len(rows))[::-1]
    dealt_ages = dealt(rows, SimpleNamespace(schema=parse_schema(SCHEMA)), "history", every).ages
    assert np.array_equal(dealt_ages, rows.ages[::-1])


def test_gaps_and_padding_of_a_history_leave_its_times_where_they_belong(tmp_path: Path) -> None:
    data = data_set(tmp_path)
    (tmp_path / "schema.toml").write_text(SCHEMA.replace("ages = true", 'ages = true, padding = ["0"]'))
    frame = next(data.frames("test")).head(3)
    history = pl.Series("history", [["a1", "0", None, "a2"], ["0"], None], pl.List(pl.String))
    times = pl.Series("history_ts", [[NOW - 4, NOW - 3, NOW - 2, NOW - 1], [NOW], None], pl.List(pl.Int64))
    frame.with_columns(history, times, ts=pl.lit(NOW)).write_parquet(tmp_path / "test" / "0.parquet")
    rows = encode_split(open_prepared(tmp_path), "test", small.encoder(SCHEMA))
    assert rows.ages is not None
    assert rows.ages.tolist() == [[4, 1, 0, 0], [0] * 4, [0] * 4]
    assert (rows.history > 0).sum(1).tolist() == [2, 0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda frame: frame.drop("history_ts"), "no column holds history_ts, which the schema 'small' has"),
        (lambda frame: frame.drop("ts"), "no column holds ts, which the schema 'small' has"),
        (lambda frame: frame.with_columns(ts=pl.lit(None, pl.Int64)), "column ts has gaps or is no number"),
        (lambda frame: frame.with_columns(history_ts=pl.lit([1, 2], pl.List(pl.Int64))), "history and history_ts differ in length"),
    ],
)
def test_rows_without_times_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    data = data_set(tmp_path)
    path = tmp_path / "test" / "0.parquet"
    change(pl.read_parquet(path)).write_parquet(path)
    with pytest.raises(DataError, match=message):
        encode_split(data, "test", small.encoder(SCHEMA))


def test_hidden_users_have_no_ages_and_twins_those_of_their_row(tmp_path: Path) -> None:
    rows = encode_split(data_set(tmp_path), "train", small.encoder(SCHEMA))
    batch, twins = Hiding(rows, 0.2, seed=1).batch(np.arange(200))
    assert batch.ages is not None
    assert len(batch.ages) == len(batch.user.ids)
    assert torch.equal(batch.ages[200 : 200 + len(twins)], batch.ages[twins])
    assert not batch.ages[~batch.history.behaviours()].any()
    assert batch.first(10).ages is not None
    assert len(batch.first(10).ages) == 10


CSV_SCHEMA = """
name = "shop"
[table]
{table}
[history]
length = 2
fields = ["ad_id"]
ages = true
[ad.ad_id]
kind = "category"
"""


def test_a_table_tells_when_each_behaviour_was(tmp_path: Path) -> None:
    rows = "".join(f"{int(i != 3)},u1,a{i},{NOW + 60 * i}\n" for i in range(10))
    (tmp_path / "log.csv").write_text("label,user_id,ad_id,ts\n" + rows)
    (tmp_path / "my.toml").write_text(CSV_SCHEMA.format(table='ts = "ts"'))
    csv_table.prepare(tmp_path / "log.csv", tmp_path / "out", tmp_path / "my.toml")
    data = open_prepared(tmp_path / "out")
    frame = next(data.frames("train"))
    assert frame["history"].to_list()[3:6] == [["a1", "a2"], ["a1", "a2"], ["a2", "a4"]]
    assert frame["history_ts"].to_list()[3:6] == [[NOW + 60, NOW + 120], [NOW + 60, NOW + 120], [NOW + 120, NOW + 240]]
    encoder = Encoder(data.schema, learn_vocabularies(data))
    ages = encode_split(data, "train", encoder).ages
    assert ages is not None
    assert ages[[0, 1, 5]].tolist() == [[0, 0], [60, 0], [180, 60]]


@pytest.mark.parametrize("table", ["", 'ts = "ts"\nhistory = "past"'])
def test_a_table_that_does_not_tell_times_is_refused_where_the_schema_has_ages(tmp_path: Path, table: str) -> None:
    (tmp_path / "my.toml").write_text(CSV_SCHEMA.format(table=table))
    (tmp_path / "log.csv").write_text("label,user_id,ad_id,ts,past\n")
    with pytest.raises(DataError, match=r"\[history\] has ages, which need times: name ts, and leave history out"):
        csv_table.prepare(tmp_path / "log.csv", tmp_path / "out", tmp_path / "my.toml")
