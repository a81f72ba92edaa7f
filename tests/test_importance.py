import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import small

from features.bundle import Bundle, load_bundle
from tests.test_cli import run
from training import importance
from training.datasets.encoded import encode_split
from training.datasets.prepared import Prepared
from training.export import export
from training.importance import dealt, fields_of, importances


@pytest.fixture(scope="module")
def made(traced_export: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Prepared, Bundle]:
    """Clicks follow the ad alone; nothing else says anything."""
    folder = tmp_path_factory.mktemp("importance")
    data = small.data_set(folder, (600, 200, 400))
    for path in folder.glob("*/*.parquet"):
        frame = pl.read_parquet(path)
        number = frame["ad_id"].str.slice(1).cast(pl.Int64)
        frame.with_columns(label=(number % 2).cast(pl.Int8)).write_parquet(path)
    trained = small.quick(data, "deepfm", epochs=6)
    return data, load_bundle(export.export(data, trained, folder / "models", "m", small.quiet()))


def test_the_field_that_clicks_follow_is_worth_most_and_others_nothing(made: tuple[Prepared, Bundle]) -> None:
    data, bundle = made
    base, rows, found = importances(bundle, data, "test", small.quiet())
    assert rows == 400
    assert base > 0.95
    assert found[0].field == "ad.ad_id"
    assert found[0].drop > 0.2
    assert {each.field for each in found} == set(fields_of(bundle.schema))
    assert all(each.low <= each.drop <= each.high for each in found)
    assert all(each.drop < found[0].drop / 2 for each in found[1:])


def test_a_field_is_dealt_and_nothing_else(made: tuple[Prepared, Bundle]) -> None:
    data, bundle = made
    rows = encode_split(data, "test", bundle.encoder)
    order = np.random.default_rng(1).permutation(len(rows))
    for field in fields_of(bundle.schema):
        other = dealt(rows, bundle.schema, field, order)
        arrays = {
            "user ids": (rows.user.ids, other.user.ids),
            "user numbers": (rows.user.numbers, other.user.numbers),
            "ad ids": (rows.ad.ids, other.ad.ids),
            "ad numbers": (rows.ad.numbers, other.ad.numbers),
            "history": (rows.history, other.history),
        }
        changed = {name: np.flatnonzero((before != after).any(0)) for name, (before, after) in arrays.items()}
        assert sum(len(columns) > 0 for columns in changed.values()) == 1, field
        for name, (before, after) in arrays.items():
            assert (after[:, changed[name]] == before[order][:, changed[name]]).all()


def test_some_rows_are_those_rows(made: tuple[Prepared, Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    data, bundle = made
    rows = encode_split(data, "test", bundle.encoder)
    few = rows.take(np.array([3, 9]))
    assert len(few) == 2
    assert (few.ad.ids == rows.ad.ids[[3, 9]]).all()
    monkeypatch.setattr(importance, "ROWS", 50)
    assert importances(bundle, data, "test", small.quiet())[1] == 50


def test_the_command_prints_a_table_or_json(made: tuple[Prepared, Bundle]) -> None:
    data, bundle = made
    words = ("evaluate", "--bundle", bundle.path, "--data", data.folder, "--importance")
    code, shown, _ = run(*words)
    assert code in (0, None)
    assert "ad.ad_id" in shown
    document = json.loads(run(*words, "--json")[1])
    assert document["rows"] == 400
    assert document["fields"][0]["field"] == "ad.ad_id"
    assert document["fields"][0]["low"] <= document["fields"][0]["drop"]
    assert Path(bundle.path).exists()
