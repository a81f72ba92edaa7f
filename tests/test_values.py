"""One rule for what a value is looked up by: log, request, event and store give one text."""

import re
from collections.abc import Sequence
from datetime import UTC, date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.encode import AdTable, Encoder, FieldError, Request, clean, clean_all, encode_request
from features.schema import Field
from features.values import ValueTextError, plain, plain_all, text_of
from features.vocabulary import HashBuckets
from service.api.requests import parse_request, to_query
from tests.test_datasets import patient, rows
from training.datasets import csv_table
from training.datasets.ads import ad_table
from training.datasets.encoded import encode_split
from training.datasets.prepared import DataError, open_prepared
from training.datasets.states import user_states
from training.datasets.texts import CellError, lists_of, plain_values, texts_of
from training.datasets.vocabularies import learn_vocabularies

# Texts near every border of the rule.
texts = st.one_of(
    st.sampled_from(["", "25", "25.0", "025.0", "25.00", "2.50", "-0.0", "0.0", "True", "true", "TRUE", "False", "1", "1.10", "2.0", "2"]),
    st.sampled_from(
        [" a", "a ", "A", "1e3", "1e5", "é", "e\u0301", "null", "12345678901234567890", "12345678901234567890.0", "2.0\n", "x.0"]
    ),
    st.from_regex(r"-?[0-9]{1,3}(\.[0-9]{1,2})?", fullmatch=True),
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=6),
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("25.0", "25"),
        ("25", "25"),
        (25, "25"),
        (25.0, "25"),
        (1e3, "1000"),
        (-0.0, "0"),
        (Decimal("25.00"), "25"),
        (np.float32(25), "25"),
        (np.int64(25), "25"),
        ("-25.000", "-25"),
        (2**64 + 1, "18446744073709551617"),
        (Decimal(2**64 + 1), "18446744073709551617"),
        (2.0**53 - 1, "9007199254740991"),
        (0.1, "0.1"),
        (1e-7, "1e-07"),
        (Decimal("2.50"), "2.5"),
        (Decimal("1E+3"), "1000"),
        ("1.10", "1.10"),
        ("2.0.0", "2.0.0"),
        ("025.0", "025.0"),
        ("1e3", "1e3"),
        (" 25", " 25"),
        (True, "true"),
        (False, "false"),
        ("True", "true"),
        ("FALSE", "false"),
        ("tRUE", "tRUE"),
        (1, "1"),
        (date(2026, 11, 28), "2026-11-28"),
        (datetime(2026, 11, 28, 17, tzinfo=UTC), "2026-11-28T17:00:00+00:00"),
        (time(17), "17:00:00"),
        ("", None),
        (None, None),
        (float("nan"), None),
        (Decimal("NaN"), None),
    ],
)
def test_a_value_has_one_text(value: object, text: str | None) -> None:
    assert text_of(value) == text
    assert text is None or text_of(text) == text


@pytest.mark.parametrize(
    "value", [2.0**53, -1e300, float("inf"), np.float32(2**24), np.float32(0.1), Decimal("Infinity"), Decimal("1e999"), b"a", [1], {}]
)
def test_what_has_no_one_text_is_refused(value: object) -> None:
    with pytest.raises(ValueTextError, match=r"expected (text or whole numbers; this|a text, a whole number)"):
        text_of(value)
    with pytest.raises(FieldError, match=r"^ad\.x: expected"):
        clean(Field("x", "ad", "category"), value)


@patient
@given(st.lists(texts, min_size=1, max_size=30))
def test_columns_follow_the_rule(values: list[str]) -> None:
    expected = [text_of(value) for value in values]
    assert texts_of(pl.Series(values)).to_list() == expected
    assert lists_of(pl.Series([values, [], None])).to_list() == [[text for text in expected if text is not None], [], None]
    assert list(plain_all(values)) == [plain(value) for value in values]
    for column in (values, [*values, None], [*values, 7, True]):
        for field in (Field("x", "ad", "category"), Field("x", "ad", "category", missing_values=("true", "7"))):
            assert list(clean_all(field, column)) == [clean(field, value) for value in column]
    frame = plain_values(pl.DataFrame({"user_id": values, "ad.x": values, "ad.l": [values] * len(values), "request_id": values}))
    assert frame["user_id"].to_list() == list(map(plain, values))
    assert frame["ad.x"].to_list() == expected
    assert frame["ad.l"][0].to_list() == [text for text in expected if text is not None]
    assert frame["request_id"].to_list() == values


