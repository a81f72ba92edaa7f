import re
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.test_datasets import ROOT, patient, refuses, rows
from training.datasets import csv_table
from training.datasets.prepared import SPLITS, DataError, open_prepared
from training.datasets.states import ads, user_states

SCHEMA = """
name = "shop"
[user.user_id]
kind = "category"
[user.age]
kind = "category"
[ad.ad_id]
kind = "category"
[ad.price]
kind = "number"
[ad.topics]
kind = "list"
length = 3
"""
HISTORY = '\n[history]\nlength = 3\nfields = ["ad_id"]\n'


def prepare_csv(folder: Path, table: str | pl.DataFrame, schema: str = SCHEMA) -> Path:
    source = folder / "source"
    if isinstance(table, str):
        source.write_text(table)
    else:
        table.write_parquet(source)
    (folder / "my.toml").write_text(schema)
    csv_table.prepare(source, folder / "out", folder / "my.toml")
    return folder / "out"


def test_an_empty_cell_may_be_listed_as_missing(tmp_path: Path) -> None:
    prepared = open_prepared(prepare_csv(tmp_path, LOG + log_line() * 9, SCHEMA + '[table]\nmissing = ["", "NULL"]\nnobody = ""\n'))
    assert {field.missing_values for field in prepared.schema.fields if field.kind == "category" and field.name == "age"} == {("NULL",)}


def test_the_example_of_the_documentation_runs(tmp_path: Path) -> None:
    blocks = dict(re.findall(r"```(csv|toml)\n(.*?)```", (ROOT / "docs" / "data.md").read_text("utf-8"), re.DOTALL))
    out = prepare_csv(tmp_path, blocks["csv"], blocks["toml"])
    data = rows(out)
    assert data["history"].to_list() == [[], [], [], ["a1"], ["a1", "a2"]]
    assert data["ts"][0] == 1761984000
    assert data["user.age"].to_list() == ["25", "25", None, "26", "26"]
    assert data["ad.topic"].to_list() == [["sport", "shoes"], None, ["sport", "shoes"], None, ["shoes"]]
    assert data["ad.price"].to_list() == [19.9, 5.0, 18.5, 5.0, None]
    prepared = open_prepared(out)
    assert {ad.ad_id: ad.features for ad in ads(prepared)} == {
        "a1": {"brand": "acme", "topic": ["sport", "shoes"], "price": 18.5},
        "a2": {"brand": "bolt", "price": 5.0},
        "a3": {"brand": "acme", "topic": ["shoes"]},
    }
    states = {user: (state.features, state.ad_ids, state.ts) for user, state in user_states(prepared)}
    assert states == {"u1": ({"age": "26"}, ["a1", "a2"], [1761984000, 1761991200]), "u2": ({}, [], [])}


