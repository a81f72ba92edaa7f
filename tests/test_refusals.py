"""What a person can mend is one sentence and exit code 2, and leaves nothing behind."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import small

from tests.test_cli import QUICK, SCHEMA, log, refused, run, write
from tests.test_datasets import movielens_source


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.data_set(tmp_path_factory.mktemp("small"), rows=(130, 60, 60)).folder


def copied(data: Path, out: Path) -> Path:
    """The data set, to be damaged."""
    for path in data.rglob("*"):
        if path.is_file():
            (out / path.relative_to(data)).parent.mkdir(parents=True, exist_ok=True)
            (out / path.relative_to(data)).write_bytes(path.read_bytes())
    return out


def test_a_table_that_does_not_fit_is_a_sentence(tmp_path: Path) -> None:
    """What is wrong with tables, one by one: `test_csv_table`, `test_tables`."""
    schema = write(tmp_path, SCHEMA, "my.toml")
    for table, message in ((log() + "2,u1,25,a1,3\n", r"log\.csv.*line 152.*clicked"), (b"\x89PNG\r\n\x1a\n\xff\xfe", r"log\.csv")):
        refused(run("prepare", "csv", "--source", write(tmp_path, table), "--out", tmp_path / "out", "--schema", schema), message)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.csv", "my.toml"]


def test_a_preparation_that_cannot_be_is_a_sentence(tmp_path: Path) -> None:
    source, schema, out = write(tmp_path, log()), write(tmp_path, SCHEMA, "my.toml"), tmp_path / "out"
    refused(run("prepare", "csv", "--source", source, "--out", out), "csv needs --schema FILE")
    refused(run("prepare", "frappe", "--source", source, "--out", out, "--schema", schema), "--schema is for csv")
    refused(run("prepare", "csv", "--source", tmp_path / "absent", "--out", out, "--schema", schema), "absent")
    refused(run("prepare", "csv", "--source", source, "--out", out, "--schema", tmp_path / "absent"), "absent")
    refused(run("prepare", "csv", "--source", source, "--out", out, "--schema", write(tmp_path, "[ad", "bad.toml")), "no TOML: Expected")
    refused(run("prepare", "csv", "--source", source, "--out", tmp_path, "--schema", schema), "already exists")
    refused(run("prepare", "movielens", "--source", tmp_path, "--out", out), r"users\.dat")
    refused(run("prepare", "criteo", "--source", movielens_source(tmp_path), "--out", out), r"train\.txt")
    code, _, complaint = run("prepare", "netflix", "--source", source, "--out", out)
    assert code == 2
    assert "'netflix' is not one of 'movielens'" in complaint
    assert not out.exists()


def _drop(column: str) -> Callable[[pl.DataFrame], pl.DataFrame]:
    return lambda frame: frame.drop(column)


BAD_DATA: list[tuple[str, Callable[[pl.DataFrame], pl.DataFrame], str]] = [
    ("train", _drop("label"), r"train/0\.parquet: column label is missing"),
    ("test", _drop("history"), "no column holds history, which the schema"),
    ("valid", lambda frame: frame.clear(), "the valid split of .* has no row"),
    ("train", lambda frame: frame.head(1), "at least 2 rows"),
]
"""One of each kind, in each split; the others are told alike, see `test_encoded`."""


@pytest.mark.parametrize(("split", "damage", "message"), BAD_DATA)
def test_a_data_set_that_is_none_is_a_sentence(tmp_path: Path, data: Path, split: str, damage: Any, message: str) -> None:
    folder = copied(data, tmp_path / "data")
    file = folder / split / "0.parquet"
    damage(pl.read_parquet(file)).write_parquet(file)
    refused(run("train", "--data", folder, "--model", "deepfm", "--models", tmp_path / "models", *QUICK), message)
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "wide"], "there is no network 'wide'; there are .*deepfm, .*din"),
        (["--model", "deepfm", "--name", "../x"], "'../x' is not a model name"),
        (["--model", "deepfm", "--set", "colour=red"], "--set colour: no such setting; there are embedding, hidden"),
        (["--model", "deepfm", "--set", "epochs"], "--set epochs: expected KEY=VALUE"),
        (["--model", "deepfm", "--set", "hidden=big"], "--set hidden=big: expected a value such as 200-80"),
        (["--model", "deepfm", "--set", "batch=1"], "at least 2 rows"),
        (["--model", "deepfm", "--set", "learning_rate=-1"], "[Ll]earning.rate"),
        (["--model", "deepfm", "--set", "dropout=2"], "dropout"),
        (["--model", "deepfm", "--seed", "9" * 30], "seed is 9+; it must be at least 0, and below"),
    ],
)
def test_a_setting_that_is_none_is_a_sentence(tmp_path: Path, data: Path, words: list[str], message: str) -> None:
    refused(run("train", "--data", data, "--models", tmp_path / "models", *words), message)
    assert list(tmp_path.iterdir()) == []


def test_other_mistakes_of_training_are_sentences(tmp_path: Path, data: Path) -> None:
    models = tmp_path / "models"
    refused(run("train", "--data", tmp_path, "--model", "deepfm", "--models", models), "is not a prepared data set")
    folder = copied(data, tmp_path / "data")
    (folder / "schema.toml").write_text(small.SCHEMA.replace(small.HISTORY, ""))
    refused(run("train", "--data", folder, "--model", "din", "--models", models), r"this schema has no \[history\]; train deepfm instead")
    (folder / "schema.toml").write_text(small.SCHEMA.replace('kind = "list"', 'kind = "set"', 1))
    refused(run("train", "--data", folder, "--model", "din", "--models", models), r"schema\.toml: field user.interests: kind is 'set'")
    assert not models.exists()
