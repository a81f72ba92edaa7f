import io
import json
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import small
from rich.console import Console

from adrank_bench import models
from adrank_bench.cold import by_exposure, exposures
from adrank_bench.models import ModelRun, draw, improvement, measure, show, table_of
from tests.test_cli import run
from training.datasets.prepared import DataError, Prepared
from training.train_settings import TrainError

QUICK = {"embedding": "4", "hidden": "8", "epochs": "1", "batch": "64", "unknown_rate": "0", "least_steps": "0"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return small.data_set(tmp_path_factory.mktemp("data"))


def said(family: str) -> dict[str, str]:
    return {name: value for name, value in QUICK.items() if family != "lr" or name not in ("embedding", "hidden")}


def test_what_is_measured_stays_and_what_cannot_be_trained_says_why(
    data: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "SCORING_SECONDS", 0.05)
    monkeypatch.setattr(models, "to_onnx", small.traced)
    target = tmp_path / "bench" / "small.json"
    first = measure(data, ["deepfm", "esmm"], 1, said, target, small.quiet())
    assert [each.family for each in first] == ["deepfm", "esmm"]
    assert "has no column conversion" in first[1].refused
    whole = first[0]
    assert whole.epochs == 1
    assert whole.test["rows"] == 100
    assert sum(each["rows"] for each in whole.cold if each["of"] == "user") == 100
    assert min(whole.training_rows_per_second, whole.candidates_per_second, whole.parameters) > 0
    document = json.loads(target.read_text())
    assert document["data_set"] == "small"
    assert document["runs"][0]["settings"] == QUICK

    def none(*_: object) -> None:
        raise AssertionError("measured twice")

    monkeypatch.setattr(models.Measuring, "run", none)
    assert measure(data, ["deepfm", "esmm"], 1, said, target, small.quiet()) == first
    with pytest.raises(AssertionError, match="measured twice"):  # another setting is another measurement
        measure(data, ["deepfm"], 1, lambda family: {**said(family), "batch": "32"}, target, small.quiet())


def test_a_file_of_another_data_set_or_none_is_refused(data: Prepared, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"data_set": "other", "runs": []}))
    with pytest.raises(DataError, match="is about the data set other, and this is small"):
        measure(data, ["lr"], 1, said, path, small.quiet())
    path.write_text("[]")
    with pytest.raises(DataError, match="is no file of adrank benchmark models"):
        measure(data, ["lr"], 1, said, path, small.quiet())
    with pytest.raises(TrainError, match="there is no network 'mlp'"):
        measure(data, ["mlp"], 1, said, tmp_path / "y.json", small.quiet())


def test_rows_are_apart_by_what_training_has_seen_of_their_ad_and_user(data: Prepared, tmp_path: Path) -> None:
    train, test = (next(data.frames(split)) for split in ("train", "test"))
    exposure = exposures(data)
    expected = [int((train["ad_id"] == ad).sum()) for ad in test["ad_id"]]
    assert exposure["ad"].tolist() == expected
    seen = np.array([0, 0, 3, 10, 11, 500])
    labels, p = np.array([1, 0, 1, 0, 1, 1]), np.array([0.2, 0.4, 0.9, 0.1, 0.5, 0.6])
    document = by_exposure({"ad": seen}, labels, p)
    assert [(each["seen"], each["rows"], each["auc"]) for each in document] == [("0", 2, 0.0), ("1 to 10", 2, 1.0), ("more", 2, None)]
    assert document[0]["log_loss"] == pytest.approx(-(np.log(0.2) + np.log(0.6)) / 2)


def a_run(family: str, seed: int, auc: float, serving: float) -> ModelRun:
    test = {"auc": auc, "gauc": None, "log_loss": 0.5}
    return ModelRun(family, seed, {}, test=test, parameters=10, training_rows_per_second=5.0, candidates_per_second=serving)


def test_the_table_has_means_the_best_first_and_says_what_was_refused(tmp_path: Path) -> None:
    runs = [a_run("lr", 1, 0.6, 1e6), a_run("dcn", 1, 0.7, 1e5), a_run("dcn", 2, 0.8, 3e5), ModelRun("din", 1, {}, refused="no history")]
    rows = table_of(runs)
    assert [(row.family, row.seeds) for row in rows] == [("dcn", 2), ("lr", 1)]
    assert (rows[0].auc, rows[0].spread, rows[0].serving) == pytest.approx((0.75, 0.1, 2e5))
    assert np.isnan(rows[0].gauc)
    assert improvement(0.75, 0.6) == "+150.00 %"
    console = Console(width=200, record=True, file=io.StringIO())
    show(runs, console)
    text = console.export_text()
    assert "+150.00 %" in text
    assert "din: no history" in text
    draw(runs, tmp_path / "plots" / "models.svg")
    assert ET.parse(tmp_path / "plots" / "models.svg").getroot().tag.endswith("svg")
    assert all(f"<!-- {family} -->" in (tmp_path / "plots" / "models.svg").read_text() for family in ("dcn", "lr"))


def test_help_lists_the_networks() -> None:
    _, shown, _ = run("train", "--help")
    assert "Networks:" in shown
    assert "deepfm" in shown.split("Networks:")[1]
