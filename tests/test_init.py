"""`adrank init`: what it makes of tables, and that what it writes is a schema file that prepares them."""

import json
import shlex
from pathlib import Path

import polars as pl
import pytest

from tests.test_cli import refused, run
from training.datasets import csv_table
from training.datasets.first_schema import first_schema
from training.datasets.prepared import DataError, open_prepared
from training.datasets.table_settings import read_schema

HOURS = [f"2025-11-{1 + i // 24:02}T{i % 24:02}:00:00Z" for i in range(120)]


def table(**columns: object) -> pl.DataFrame:
    """120 rows: users of a country each, ads of a brand and tags each, slots by chance, every third row clicked."""
    usual = {
        "time": HOURS,
        "userId": [f"u{i % 7}" for i in range(120)],
        "country": ["de" if i % 7 < 4 else "fr" for i in range(120)],
        "ad": [f"a{i % 11}" for i in range(120)],
        "brand": [f"b{i % 11 % 3}" for i in range(120)],
        "tags": [["x|y", "y", "z|x", "x|z", "z"][i % 11 % 5] for i in range(120)],
        "slot": [["top", "feed"][i * i % 5 % 2] for i in range(120)],
        "price": [i % 13 + 0.5 for i in range(120)],
        "clicked": [int(i % 3 == 0) for i in range(120)],
    }
    return pl.DataFrame(usual | columns)


def guessed(tmp_path: Path, frame: pl.DataFrame, separator: str = ",", **named: str) -> tuple[dict[str, dict[str, str]], dict[str, object]]:
    """Kinds by side and name, and the entries of [table]; what is written must be read as a schema and prepare the table."""
    source, out = tmp_path / "log.csv", tmp_path / "schema.toml"
    frame.write_csv(source, separator=separator)
    found = first_schema(source, named)
    out.write_text(found.text("log"), "utf-8")
    read_schema(out)
    csv_table.prepare(source, tmp_path / "out", out)
    assert len(open_prepared(tmp_path / "out").schema.fields) == sum(map(len, found.fields.values()))
    kinds = {side: {name: str(entries["kind"]) for name, (entries, _) in fields.items()} for side, fields in found.fields.items()}
    return kinds, {key: value for key, (value, _) in found.table.items()}


def test_roles_sides_and_kinds(tmp_path: Path) -> None:
    kinds, entries = guessed(tmp_path, table())
    assert kinds == {
        "user": {"user_id": "category", "country": "category"},
        "context": {"slot": "category", "price": "number"},
        "ad": {"ad_id": "category", "brand": "category", "tags": "list"},
    }
    assert entries == {"label": "clicked", "user_id": "userId", "ad_id": "ad", "ts": "time"}


@pytest.mark.parametrize(
    ("columns", "entries"),
    [
        ({"time": [1_760_000_000_000 + i for i in range(120)]}, {"ts_unit": "ms"}),
        ({"time": [14102100 + i % 24 for i in range(120)]}, {"ts_format": "%y%m%d%H"}),
        ({"time": ["soon"] * 120}, {"ts": ""}),
        ({"slot": ["NULL" if i % 4 else "top" for i in range(119)] + ["feed"]}, {"missing": ["NULL"]}),
        ({"userId": [f"u{i % 7}" if i % 5 else "0000-0000" for i in range(120)]}, {"nobody": ["0000-0000"]}),
        ({"bought": [int(i % 6 == 0) for i in range(120)]}, {"outcomes": {"conversion": "bought"}}),
        ({"part": ["train"] * 100 + ["valid"] * 10 + ["test"] * 10}, {"split": "part"}),
        ({"pscore": [0.5] * 120, "position": [1 + i % 2 for i in range(120)]}, {"propensity": "pscore", "position": "position"}),
        ({"hist": [f"a{i % 11} a{i % 3}" for i in range(120)]}, {"history": "hist", "list_separator": " "}),
        ({"ad-size (px)": [i % 2 for i in range(120)]}, {"columns": {"context.ad_size_px": "ad-size (px)"}}),
    ],
)
def test_what_a_table_says_of_itself(tmp_path: Path, columns: dict[str, object], entries: dict[str, object]) -> None:
    _, found = guessed(tmp_path, table(**columns).drop("tags" if "hist" in columns else []))
    assert {key: found.get(key) for key in entries} == entries


def test_what_is_no_field_is_left_out_with_its_reason(tmp_path: Path) -> None:
    more = {"row": [str(i) for i in range(120)], "one": ["x"] * 120, "dwell": [100.5 + i if i % 3 == 0 else i / 200 for i in range(120)]}
    table(**more).write_csv(tmp_path / "log.csv")
    left_out = first_schema(tmp_path / "log.csv", {}).left_out
    assert {name: reason.split()[0] for name, reason in left_out.items()} == {"row": "nearly", "one": "it", "dwell": "it"}
    assert "AUC 1.000" in left_out["dwell"]


def test_separators_and_quotes_are_seen(tmp_path: Path) -> None:
    _, entries = guessed(tmp_path, table(), separator="\t")
    assert entries["separator"] == "\t"
    (tmp_path / "log.csv").write_text("click;ad\n" + '1;a"b\n0;"a\n0;"c\n')
    assert first_schema(tmp_path / "log.csv", {}).table["quote"][0] == ""


def test_json_and_parquet(tmp_path: Path) -> None:
    rows = [{"click": i % 2, "user": {"id": f"u{i % 3}", "age": 20 + i % 3}, "ad": f"a{i % 5}"} for i in range(60)]
    (tmp_path / "log.json").write_text("\n".join(map(json.dumps, rows)))
    found = first_schema(tmp_path / "log.json", {"user_id": "user.id"})
    assert set(found.fields["user"]) == {"user_id", "user_age"}
    table(look=[[float(i % 11), 1.5] for i in range(120)]).write_parquet(tmp_path / "log.parquet")
    assert first_schema(tmp_path / "log.parquet", {}).fields["ad"]["look"][0] == {"kind": "vector", "length": 2}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is empty"),
        ("1,2,x\n0,3,y\n", "looks like a row"),
        ("a,b\n1,5\n0,6\n", "--label COLUMN"),
        ("click,b\n1,5\n7,6\n", "--label COLUMN"),
    ],
)
def test_what_cannot_be_guessed_is_said(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "log.csv").write_text(text)
    with pytest.raises(DataError, match=told):
        first_schema(tmp_path / "log.csv", {})
    answer = run("init", "--source", tmp_path / "log.csv", "--out", tmp_path / "schema.toml")
    refused(answer, f"{told}.*adrank prepare movielens, frappe, criteo, open-bandit")


def test_the_command_that_is_printed_runs_as_it_is_whatever_the_files_are_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    table().write_csv("my log.csv")
    _, printed, _ = run("init", "--source", "my log.csv", "--out", "a $1 'schema'.toml")
    code, *_ = run(*shlex.split(printed.splitlines()[-1].partition(": adrank ")[2]))
    assert code == 0


def test_a_column_that_is_named_must_be_there(tmp_path: Path) -> None:
    table().write_csv(tmp_path / "log.csv")
    with pytest.raises(DataError, match="column nix is missing; it has time"):
        first_schema(tmp_path / "log.csv", {"ad_id": "nix"})
