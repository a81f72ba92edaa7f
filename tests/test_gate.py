"""What a version that `adrank train` makes must come up to before it is live."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import small
from test_cli import refused, run

from features.bundle import current_path, read_manifest
from training import gate
from training.compare import no_better
from training.datasets.prepared import Prepared
from training.evaluate import measure, unmeasured
from training.train import Epoch
from training.window import Enough, Limits, too_little

QUICK = {"epochs": "3", "batch": "64", "learning_rate": "0.02", "embedding_l2": "0.0001", "threads": "1", "embedding": "4", "hidden": "8"}
WORDS = [word for key, value in QUICK.items() for word in ("--set", f"{key}={value}")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return small.data_set(tmp_path_factory.mktemp("small"), rows=(900, 300, 300))


@pytest.fixture(scope="module")
def live(data: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository whose first version has passed the gate."""
    models = tmp_path_factory.mktemp("models")
    code, printed, complaint = run("train", "--data", data.folder, "--model", "deepfm", "--models", models, *WORDS)
    assert code == 0, printed + complaint
    return models


def relabelled(data: Prepared, folder: Path, split: str, label: int) -> Path:
    for each in ("train", "valid", "test"):
        (folder / each).mkdir(parents=True)
        frame = next(data.frames(each))
        (frame.with_columns(label=pl.lit(label, pl.Int8)) if split in (each, "all") else frame).write_parquet(folder / each / "0.parquet")
    for name in ("schema.toml", "ads.parquet"):
        (folder / name).write_bytes((data.folder / name).read_bytes())
    return folder


def versions(models: Path) -> list[str]:
    return sorted(path.name for path in (models / "deepfm").iterdir() if path.name.isdigit())


def test_a_first_version_that_is_fit_is_live_and_says_on_what_its_calibration_rests(live: Path) -> None:
    path = current_path(live, "deepfm")
    told = read_manifest(path)
    assert (told["gate"]["promote"], told["gate"]["reasons"]) == ("gate", [])
    assert told["gate"]["metrics"]["challenger"]["rows"] == 300
    assert told["calibration"]["rows"] == 300
    assert told["calibration"]["clicks"] == json.loads((path / "metrics.json").read_text())["valid"]["clicks"]


@pytest.mark.parametrize(
    ("split", "label", "reason"),
    [
        ("all", 0, "all 1,500 labels of the data set are 0"),
        ("all", 1, "all 1,500 labels of the data set are 1"),
        ("valid", 0, "all 300 labels of the slice for early stopping are 0"),
        ("test", 1, "all 300 labels of the newest slice, which is held out, are 1"),
    ],
)
def test_labels_of_one_class_are_published_and_not_live(
    data: Prepared, live: Path, tmp_path: Path, split: str, label: int, reason: str
) -> None:
    folder, models = relabelled(data, tmp_path / "data", split, label), tmp_path / "models"
    code, printed, _ = run("train", "--data", folder, "--model", "deepfm", "--models", models, *WORDS, "--epochs", 1)
    assert code == 3
    [version] = versions(models)
    assert f"\nnot live: {reason}\n" in printed
    cure = f"adrank promote --models {models} --name deepfm --version {version}"
    assert printed.endswith(f"{version} is published and not live; {cure} makes it so\n")
    assert not (models / "deepfm" / "current").exists()
    assert run(*cure.split()[1:])[0] == 0
    assert current_path(models, "deepfm").name == version


def test_what_diverged_is_published_and_not_live(data: Prepared, tmp_path: Path) -> None:
    for rate, reason in (("100", "the training diverged: its loss began at"), ("1e30", "the training diverged in epoch 1")):
        code, printed, complaint = run(
            "train", "--data", data.folder, "--model", "deepfm", "--models", tmp_path, *WORDS, "--set", f"learning_rate={rate}"
        )
        assert code == 3, complaint
        assert f"not live: {reason}" in printed
    assert len(versions(tmp_path)) == 2
    assert not (tmp_path / "deepfm" / "current").exists()


