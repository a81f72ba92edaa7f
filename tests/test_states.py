from pathlib import Path

import polars as pl
import pytest

from tests.test_csv_table import HISTORY, SCHEMA
from tests.test_datasets import movielens_source
from training.datasets import movielens
from training.datasets.prepared import DataError, Prepared, open_prepared
from training.datasets.states import ads, user_states


def test_movielens_states_are_those_after_the_whole_log(tmp_path: Path) -> None:
    movielens.prepare(movielens_source(tmp_path), tmp_path / "out")
    states = {
        user: (dict(state.features), list(zip(state.ad_ids, state.ts, strict=True)))
        for user, state in user_states(open_prepared(tmp_path / "out"))
    }
    assert states == {
        "1": ({"gender": "F", "age": "1", "occupation": "10"}, [("10", 100), ("30", 100), ("99", 101), ("20", 302)]),
        "2": ({"gender": "M", "age": "56", "occupation": "16"}, [("20", 90), ("30", 300)]),
        "3": ({}, [("10", 301)]),
    }


def data_set(folder: Path, **splits: pl.DataFrame) -> Prepared:
    """A prepared data set as a log's own preparation might write it: no tables, splits out of order."""
    (folder / "schema.toml").write_text(SCHEMA + HISTORY)
    for split, frame in splits.items():
        (folder / split).mkdir()
        frame.with_columns(pl.col("label").cast(pl.Int8)).write_parquet(folder / split / "0.parquet")
    return open_prepared(folder)


def one_row(ts: int, label: int, ad: str, history: list[str], age: str | None = "25", user: str = "u") -> pl.DataFrame:
    row = {"label": [label], "user_id": [user], "ad_id": [ad], "ts": [ts], "history": [history], "user.age": [age]}
    return pl.DataFrame(row, schema_overrides={"history": pl.List(pl.String), "user.age": pl.String})


def test_without_tables_the_last_row_by_time_tells_all(tmp_path: Path) -> None:
    data = data_set(tmp_path, train=one_row(7, 1, "d", ["a", "b", "c"], "26"), valid=one_row(6, 1, "c", ["a"]), test=one_row(5, 0, "a", []))
    [(user, state)] = user_states(data)
    assert (user, dict(state.features), list(state.ad_ids), list(state.ts)) == ("u", {"age": "26"}, ["b", "c", "d"], [7, 7, 7])
    assert list(ads(data)) == []


def test_the_table_of_users_comes_before_the_last_row(tmp_path: Path) -> None:
    other = one_row(8, 0, "a", [], None, "v")
    data = data_set(tmp_path, train=one_row(7, 0, "d", [], "26"), valid=other, test=one_row(5, 0, "a", [], "27", "w"))
    pl.DataFrame({"user_id": ["u", "v", "w"], "user.age": ["70", "80", None]}).write_parquet(tmp_path / "users.parquet")
    assert {user: state.features for user, state in user_states(data)} == {"u": {"age": "70"}, "v": {"age": "80"}, "w": {"age": "27"}}


def test_a_value_that_no_request_could_hold_is_refused(tmp_path: Path) -> None:
    data = data_set(tmp_path, train=one_row(1, 0, "a", []))
    pl.DataFrame({"ad_id": ["a"], "ad.price": [float("inf")], "ad.topics": [["t"]]}).write_parquet(tmp_path / "ads.parquet")
    with pytest.raises(DataError, match=r"does not fit its field: ad\.price: expected a finite number"):
        list(ads(data))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"user_id": ["u", "u"], "history": [["a"], ["b"]]}, "user_id has duplicates"),
        ({"user_id": ["u"], "history": ["a"]}, "column history is String"),
        ({"user_id": ["u"], "history": [["a"]], "history_ts": [[1, 2]]}, "differ in length"),
        ({"user_id": ["u"]}, "column history is missing"),
    ],
)
def test_a_damaged_table_of_histories_is_refused(tmp_path: Path, table: dict[str, list[object]], message: str) -> None:
    data = data_set(tmp_path, train=one_row(1, 0, "a", []))
    pl.DataFrame(table).write_parquet(tmp_path / "histories.parquet")
    with pytest.raises(DataError, match=message):
        list(user_states(data))
