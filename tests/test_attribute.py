"""A log's rows, written: the command, in parts and on Ray; and the SQL of docs/attribution.sql against our query, on the same raw files."""

import random
import shutil

import duckdb
import joining
import polars as pl
import small
from processes import ROOT
from test_cli import run

from training.datasets.log import open_log
from training.join import attributed
from training.join.attribution import Attribution

SETTINGS = Attribution(4000.0, 900.0, 9000.0)
SPARK = ("explode(x) AS unnest(x)", "sequence(a, b) AS generate_series(a, b)", "size(x) AS len(x)", "element_at(x, i) AS x[i]")
"""What DuckDB calls otherwise."""


def test_sql_says_the_same_of_the_same_files(tmp_path):
    log, events = joining.messy(random.Random(3), 240, 1800)
    closed = log[200].ts
    joining.write_raw(tmp_path, small.schema(), log, events, closed + SETTINGS.closes)
    db = duckdb.connect()
    for macro in SPARK:
        db.execute(f"CREATE MACRO {macro}")
    for kind in ("impressions", "events"):
        db.read_parquet(f"{tmp_path}/raw/{kind}/*/*/*.parquet", hive_partitioning=False).create_view(kind)
    named = {f"{type_}_window": seconds for type_, seconds in SETTINGS.windows.items()} | {"lateness": SETTINGS.lateness, "closed": closed}
    db.execute("CREATE VIEW settings AS SELECT " + ", ".join(f"{seconds}::DOUBLE AS {name}" for name, seconds in named.items()))
    found = db.sql((ROOT / "docs" / "attribution.sql").read_text())
    rows = joining.rows(tmp_path, SETTINGS).select(found.columns)
    assert sorted(found.fetchall(), key=str) == sorted(rows.rows(), key=str)
    assert (len(rows), rows["label"].sum(), rows["conversion"].sum()) == (326, 21, 68)


def test_attribute_writes_a_log_of_rows(tmp_path, monkeypatch):
    log, events = joining.messy(random.Random(5))
    joining.write_raw(tmp_path / "log", small.schema(), log, events, log[100].ts + SETTINGS.closes)
    windows = ("--click-window", 4000, "--impression-window", 900, "--conversion-window", 9000)
    options = ("attribute", "--log", tmp_path / "log", *windows)
    code, out, err = run(*options, "--out", tmp_path / "rows")
    assert (code, "attributing" in err) == (0, True)
    raw = {kind: joining.raw(tmp_path / "log", kind) for kind in ("impressions", "events")}
    key = pl.struct("type", pl.when(type="click").then("user_id").otherwise("request_id").alias("entity"), "event_id")
    by_hour = raw["events"].group_by(pl.col("received") // 3600).agg(pl.len() - key.n_unique())
    repeated = len(raw["impressions"]) - 120 + by_hour["len"].sum()
    expected = joining.rows(tmp_path / "log", SETTINGS)
    counts = f"{len(expected)} impressions, {expected['label'].sum()} clicks, {expected['conversion'].sum()} conversions"
    assert out == f"{tmp_path / 'rows'}: {counts}; 19 rankings are open, {repeated} repeated ids were dropped\n"
    assert 100 < len(expected) < 300
    assert expected["label"].sum() > 5
    again = open_log(tmp_path / "rows")
    assert pl.concat(again.between(0, 1e12)).equals(pl.concat(open_log(tmp_path / "log", settings=SETTINGS).between(0, 1e12)))
    assert not (tmp_path / "rows").stat().st_mode & 0o007
    code, out, err = run(*options, "--out", tmp_path / "rows")
    assert (code, f"Error: {tmp_path / 'rows'} already exists; name a new folder or remove it first\n" in err) == (2, True)

    monkeypatch.setattr(attributed, "RANKINGS", 10)  # hours in four parts
    code, _, _ = run(*options, "--out", tmp_path / "parts")
    rows = [
        pl.concat([pl.read_parquet(path) for path in sorted((tmp_path / name).glob("day=*/*/*.parquet"))]) for name in ("rows", "parts")
    ]
    assert rows[0].equals(rows[1])
    assert len(list((tmp_path / "parts").glob("day=*/*/*.parquet"))) > 10


def test_a_log_that_cannot_be_attributed_leaves_nothing(tmp_path):
    log, events = joining.messy(random.Random(5))
    joining.write_raw(tmp_path / "log", small.schema(), log, events)
    joining.write_raw(tmp_path / "less", small.schema(), log, events)
    lacking = sorted(tmp_path.glob("less/raw/impressions/*/*/*.parquet"))[0]
    pl.read_parquet(lacking).drop("history").write_parquet(lacking)
    code, _, err = run("attribute", "--log", tmp_path / "less", "--out", tmp_path / "rows")
    assert (code, err.splitlines()[-1]) == (2, f"Error: {tmp_path / 'less'} cannot be attributed: {lacking} has no column history")
    shutil.rmtree(tmp_path / "less")
    sorted(tmp_path.glob("log/raw/events/*/*/*.parquet"))[-1].write_bytes(b"PAR1 torn")
    for log, sentence in ((tmp_path / "log", f"{tmp_path / 'log'} cannot be attributed: "), (tmp_path, f"{tmp_path} is not a log; ")):
        code, _, err = run("attribute", "--log", log, "--out", tmp_path / "rows")
        assert (code, err.splitlines()[-1].startswith(f"Error: {sentence}")) == (2, True), err
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