def test_promote_says_when_a_version_is_live(data: Prepared, live: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = current_path(live, "deepfm").name
    train = ("train", "--data", data.folder, "--model", "deepfm", "--models", live, *WORDS)
    code, printed, _ = run(*train, "--promote", "if-better")  # the same again, which is no better
    assert (code, current_path(live, "deepfm").name) == (3, first)
    assert re.search(r"not live: log loss (\S+) against the champion's \1, difference .*\(gate better\)", printed)
    assert run(*train, "--promote", "if-better", "--set", "gate=not-worse")[0] == 0
    second = current_path(live, "deepfm").name
    code, printed, _ = run(*train, "--promote", "never")
    assert (code, current_path(live, "deepfm").name) == (0, second)
    assert "is published and not live; adrank promote" in printed
    code, printed, _ = run(*train, "--promote", "always", "--set", "least_rows=2000")
    assert code == 0
    assert "live all the same: the data set has 1,500 rows, too few to judge by: least_rows is 2,000" in printed
    assert current_path(live, "deepfm").name == versions(live)[-1] != second
    refused(run(*train, "--set", "least_rows=1"), "least_rows is 1; it must be at least 3")


def test_what_is_no_better_than_a_constant_or_than_chance_is_told() -> None:
    random = np.random.default_rng(0)
    p = random.uniform(0.05, 0.4, 4000)
    labels, users = (random.random(4000) < p).astype(float), np.zeros(4000, np.int64)
    assert no_better(measure(labels, p, users)) is None
    assert "no better than the click rate alone: normalised entropy is 1.0" in str(no_better(measure(labels, 0.45 - p, users)))
    assert "no better than the click rate alone" in str(no_better(unmeasured(labels)))
    assert no_better(replace(measure(labels, p, users), auc=0.466)) == "it ranks no better than chance: AUC is 0.4660"


def test_too_little_is_told_with_its_numbers() -> None:
    three = {"train": 2, "valid": 1, "test": 0}
    assert list(too_little(three, {"train": 1, "valid": 0, "test": 0}, Enough(), "data set")) == [
        "the data set has 3 rows, too few to judge by: least_rows is 1,000",
        "the data set has 1 clicks in 3 rows, too few of one kind to judge by: least_clicks is 50",
        "all 1 labels of the slice for early stopping are 0",
        "there are no rows for the newest slice, which is held out",
    ]
    assert list(too_little({}, {}, Limits(), "window")) == []


def test_a_loss_that_only_wavers_has_not_diverged() -> None:
    fine = measure(np.array([0.0, 1.0]), np.array([0.4, 0.6]), np.zeros(2))
    assert list(gate.diverged([Epoch(1, 0.1, 0.72, fine, 0.70)])) == []
    assert list(gate.diverged([Epoch(1, 0.1, 9.0, fine, 0.70), Epoch(2, 0.1, 0.4, fine, 0.70)])) == []
    [told] = gate.diverged([Epoch(1, 0.1, 9.0, fine, 0.70)])
    assert told.startswith("the training diverged: its loss began at 0.7, and no epoch's mean is below 9;")
    none = unmeasured(np.array([0.0, 1.0]))
    [told] = gate.diverged([Epoch(1, 0.1, 0.5, fine, 0.7), Epoch(2, 0.1, 0.5, none, 0.7)])
    assert told == "the training diverged in epoch 2, the weights are the best of those after epoch 1; try a learning_rate below 0.1"


def test_a_schema_without_a_history_is_trained(tmp_path: Path) -> None:
    """Nothing of a history can be hidden where there is none."""
    data = small.data_set(tmp_path, rows=(200, 60, 60))
    text = small.SCHEMA.replace(small.HISTORY, "")
    (tmp_path / "schema.toml").write_text(text)
    trained = small.quick(replace(data, schema=small.schema(text)), epochs=1, unknown_rate=0.3)
    assert trained.rows == {"train": 200, "valid": 60, "test": 60}