def test_every_entry_of_the_documentation_is_one_and_none_is_left_out() -> None:
    text = (ROOT / "docs" / "data.md").read_text("utf-8")
    named = {name for row in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert named == set(csv_table.TableSettings.__dataclass_fields__)
    assert all(f"    {name} = " in csv_table.__doc__ for name in named)


def test_parquet_and_csv_prepare_the_same(tmp_path: Path) -> None:
    typed = pl.DataFrame(
        {
            "label": [True, False, False] * 4,
            "user_id": pl.Series([7, 8, 9] * 4, dtype=pl.Int32),
            "ad_id": pl.Series(["a", "b", "a"] * 4, dtype=pl.Categorical),
            "age": [25.0, None, 31.0] * 4,
            "price": pl.Series([1, 2, None] * 4, dtype=pl.Int8),
            "topics": [[1, 2], None, None] * 4,
        }
    )
    text = "\ufeffage,label,user_id,ad_id,price,topics,further\n" + "25.0,1,7,a,1,1|2,x\n,0,8,b,2,,x\n31.0,0,9,a,nan,,x\n" * 4
    (tmp_path / "p").mkdir()
    (tmp_path / "c").mkdir()
    parquet = rows(prepare_csv(tmp_path / "p", typed))
    assert parquet.rows() == rows(prepare_csv(tmp_path / "c", text)).rows()
    assert parquet.rows()[:3] == [(1, "7", "a", "25", 1.0, ["1", "2"]), (0, "8", "b", None, 2.0, None), (0, "9", "a", "31", None, None)]


LOG = "label,user_id,ad_id,age,price,topics,ts,part\n"


def log_line(label: object = 0, user: str = "u", ad: str = "a", ts: object = 1, part: str = "train", price: str = "1") -> str:
    return f"{label},{user},{ad},25,{price},x|y,{ts},{part}\n"


def test_text_stays_as_it_is_written_unless_it_is_a_whole_number_with_decimals(tmp_path: Path) -> None:
    table = "label,user_id,ad_id,age,price,topics\n" + "1,1.0,01,1.10,,\n0,2.0,1.0,1.1,,\n" * 5
    data = rows(prepare_csv(tmp_path, table))
    assert data.select("user_id", "ad_id", "user.age").rows()[:2] == [("1", "01", "1.10"), ("2", "1", "1.1")]


def test_floats_of_parquet_are_written_shortly(tmp_path: Path) -> None:
    ages = [1.0, 2.5, 1e-20, float("nan"), -3.0, None, 0.1, 2.0**53 - 1, 7.0, 8.0]
    frame = pl.DataFrame(
        {"label": [0.0] * 10, "user_id": ["u"] * 10, "ad_id": [1] * 10, "age": ages, "price": [1] * 10, "topics": [[2.0]] * 10}
    )
    data = rows(prepare_csv(tmp_path, frame))
    assert data["user.age"].to_list() == ["1", "2.5", "1e-20", None, "-3", None, "0.1", "9007199254740991", "7", "8"]
    assert data["ad.topics"][0].to_list() == ["2"]


@pytest.mark.parametrize(
    ("entries", "times", "expected"),
    [
        ("", ["3", "1", "2.9"], [1, 2, 3]),
        ('ts_unit = "ms"', ["3999", "1000", "2001"], [1, 2, 3]),
        ('ts_unit = "us"', ["3000001", "1", "2000000"], [0, 2, 3]),
        ("", ["1970-01-01 00:00:03.5", "1970-01-01T01:00:01+01:00", "1970-01-01T00:00:02Z"], [1, 2, 3]),
        ("", ["1970-01-03", "1970-01-01", "1970-01-02"], [0, 86400, 172800]),
    ],
)
def test_times_are_read_and_sorted(tmp_path: Path, entries: str, times: list[str], expected: list[int]) -> None:
    table = LOG + "".join(log_line(ts=ts) for ts in times)
    out = prepare_csv(tmp_path, table, f'{SCHEMA}\n[table]\nts = "ts"\nsplit = [0.34, 0.33, 0.33]\n{entries}\n')
    assert rows(out)["ts"].to_list() == expected


def test_times_of_parquet_are_read(tmp_path: Path) -> None:
    times = pl.Series([3_500_000, 1_000_000, 2_000_000]).cast(pl.Datetime("us", "Europe/Paris"))
    frame = pl.read_csv((LOG + log_line() * 3).encode()).with_columns(ts=times)
    out = prepare_csv(tmp_path, frame, SCHEMA + '\n[table]\nts = "ts"\nsplit = [0.34, 0.33, 0.33]\n')
    assert rows(out)["ts"].to_list() == [1, 2, 3]


def test_further_outcomes_and_weights_are_columns_of_the_rows(tmp_path: Path) -> None:
    table = "user_id,ad_id,label,age,price,topics,bought,w\n" + "".join(
        f"u{i},a{i % 3},{i % 2},25,1,x,{'' if i == 4 else i % 2},{i / 2}\n" for i in range(20)
    )
    said = '[table]\noutcomes = { conversion = "bought" }\nweight = "w"\n'
    data = rows(prepare_csv(tmp_path, table, SCHEMA + said))
    assert data["conversion"].dtype == pl.Int8
    assert data["conversion"].to_list() == [None if i == 4 else i % 2 for i in range(20)]
    assert data["weight"].to_list() == [i / 2 for i in range(20)]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ('outcomes = { label = "bought" }', "'label' cannot be the name of a head"),
        ("outcomes = { conversion = 3 }", "outcomes must name columns by head"),
        ('outcomes = { conversion = "age" }', "0, 1 or nothing"),
        ('weight = "w"', "a weight of at least 0"),
    ],
)
def test_outcomes_and_weights_that_are_none_are_refused(said: str, message: str, tmp_path: Path) -> None:
    table = "user_id,ad_id,label,age,price,topics,bought,w\n" + "u,a,0,25,1,x,1,-1\n" * 20
    with pytest.raises(DataError, match=message):
        prepare_csv(tmp_path, table, f"{SCHEMA}[table]\n{said}\n")


def test_a_column_may_name_the_splits(tmp_path: Path) -> None:
    lines = [log_line(i % 2, ad=str(i), ts=9 - i, part=part) for i, part in enumerate(["test", "train", "valid", "train", "test"])]
    out = prepare_csv(tmp_path, LOG + "".join(lines), f'{SCHEMA}{HISTORY}\n[table]\nts = "ts"\nsplit = "part"\n')
    assert {split: rows(out, split)["ad_id"].to_list() for split in SPLITS} == {"train": ["3", "1"], "valid": ["2"], "test": ["4", "0"]}
    assert rows(out).select("ad_id", "history").rows() == [("3", []), ("1", ["3"]), ("2", ["3"]), ("4", []), ("0", ["3", "1"])]


