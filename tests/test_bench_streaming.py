"""The rows that `benchmarks.streaming` makes are of Criteo's shape, and its programs run."""

import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import small
from click.testing import CliRunner

from benchmarks import streaming
from training.datasets.criteo import CATEGORIES


def test_the_rows_are_of_criteo_s_shape(tmp_path: Path) -> None:
    data = streaming.criteo_like(tmp_path / "rows", 5000)
    frame = pl.concat(data.frames("train"))
    assert (len(frame), len(frame.columns) - 3) == (4000, 39)
    assert 0.1 < frame["label"].mean() < 0.4  # type: ignore[operator]
    counts = frame["ad.C26"].value_counts(sort=True)["count"]  # of 100,000 values by Zipf's law the first has 1 / log2(1e5) of the rows
    assert counts[0] / 4000 == pytest.approx(np.log(2) / np.log(streaming.MOST_VALUES), abs=0.02)


def test_the_programs_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "VALUES_OF", [20] * len(CATEGORIES))
    speed = CliRunner().invoke(
        streaming.main, ["speed", "--rows", "2500", "--model", "lr", "--work", str(tmp_path)], catch_exceptions=False
    )
    assert "disk / memory: " in speed.output
    (tmp_path / "small").mkdir()
    folder = small.data_set(tmp_path / "small").folder
    auc = CliRunner().invoke(streaming.main, ["auc", "--data", str(folder), "--model", "lr", "--seeds", "1"], catch_exceptions=False)
    whole, pools, gap = (float(found) for found in re.findall(r"[+-]?0\.\d{5}", auc.output)[:3])
    assert pools - whole == pytest.approx(gap, abs=2e-5)
