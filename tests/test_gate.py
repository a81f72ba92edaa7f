"""What a version that `adrank train` makes must come up to before it is live."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import small
from test_cli import run

from features.bundle import current_path, read_manifest
from training.datasets.prepared import Prepared, open_prepared
from training.evaluate import measure, unmeasured
from training.export.export import contents
from training.fit import Epoch
from training.report.files import PLACE
from training.retrain import gate, publish
from training.retrain.compare import Gate, compare, no_better, violations
from training.retrain.data_checks import Enough, Limits, too_little
from training.train import Trained

pytestmark = pytest.mark.usefixtures("traced_export")
Made = tuple[Trained, dict[str, bytes], dict[str, Any]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return small.data_set(tmp_path_factory.mktemp("small"), rows=(900, 300, 300))


@pytest.fixture(scope="module")
def made(data: Prepared) -> Made:
    """A training that is fit to be live, and its bundle's contents: exporting takes longer than all else here."""
    trained = small.quick(data, epochs=3)
    return trained, *contents(data, trained, small.quiet())


@pytest.fixture
def train(data: Prepared, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """`adrank train` into `tmp_path / "models"`, whose trainings end at once: the exit code, and what it printed."""

    def run_it(*words: object, changed: Trained | None = None) -> tuple[int, str]:
        monkeypatch.setattr(publish, "train", lambda *_: changed or made[0])
        monkeypatch.setattr(publish, "contents", lambda *_: (made[1] | {"report.html": PLACE}, made[2]))
        code, printed, complaint = run("train", "--data", data.folder, "--model", "deepfm", "--models", tmp_path / "models", *words)
        return code, printed + complaint

    return run_it


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


def page_of(models: Path) -> str:
    """What the newest version's `report.html` says at its top."""
    page = (models / "deepfm" / versions(models)[-1] / "report.html").read_text()
    return re.sub(r"(<[^>]*>)+", " / ", page).strip(" /")


def test_a_first_version_that_is_fit_is_live_and_says_on_what_its_calibration_rests(
    train: Callable[..., tuple[int, str]], made: Made, tmp_path: Path
) -> None:
    code, printed = train()
    assert code == 0, printed
    path, calibration = current_path(tmp_path / "models", "deepfm"), made[0].calibration
    assert f"{calibration.line()}\npublished {path}\n" in printed
    manifest = read_manifest(path)
    assert (manifest["gate"]["promote"], manifest["gate"]["reasons"]) == ("gate", [])
    assert manifest["gate"]["metrics"]["challenger"]["rows"] == 300
    assert (manifest["calibration"]["rows"], manifest["calibration"]["clicks"]) == (300, made[0].metrics["valid"].clicks)


@pytest.mark.parametrize(
    ("split", "label", "reason"),
    [
        ("all", 0, "all 1,500 labels of the data set are 0"),
        ("test", 1, "all 300 labels of the newest slice, which is held out, are 1"),
    ],
)
def test_labels_of_one_class_are_a_flaw(data: Prepared, tmp_path: Path, split: str, label: int, reason: str) -> None:
    trained = small.quick(open_prepared(relabelled(data, tmp_path, split, label)), epochs=1)
    assert gate.flaws(trained, Enough()) == [reason]
    assert np.isfinite([trained.calibration.scale, trained.calibration.shift]).all()


def test_what_is_not_fit_is_published_and_not_live_with_the_reason_and_the_fix(
    train: Callable[..., tuple[int, str]], made: Made, tmp_path: Path
) -> None:
    models, none = tmp_path / "models", dict.fromkeys(("train", "valid", "test"), 0)
    code, printed = train(changed=replace(made[0], clicks=none))
    assert code == 3
    [version] = versions(models)
    assert page_of(models) == "Not made live / all 1,500 labels of the data set are 0"
    assert "\nnot live: all 1,500 labels of the data set are 0\n" in printed
    fix = f"adrank promote --models {models} --name deepfm --version {version}"
    assert f"{version} is published and not live; {fix} makes it so\n" in printed
    assert not (models / "deepfm" / "current").exists()
    assert read_manifest(models / "deepfm" / version)["gate"]["reasons"] == ["all 1,500 labels of the data set are 0"]
    assert run(*fix.split()[1:])[0] == 0
    assert current_path(models, "deepfm").name == version


def test_what_measures_badly_is_not_live(data: Prepared, made: Made, train: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    flat = replace(made[0].metrics["valid"], normalised_entropy=1.01, auc=0.466)
    code, printed = train(changed=replace(made[0], metrics={**made[0].metrics, "valid": flat}))
    assert code == 3
    assert "not live: on valid it is no better than the click rate alone: normalised entropy is 1.0100" in printed
    code, printed = train("--set", "first_calibration=0", "--json")
    assert code == 0  # what is off is within noise
    told = json.loads(printed.splitlines()[0])
    assert (told["live"], told["refused"], told["reasons"]) == (True, False, [])
    assert told["bundle"] == str(current_path(tmp_path / "models", "deepfm"))
    assert told["metrics"]["test"]["rows"] == 300


@pytest.mark.parametrize(
    ("rate", "reason"), [(100.0, "the training diverged: its loss began at"), (1e30, "the training diverged in epoch 1,")]
)
def test_a_loss_that_runs_away_is_a_flaw(data: Prepared, rate: float, reason: str) -> None:
    trained = small.quick(data, epochs=2, learning_rate=rate)
    [manifest] = gate.flaws(trained, Enough())
    assert manifest.startswith(reason)
    assert np.isfinite(trained.metrics["test"].log_loss)


def test_promote_says_when_a_version_is_live(train: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    models = tmp_path / "models"
    assert train("--promote", "if-better")[0] == 0  # the first, with nothing to compare
    assert page_of(models) == "Made live"
    first = current_path(models, "deepfm").name
    code, printed = train("--promote", "if-better")  # the same again, which is no better
    assert (code, current_path(models, "deepfm").name) == (3, first)
    assert re.search(r"not live: log loss (\S+) against the champion's \1, difference .*\(gate better\)", printed)
    assert train("--promote", "if-better", "--set", "gate=not-worse")[0] == 0
    second = current_path(models, "deepfm").name
    code, printed = train("--promote", "never")
    assert (code, current_path(models, "deepfm").name) == (0, second)
    assert "is published and not live; adrank promote" in printed
    assert page_of(models) == "Not made live (--promote never)"
    code, printed = train("--promote", "always", "--set", "least_rows=2000")
    assert code == 0
    assert "live all the same: the data set has 1,500 rows, too few to judge by: least_rows is 2,000" in printed
    assert page_of(models).startswith("Made live (--promote always) / the data set has 1,500 rows")
    assert current_path(models, "deepfm").name == versions(models)[-1] != second
    code, printed = train("--set", "least_rows=1")
    assert (code, "least_rows is 1; it must be at least 3" in printed) == (2, True)


def test_a_live_version_that_changes_meanwhile_voids_the_comparison(
    train: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train()[0] == 0
    compared = gate.compared

    def slow(*arguments: Any) -> Any:
        monkeypatch.setattr(gate, "compared", compared)
        assert train("--promote", "always")[0] == 0
        return compared(*arguments)

    monkeypatch.setattr(gate, "compared", slow)
    code, printed = train("--promote", "if-better", "--set", "gate=not-worse")
    assert code == 3
    assert "so the comparison is void" in printed


def test_a_mean_that_rests_on_few_clicks_may_be_off_by_their_noise() -> None:
    random = np.random.default_rng(1)
    p = np.full(5000, 0.2) + random.uniform(-0.1, 0.1, 5000)
    labels, users = (random.random(5000) < p).astype(float), np.arange(5000)
    found = compare(labels, users, p * 1.2, None)
    assert found.calibration.low > 0.1
    assert "calibration is off" in violations(found, Gate(), 5000)[0]
    assert "may be 0.1000 from 0" in violations(found, Gate())[0]
    assert violations(found, Gate(), 60) == []  # of which a quarter more or less is chance


def test_what_is_no_better_than_a_constant_or_than_chance_is_told() -> None:
    random = np.random.default_rng(0)
    p = random.uniform(0.05, 0.4, 4000)
    labels, users = (random.random(4000) < p).astype(float), np.zeros(4000, np.int64)
    assert no_better(measure(labels, p, users)) is None
    assert "no better than the click rate alone: normalised entropy is 1.1" in str(no_better(measure(labels, 0.45 - p, users)))
    assert "no better than the click rate alone" in str(no_better(unmeasured(labels)))
    assert no_better(replace(measure(labels, p, users), auc=0.466)) == "it ranks no better than chance: AUC is 0.4660"


def test_too_little_is_told_with_its_numbers() -> None:
    three = {"train": 2, "valid": 1, "test": 0}
    assert list(too_little(three, {"train": 1, "valid": 0, "test": 0}, Enough(), "data set")) == [
        "the data set has 3 rows, too few to judge by: least_rows is 200",
        "the data set has 1 clicks in 3 rows, too few of one kind to judge by: least_clicks is 10",
        "all 1 labels of the slice for early stopping are 0",
        "there are no rows for the newest slice, which is held out",
    ]
    assert list(too_little({}, {}, Limits(), "window")) == []


def test_a_loss_that_only_wavers_has_not_diverged() -> None:
    fine = measure(np.array([0.0, 1.0]), np.array([0.4, 0.6]), np.zeros(2))
    assert list(gate.diverged([Epoch(1, 0.1, 0.72, fine, 0.70)])) == []
    assert list(gate.diverged([Epoch(1, 0.1, 9.0, fine, 0.70), Epoch(2, 0.1, 0.4, fine, 0.70)])) == []
    [manifest] = gate.diverged([Epoch(1, 0.1, 9.0, fine, 0.70)])
    assert manifest.startswith("the training diverged: its loss began at 0.7, and no epoch's mean is below 9;")
    none = unmeasured(np.array([0.0, 1.0]))
    [manifest] = gate.diverged([Epoch(1, 0.1, 0.5, fine, 0.7), Epoch(2, 0.1, 0.5, none, 0.7)])
    assert manifest == "the training diverged in epoch 2, the weights are the best of those after epoch 1; try a learning_rate below 0.1"


def test_a_schema_without_a_history_is_trained(tmp_path: Path, settled_soon: None) -> None:
    """Nothing of a history can be hidden where there is none."""
    data = small.data_set(tmp_path, rows=(200, 60, 60))
    text = small.SCHEMA.replace(small.HISTORY, "")
    (tmp_path / "schema.toml").write_text(text)
    trained = small.quick(replace(data, schema=small.schema(text)), epochs=1, unknown_rate=0.3)
    assert trained.rows == {"train": 200, "valid": 60, "test": 60}
