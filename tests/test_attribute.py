"""The log attributed by others: the SQL of docs/attribution.sql against our query, on the same raw files."""

import random

import duckdb
import joining
import small
from processes import ROOT

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