def test_gaps_of_a_data_set_by_others_are_no_values(tmp_path: Path) -> None:
    gaps = [[None, "x"], ["x", None], ["", "x"], ["x"], [None], [], None]
    frame = pl.DataFrame(
        {"label": [0, 1] * 7, "user_id": [None, "2.0", "2"] + [""] * 11, "ad_id": "a", "history": gaps * 2, "ad.l": gaps * 2}
    )
    for split in ("train", "valid", "test"):
        (tmp_path / split).mkdir()
        frame.cast({"label": pl.Int8}).write_parquet(tmp_path / split / "0.parquet")
    fields = '[user.user_id]\nkind = "category"\n[ad.ad_id]\nkind = "category"\n[ad.l]\nkind = "list"\nlength = 2\n'
    (tmp_path / "schema.toml").write_text('name = "gaps"\nhistory = { length = 2, fields = ["ad_id"] }\n' + fields)
    pl.DataFrame({"ad_id": ["a"], "ad.l": [[None, "x"]]}).write_parquet(tmp_path / "ads.parquet")
    data = open_prepared(tmp_path)
    encoder = Encoder(data.schema, learn_vocabularies(data))
    encoded, whole = encode_split(data, "train", encoder), ad_table(data, encoder)
    assert encoded.ad.ids[:7, 1:].tolist() == [[2, 0]] * 4 + [[0, 0]] * 3
    assert whole.take(whole.rows(["a"])).ids[0, 1:].tolist() == [2, 0]
    assert (encoded.history[:4] > 0).sum(1).tolist() == [1] * 4
    assert (encoded.history[4:7] > 0).sum() == 0
    assert [user_id for user_id, _ in user_states(data)] == ["2"]
    frame.cast({"label": pl.Int8}).with_columns(ad_id=pl.lit(None, pl.String)).write_parquet(tmp_path / "test" / "0.parquet")
    with pytest.raises(DataError, match=r"0.parquet: 14 rows have no ad_id"):
        encode_split(data, "test", encoder)


def test_texts_that_are_their_own_are_not_copied() -> None:
    ids = ["a1", "a20", "1.10"]
    assert plain_all(ids) is ids


# What a column of each type holds, and what a request may send for a cell of it.
whole = st.integers(-(2**53) + 1, 2**53 - 1)
fractions = st.floats(-1e6, 1e6, allow_nan=False).filter(lambda value: value == 0 or abs(value) > 1e-3)
TYPES: dict[str, tuple[pl.DataType, st.SearchStrategy[Any]]] = {
    "text": (pl.String(), texts),
    "categorical": (pl.Categorical(), texts),
    "int8": (pl.Int8(), st.integers(-128, 127)),
    "int64": (pl.Int64(), st.integers(-(2**63), 2**63 - 1)),
    "uint64": (pl.UInt64(), st.integers(0, 2**64 - 1)),
    "float64": (pl.Float64(), whole.map(float) | fractions),
    "float32": (pl.Float32(), st.integers(-(2**24) + 1, 2**24 - 1).map(float) | st.integers(-999, 999).map(lambda i: i / 8)),
    "decimal": (pl.Decimal(20, 0), st.integers(-(10**20) + 1, 10**20 - 1).map(Decimal)),
    "money": (pl.Decimal(12, 2), st.integers(-(10**9), 10**9).map(lambda cents: Decimal(cents) / 100)),
    "boolean": (pl.Boolean(), st.booleans()),
    "date": (pl.Date(), st.dates(date(1970, 1, 1), date(2100, 1, 1))),
    "datetime": (pl.Datetime("us"), st.datetimes(datetime(1970, 1, 1), datetime(2100, 1, 1))),
    "zoned": (pl.Datetime("us", "UTC"), st.datetimes(datetime(1970, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC))),
    "time": (pl.Time(), st.times()),
    "enum": (pl.Enum(["2.0", "2", "True", "a"]), st.sampled_from(["2.0", "2", "True", "a"])),
}
SCHEMA = """
name = "cells"
[user.user_id]
kind = "category"
[user.x]
kind = "category"
missing = "unknown"
[user.h]
kind = "category"
buckets = 1000
[ad.ad_id]
kind = "category"
[ad.x]
kind = "category"
vocabulary = "y"
[ad.l]
kind = "list"
length = 2
[table]
split = "split"
columns = { "user.h" = "x", "ad.x" = "x" }
"""


