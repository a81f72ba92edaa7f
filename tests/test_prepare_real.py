"""The public data sets themselves, from ../shared/data, which is not part of the project."""

from collections import defaultdict
from pathlib import Path

import duckdb
import polars as pl
import pytest

from tests.test_counters import COUNTERS, FIELDS, brute_force
from training.datasets import criteo, csv_table, frappe, movielens, open_bandit
from training.datasets.prepared import SPLITS, Prepared, open_prepared
from training.datasets.states import ads, user_states

SOURCES = Path(__file__).parent.parent.parent / "shared" / "data"
pytestmark = pytest.mark.skipif(not SOURCES.is_dir(), reason=f"a set of public data is not in {SOURCES}")


def whole(data: Prepared, *columns: str) -> pl.DataFrame:
    """All rows as they lie there: `frames` would read every column and check it, a million histories each time."""
    return pl.read_parquet([path for split in SPLITS for path in data.files(split)], columns=list(columns))


def clicks(data: Prepared) -> dict[str, int]:
    return {split: int(pl.read_parquet(data.files(split), columns=["label"])["label"].cast(pl.Int64).sum()) for split in SPLITS}


@pytest.fixture(scope="module")
def ml(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    out = tmp_path_factory.mktemp("ml") / "out"
    assert movielens.prepare(SOURCES / "ml-1m", out) == {"train": 800_167, "valid": 100_021, "test": 100_021}
    return open_prepared(out)


def test_movielens_has_the_protocol_s_clicks(ml: Prepared) -> None:
    assert clicks(ml) == {"train": 463_078, "valid": 57_740, "test": 54_463}
    assert len(list(ads(ml))) == 3_883
    assert whole(ml, "ts")["ts"].is_sorted()
    assert ml.table("ad")["ad.genres"].list.len().max() == ml.schema.field("ad", "genres").length


def test_movielens_has_the_counts_of_its_raw_file(ml: Prepared) -> None:
    raw = duckdb.read_csv(str(SOURCES / "ml-1m" / "ratings.dat"), sep="::", header=False, names=["user", "movie", "rating", "ts"])
    for name, column in (("user_id", "raw.user"), ("ad_id", "movie")):
        of_raw = duckdb.sql(f"SELECT {column}::VARCHAR AS id, count(*), count(*) FILTER (rating >= 4), max(ts) FROM raw GROUP BY id")
        ours = whole(ml, name, "label", "ts").group_by(name).agg(pl.len(), pl.col("label").cast(pl.Int64).sum(), pl.col("ts").max())
        assert sorted(ours.rows()) == sorted(of_raw.fetchall())
    assert raw.shape[0] == 1_000_209


def test_the_movielens_history_of_every_tenth_user_is_the_user_s_past(ml: Prepared) -> None:
    past: dict[str, list[str]] = defaultdict(list)
    wrong, some = 0, pl.col("user_id").str.ends_with("7")
    for user, movie, label, history in whole(ml, "user_id", "ad_id", "label", "history").filter(some).iter_rows():
        wrong += history != past[user][-50:]
        if label:
            past[user].append(movie)
    assert wrong == 0
    states = {user: state for user, state in user_states(ml) if user.endswith("7")}
    assert 500 < len(past) < 700
    assert {user: list(state.ad_ids) for user, state in states.items()} == {user: movies[-50:] for user, movies in past.items()}
    assert all(list(state.ts) == sorted(state.ts) and set(state.features) == {"gender", "age", "occupation"} for state in states.values())


def test_frappe_has_the_given_splits(tmp_path: Path) -> None:
    assert frappe.prepare(SOURCES / "frappe_x1", tmp_path / "out") == {"train": 202_027, "valid": 57_722, "test": 28_860}
    data = open_prepared(tmp_path / "out")
    source = pl.read_csv(SOURCES / "frappe_x1" / "test.csv", infer_schema=False)
    prepared = pl.concat(data.frames("test")).with_columns(pl.col("label").cast(pl.String))
    assert prepared.rows() == source.rows()
    per_item = whole(data, "ad_id", "context.cost").group_by("ad_id").agg(pl.col("context.cost").n_unique())
    assert per_item["context.cost"].max() > 1  # or cost would belong to the ad


def test_criteo_has_its_clicks(tmp_path: Path) -> None:
    assert criteo.prepare(SOURCES / "criteo_10k", tmp_path / "out") == {"train": 8_000, "valid": 1_000, "test": 1_000}
    data = open_prepared(tmp_path / "out")
    assert sum(clicks(data).values()) == 2_182
    last = (SOURCES / "criteo_10k" / "train.txt").read_text().splitlines()[-1].split("\t")
    row = whole(data, *(f"ad.C{i}" for i in range(1, 27))).row(-1)
    assert [value or "" for value in row] == last[14:]


def test_open_bandit_has_its_clicks_and_propensities(tmp_path: Path) -> None:
    assert open_bandit.prepare(SOURCES / "open_bandit", tmp_path / "out") == {"train": 8_000, "valid": 1_000, "test": 1_000}
    data = open_prepared(tmp_path / "out")
    assert sum(clicks(data).values()) == 38
    log = whole(data, "propensity", "ad_id", "user_id", "context.position", "ts")
    assert log["propensity"].unique().to_list() == [0.0125]
    assert [log["ad_id"].n_unique(), log["user_id"].n_unique(), sorted(log["context.position"].unique())] == [80, 240, ["1", "2", "3"]]
    assert log["ts"][0] == 1574553634
    assert len(list(user_states(data))) == 240


def test_counters_of_movielens_look_at_nothing_but_the_past(ml: Prepared, tmp_path: Path) -> None:
    """By the definition, from the events of each row's group before its time: many ratings of a user have the same second."""
    head = next(ml.frames("train")).head(6_000).select("user_id", "ad_id", "ts", click="label").join(ml.table("ad"), on="ad_id", how="left")
    head.rename({"ad.genres": "topic", "ts": "time"}).write_parquet(tmp_path / "rows")
    (tmp_path / "my.toml").write_text(f'{FIELDS}{COUNTERS}[table]\nlabel = "click"\nts = "time"\n')
    csv_table.prepare(tmp_path / "rows", tmp_path / "out", tmp_path / "my.toml")
    data = whole(open_prepared(tmp_path / "out"), "user_id", "ad_id", "ts", "label", "ad.topic", "ad.clicks", "user.shown", "ad.liked")
    assert data["ts"].is_duplicated().mean() > 0.1
    topic = data["ad.topic"].list.first()
    for column, whose, happened, window, some in (
        ("ad.clicks", data["ad_id"], data["label"], 3_600.0, data["ad_id"].hash() % 20 == 0),
        ("user.shown", data["user_id"], data["label"] >= 0, 600.0, data["user_id"].hash() % 20 == 0),
        ("ad.liked", data["user_id"] + topic, data["label"], 604_800.0, data["user_id"].hash() % 10 == 0),
    ):
        rows = data.with_columns(group=whose.rank("dense").cast(pl.Int64), happened=happened.cast(pl.Int64)).filter(some)
        found = brute_force(rows["group"].to_list(), rows["ts"].to_list(), rows["happened"].to_list(), window)
        assert 100 < len(rows) < 1_500
        assert rows[column].to_list() == pytest.approx(found, rel=1e-9, abs=1e-12)
