"""A head beside the click in retraining: it is compared, reported and can refuse a version, where there is enough to tell."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import small
from scipy.special import expit
from test_cli import run

from training.calibrate import Calibration
from training.datasets.prepared import Prepared
from training.report.numbers import findings
from training.report.page import page
from training.retrain import gate
from training.retrain.compare import Gate, compare
from training.retrain.drift import make_reference
from training.retrain.report import brief

SETTINGS = ("epochs=1", "batch=64", "learning_rate=0.02", "threads=1", "hidden=8-4", "embedding=4", "unknown_rate=0")
HEADS = ("heads=click-conversion",)


def words(*settings: str) -> list[str]:
    return [word for each in settings for word in ("--set", each)]


def data_of(folder: Path) -> Prepared:
    """Every third click converts, and half of the conversions could have come by now."""
    folder.mkdir()
    data = small.data_set(folder, (600, 200, 300))
    for path in folder.glob("*/*.parquet"):
        frame = pl.read_parquet(path)
        bought = frame["label"] * (np.arange(len(frame)) % 3 == 0).astype(np.int8)
        frame.with_columns(conversion=bought, conversion_maturity=0.5).write_parquet(path)
    return data


def test_the_report_of_a_training_draws_the_reliability_of_each_head(tmp_path) -> None:
    data = data_of(tmp_path / "data")
    trained = small.quick(data, epochs=1, heads="click-conversion")
    found = findings(data, trained, json.loads(make_reference(data, trained.encoder.vocabularies)), small.quiet())
    bins = found["heads"]["conversion"]
    assert sum(each["rows"] for each in bins) == 300
    bought = trained.head_metrics["conversion"]["test"]
    assert sum(each["rows"] * each["p"] for each in bins) == pytest.approx(bought.calibration_ratio * bought.clicks, rel=1e-5)
    assert "Reliability of p(conversion)" in page(found)


@pytest.mark.usefixtures("traced_export")
def test_a_live_version_with_heads_is_retrained_and_both_heads_are_told(tmp_path) -> None:
    data_of(tmp_path / "data")
    models = tmp_path / "models"
    options = ("--data", tmp_path / "data", "--model", "deepfm", "--models", models, "--promote", "always")
    code, out, err = run("train", *options, *words(*SETTINGS, *HEADS))
    assert code == 0, (out, err)
    options = ("--log", tmp_path / "data", "--name", "deepfm", "--models", models, "--report", tmp_path / "report", "--start", "scratch")
    code, out, err = run("retrain", *options, *words(*SETTINGS, "least_rows=100", "report=false"))
    assert code in {0, 3}, (out, err)
    found = json.loads((tmp_path / "report" / "report.json").read_text())
    head = found["heads"]["conversion"]
    assert head["metrics"]["champion"]["rows"] == head["metrics"]["challenger"]["rows"] == 300
    assert head["metrics"]["challenger"]["clicks"] == pl.read_parquet(tmp_path / "data" / "test" / "0.parquet")["conversion"].sum()
    assert 0.5 < head["metrics"]["champion"]["calibration_ratio"] < 2  # of what has come by now
    page = (tmp_path / "report" / "report.md").read_text()
    assert "### p(conversion)" in page
    assert "| p(conversion) / conversions |" in page
    assert "conversions in 200 rows of valid" in found["training"]["calibration"]


@pytest.mark.parametrize(
    ("rows", "off", "reason"),
    [
        (4_000, 0.0, None),
        (4_000, 3.0, "p(conversion): log loss "),  # a logit that says the opposite
        (60, 0.3, None),  # too few to tell
    ],
)
def test_a_head_refuses_where_it_is_worse_beyond_doubt(rows: int, off: float, reason: str | None) -> None:
    random = np.random.default_rng(2)
    logits = random.normal(-2, 1, rows)
    labels, users = (random.random(rows) < expit(logits)).astype(np.float64), np.arange(rows) % 500
    worse = logits + off * random.normal(0, 1, rows)
    worse += brentq_shift(worse, labels.mean())
    same = compare(labels, users, expit(logits), expit(logits))
    found = {"click": same, "conversion": compare(labels, users, expit(worse), expit(logits))}
    trained = SimpleNamespace(calibrations={"click": Calibration(clicks=999), "conversion": Calibration(clicks=999)})
    reasons = gate.against(found, trained, Gate("not-worse"))
    assert [each.startswith(reason) for each in reasons] == ([True] if reason else [])
    assert "reliability" not in brief(found)["heads"]["conversion"]


def brentq_shift(logits: np.ndarray, rate: float) -> float:
    shifts = np.linspace(-8, 8, 1601)
    return float(shifts[np.argmin([abs(expit(logits + shift).mean() - rate) for shift in shifts])])