def sent(cell: Any) -> Any:
    """A cell in JSON: a type that JSON lacks is a text, as whoever writes JSON has it."""
    if isinstance(cell, Decimal):
        return (
            int(cell)
            if cell == cell.to_integral_value() and abs(cell) < 2**63
            else (float(cell) if cell.as_tuple().exponent else str(cell))
        )
    return cell.isoformat() if isinstance(cell, date | datetime | time) else cell


def prepared(folder: Path, cells: Sequence[Any], dtype: pl.DataType) -> tuple[Any, AdTable]:
    """A log with those cells prepared: the encoded rows, and the table of ads."""
    count, column = len(cells), pl.Series("x", cells, dtype)
    frame = pl.DataFrame(
        {"label": [0, 1] * count, "user_id": [f"u{i}" for i in range(2 * count)], "ad_id": [f"a{i}" for i in range(2 * count)]}
    )
    both = pl.concat([column, column])
    frame = frame.with_columns(x=both, l=pl.concat_list(pl.Series(both)), split=pl.lit("train"))
    frame = pl.concat([frame, frame[:1].with_columns(split=pl.lit("valid")), frame[:1].with_columns(split=pl.lit("test"))])
    frame.write_parquet(folder / "log.parquet")
    (folder / "my.toml").write_text(SCHEMA)
    csv_table.prepare(folder / "log.parquet", folder / "out", folder / "my.toml")
    data = open_prepared(folder / "out")
    encoder = Encoder(data.schema, learn_vocabularies(data))
    return encode_split(data, "train", encoder), ad_table(data, encoder)


@patient
@given(st.sampled_from(sorted(TYPES)), st.data())
def test_a_request_with_a_cell_encodes_as_the_log_s_cell_did(
    tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
) -> None:
    dtype, values = TYPES[kind]
    cells = data.draw(st.lists(values, min_size=1, max_size=6))
    logged, table = prepared(tmp_path_factory.mktemp("cells"), cells, dtype)
    for row, cell in enumerate(cells):
        value = sent(cell)
        features = {"x": value, "l": [value]}
        candidate = {"ad_id": f"a{row}", "features": features}
        body = {"user": {"id": f"u{row}", "features": {"x": value, "h": value}}, "candidates": [candidate, {"ad_id": f"a{row}"}]}
        query = to_query(parse_request(orjson.dumps(body)), 10)
        feeds, known = encode_request(table, Request(query.user_id, query.user, query.context, (), query.ad_ids, query.sent))
        assert known.all()
        assert feeds["user_ids"].tolist() == [logged.user.ids[row].tolist()], (cell, value)
        assert feeds["ad_ids"].tolist() == [[logged.ad.ids[row].tolist()] * 2], (cell, value)


@pytest.mark.parametrize("column", ["user_id", "ad_id"])
@pytest.mark.parametrize(
    ("values", "ids"),
    [
        (pl.Series([10**19 + i for i in range(20)], dtype=pl.Decimal(20, 0)), [str(10**19 + i) for i in range(20)]),
        (pl.Series([2**53 - 20 + i for i in range(20)], dtype=pl.Float64), [str(2**53 - 20 + i) for i in range(20)]),
        (pl.Series([2**24 - 20 + i for i in range(20)], dtype=pl.Float32), [str(2**24 - 20 + i) for i in range(20)]),
        (pl.Series([2**64 - 20 + i for i in range(20)], dtype=pl.UInt64), [str(2**64 - 20 + i) for i in range(20)]),
        (pl.Series([2**100 + i for i in range(20)], dtype=pl.Int128), [str(2**100 + i) for i in range(20)]),
    ],
)
def test_every_digit_of_an_id_is_kept(tmp_path: Path, column: str, values: pl.Series, ids: list[str]) -> None:
    assert rows(_ids(tmp_path, column, values))[column].to_list() == ids