def test_given_histories_are_kept(tmp_path: Path) -> None:
    table = "label,user_id,ad_id,age,price,topics,past\n" + "1,u,a,1,1,,p q  r s\n0,u,b,1,1,,\n1,v,c,1,1,,p\n" * 4
    out = prepare_csv(tmp_path, table, SCHEMA + HISTORY + '\n[table]\nhistory = "past"\nlist_separator = " "\n')
    assert rows(out)["history"].to_list()[:3] == [["q", "r", "s"], [], ["p"]]
    states = {user: (state.ad_ids, state.ts) for user, state in user_states(open_prepared(out))}
    assert states == {"u": ([], []), "v": (["p", "c"], [0, 0])}


def test_a_table_without_ids(tmp_path: Path) -> None:
    schema = 'name = "plain"\n[ad.x]\nkind = "number"\n[table]\nuser_id = ""\nad_id = ""\nseparator = "\t"\n'
    out = prepare_csv(tmp_path, "x\tlabel\n" + "1.5\t1\n" * 10, schema)
    assert rows(out).rows() == [(1, "", "", 1.5)] * 10
    assert list(ads(open_prepared(out))) == list(user_states(open_prepared(out))) == []


impression = st.tuples(st.integers(0, 1), st.sampled_from(["u", "v", ""]), st.sampled_from("abcdef"), st.integers(0, 6))


@patient
@given(st.lists(impression, min_size=10, max_size=60), st.booleans())
def test_a_built_history_is_what_was_known_when_the_row_was_ranked(tmp_path_factory: pytest.TempPathFactory, log, timed: bool) -> None:
    table = LOG + "".join(log_line(label, user, ad, ts) for label, user, ad, ts in log)
    entries = '\n[table]\nts = "ts"\n' if timed else ""
    out = prepare_csv(tmp_path_factory.mktemp("csv"), table, SCHEMA + HISTORY + entries)
    log = [(*row, row[3] if timed else i) for i, row in enumerate(sorted(log, key=lambda row: row[3]) if timed else log)]
    past = [[ad for label, u, ad, _, t in log if label and u == user != "" and t < time][-3:] for _, user, _, _, time in log]
    assert rows(out)["history"].to_list() == past
    after = {user: [(ad, t if timed else 0) for label, u, ad, _, t in log if label and u == user][-3:] for _, user, *_ in log if user}
    assert {user: list(zip(state.ad_ids, state.ts, strict=True)) for user, state in user_states(open_prepared(out))} == after