@pytest.mark.parametrize("column", ["user_id", "ad_id", "x", "l"])
@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (2.0**53, pl.Float64, r"this float is 2\*\*53 or more, where a float no longer tells whole numbers apart"),
        (2.0**24, pl.Float32, r"this float is 2\*\*24 or more"),
        (-(2.0**60), pl.Float64, r"this float is 2\*\*53 or more"),
        (float("inf"), pl.Float64, "this float is not finite"),
        (0.1, pl.Float32, "this fraction in few bits is 0.10000000149011612 elsewhere"),
        ("1.23457E+19", pl.String, "a number with an exponent has lost digits"),
        ("1e+05", pl.String, "a number with an exponent has lost digits"),
        (1, pl.Datetime("ns"), "a time of whole microseconds"),
    ],
)
def test_an_id_that_has_lost_digits_is_refused_with_its_row(tmp_path: Path, column: str, value: Any, dtype: Any, message: str) -> None:
    good: Any = "1" if dtype == pl.String else 1000 if dtype == pl.Datetime("ns") else 1.0
    values = pl.Series([good] * 13 + [value] + [good] * 6).cast(dtype)
    with pytest.raises(DataError, match=rf"log.parquet, row 14: {column} is .*; expected .*{message}"):
        _ids(tmp_path, column, values)


def _ids(folder: Path, column: str, values: pl.Series) -> Path:
    frame = pl.DataFrame({"label": [0, 1] * 10, "user_id": ["u"] * 20, "ad_id": ["a"] * 20, "x": ["x"] * 20, "l": [["l"]] * 20})
    column_values = values if column != "l" else values.reshape((20, 1)).arr.to_list()
    frame.with_columns(column_values.alias(column)).write_parquet(folder / "log.parquet")
    schema = "\n".join(line for line in SCHEMA.splitlines() if not line.startswith("split"))
    (folder / "my.toml").write_text(schema)
    csv_table.prepare(folder / "log.parquet", folder / "out", folder / "my.toml")
    return folder / "out"


def test_a_csv_and_its_requests_agree_on_whole_numbers_and_versions(tmp_path: Path) -> None:
    lines = ["9.0,u1.0", "10.0,7.0", "1.10,7", "True,u1.0"] * 5
    (tmp_path / "log.csv").write_text("label,ad_id,x,user_id,l\n" + "".join(f"{i % 2},a,{line},1.0|2\n" for i, line in enumerate(lines)))
    (tmp_path / "my.toml").write_text(re.sub("split.*\n", "", SCHEMA))
    csv_table.prepare(tmp_path / "log.csv", tmp_path / "out", tmp_path / "my.toml")
    data = rows(tmp_path / "out")
    assert data["user.x"].to_list()[:4] == ["9", "10", "1.10", "true"]
    assert data["user_id"].to_list()[:4] == ["u1.0", "7", "7", "u1.0"]
    assert data["ad.l"][0].to_list() == ["1", "2"]
    whole = open_prepared(tmp_path / "out")
    encoder = Encoder(whole.schema, learn_vocabularies(whole))
    for texts in (("9.0", "9", 9, 9.0), ("10.0", 10), ("True", "true", True)):
        ids = {encoder.encode_one("ad", {"x": text}).ids[0, 1] for text in texts}
        assert len(ids) == 1
        assert min(ids) > 1
    assert encoder.encode_one("ad", {"x": "1.1"}).ids[0, 1] == 1


def test_a_value_has_one_bucket_however_it_is_spelt() -> None:
    assert HashBuckets(1000).id("2.0") == HashBuckets(1000).id("2")


def test_a_cell_error_says_the_list_s_row() -> None:
    with pytest.raises(CellError) as caught:
        lists_of(pl.Series([[1.0], None, [], [2.0, 2.0**60]]))
    assert caught.value.row == 3