@pytest.mark.parametrize(
    ("table", "entries", "message"),
    [
        ("user_id,ad_id,age,price,topics\n" + "u,a,1,1,x\n" * 9, "", "source: column label is missing; it has user_id, ad_id"),
        (LOG + log_line() * 9, 'label = "clicks"', "source: column clicks is missing; it has label, user_id"),
        (LOG + log_line() * 9, 'columns = { "ad.price" = "cost" }', "source: column cost is missing; it has label"),
        (LOG + log_line() * 9 + log_line("yes"), "", "source, line 11: label is 'yes'; expected 0 or 1"),
        (LOG + log_line() * 9 + log_line("nan"), "", "source, line 11: label is 'nan'; expected 0 or 1"),
        (LOG + log_line() * 9 + log_line(ad=""), "", "source, line 11: ad_id is ''; expected some text"),
        (LOG + log_line(price="cheap"), "", "source, line 2: price is 'cheap'; expected a finite number"),
        (LOG + log_line(ts=9) + "\n" + log_line(price="cheap", ts=2), 'ts = "ts"', "source, line 4: price is 'cheap'"),
        (LOG + log_line(ts="") * 9, 'ts = "ts"', "source, line 2: ts is ''; expected a time from 1970 to 9999: a number in s"),
        (LOG + log_line(ts=1763800000000) * 9, 'ts = "ts"', "source, line 2: ts is '1763800000000'; expected a time from 1970 to 9999"),
        (LOG + log_line(ts="2025-13-01") * 9, 'ts = "ts"', "source, line 2: ts is '2025-13-01'; expected a time"),
        (
            LOG + log_line(part="train") * 9 + log_line(part="dev"),
            'split = "part"',
            "source, line 11: part is 'dev'; expected one of train, valid",
        ),
        (LOG + log_line(part="train") * 9, 'split = "part"', "the valid split would be empty"),
        (LOG + log_line() * 3, "", "the valid split would be empty"),
        (LOG, "", "source is empty"),
        ("", "", "source: column label is missing; it has none at all"),
        ("label,label\n", "", "source: the header names a column twice: label, label"),
        (LOG + log_line() + "1,2\n", "", "source, line 3: 2 columns; expected 8"),
        ("PAR1 and then nothing of the kind", "", "source cannot be read as parquet"),
        (pl.DataFrame({"label": [1]}), "", "source: column user_id is missing; it has label"),
        (LOG, "shuffle = true", "my.toml: [table]: unknown entries ['shuffle']; known are ['ad_id'"),
        (LOG, "label = 3", "my.toml: [table]: label must be text, not 3"),
        (LOG, "split = [0.5, 0.5]", "my.toml: [table]: split is [0.5, 0.5]; it must be three shares"),
        (LOG, "split = [0.5, 0.5, true]", "my.toml: [table]: split is"),
        (LOG, "split = [0.8, 0.1, 0.2]", "my.toml: [table]: split is"),
        (LOG, 'split = ""', "my.toml: [table]: split is ''"),
        (LOG, 'ts_unit = "days"', "my.toml: [table]: ts_unit is 'days'; it must be one of s, ms, us"),
        (LOG, "separator = '\"'", "my.toml: [table]: separator must be one character"),
        (
            LOG,
            'columns = { "ad.cost" = "cost" }',
            "my.toml: [table]: columns names ['ad.cost'], which are no fields; fields are ['ad.ad_id'",
        ),
        (LOG, 'columns = { "ad.ad_id" = "cost" }', "my.toml: [table]: the column of ad.ad_id is named by ad_id"),
        (LOG, "columns = 3", "my.toml: [table]: columns must name columns by field"),
        (LOG, 'history = "past"', "my.toml: [table]: history names a column, but the schema has no [history]"),
        (LOG, 'ad_id = ""', "my.toml: [table]: ad_id = … ad.ad_id is a field"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(tmp_path: Path, table: str | pl.DataFrame, entries: str, message: str) -> None:
    source = tmp_path / "source"
    source.write_text(table) if isinstance(table, str) else table.write_parquet(source)
    (tmp_path / "my.toml").write_text(f"{SCHEMA}\n[table]\n{entries}\n")
    refuses(csv_table.prepare, source, tmp_path / "out", message, tmp_path / "my.toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "my.toml is no TOML: Invalid value"),
        ("name = 'x'\ntable = 3\n[ad.x]\nkind = 'number'", "my.toml: [table] must be a section"),
        ("name = 'x'\n[ad.x]\nkind = 'word'", "my.toml: field ad.x: kind is 'word'"),
        (b"# \xff", "my.toml is not UTF-8: see its byte 3, and save it as UTF-8"),
    ],
)
def test_a_schema_file_that_is_none_is_refused(tmp_path: Path, text: str | bytes, message: str) -> None:
    (tmp_path / "source").write_text(LOG + log_line() * 9)
    (tmp_path / "my.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    refuses(csv_table.prepare, tmp_path / "source", tmp_path / "out", message, tmp_path / "my.toml")
    refuses(csv_table.prepare, tmp_path / "source", tmp_path / "out", "cannot read … none.toml", tmp_path / "none.toml")
    (tmp_path / "my.toml").write_text(SCHEMA)
    refuses(csv_table.prepare, tmp_path / "none", tmp_path / "out", "cannot read … none: No such file", tmp_path / "my.toml")
    refuses(csv_table.prepare, tmp_path, tmp_path / "out", "my.toml: column label is missing", tmp_path / "my.toml")


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("age", [{"a": 1}], "column age is Struct"),
        ("age", [b"x"], "column age is Binary"),
        ("topics", [3], "column topics is Int64; a list needs lists"),
        ("topics", [[[1]]], "column topics is List"),
        ("price", [[1.0]], "column price is List"),
        ("label", [None], "source, row 1: label is None; expected 0 or 1"),
        ("ts", [[1]], "column ts is List"),
        ("ts", pl.Series([1]).cast(pl.Duration), "column ts is Duration"),
        ("ad_id", [None], "source, row 1: ad_id is None; expected some text"),
    ],
)
def test_parquet_columns_of_other_types_are_refused(tmp_path: Path, column: str, values, message: str) -> None:
    good = {"label": [1], "user_id": ["u"], "ad_id": ["a"], "age": ["1"], "price": [1.0], "topics": [["x"]], "ts": [1]}
    pl.DataFrame({**good, column: values}).write_parquet(tmp_path / "source")
    (tmp_path / "my.toml").write_text(SCHEMA + '\n[table]\nts = "ts"\n')
    refuses(csv_table.prepare, tmp_path / "source", tmp_path / "out", message, tmp_path / "my.toml")
