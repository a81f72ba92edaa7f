"""Conversions that may still come: how long they take, what a row of an open window counts, and a head that is trained so."""

import math

import joining
import numpy as np
import polars as pl
import pytest
import small
import torch
from scipy.special import expit
from test_cli import run

from features.bundle import load_bundle
from features.schema import parse_schema
from training.calibrate import fit
from training.datasets.encoded import encode_split
from training.datasets.log import open_log
from training.datasets.prepared import DataError
from training.fit import predict_heads
from training.join import attribution
from training.join.attribution import Attribution
from training.join.delay import Delay, fit_delay
from training.networks.contract import cross_entropy
from training.offpolicy.revenue import PAID
from training.scoring import score_rows
from training.train import train
from training.train_settings import TrainSettings

DAY = 86_400.0
WINDOW = 7 * DAY
HOUR = 3600.0
SETTINGS = Attribution(60.0, conversion_window=7 * HOUR)
SCHEMA = 'name = "bought"\n[user.age]\nkind = "category"\n[ad.ad_id]\nkind = "category"'
HEADS = ("click", "conversion")


@pytest.mark.parametrize("mean", [0.5 * DAY, 2 * DAY, 20 * DAY])
def test_the_delay_is_fitted_to_those_that_could_be_seen(mean: float) -> None:
    random = np.random.default_rng(1)
    waited = random.uniform(0, 9 * DAY, 40_000)
    took = -mean * np.log1p(random.random(40_000) * math.expm1(-WINDOW / mean))  # an exponential, cut off at the window
    came = took < waited
    found = fit_delay(took[came], waited[came], WINDOW)
    assert found.rate * WINDOW == pytest.approx(WINDOW / mean, rel=0.04, abs=0.06)
    shares = pl.DataFrame({"waited": waited}).select(found.share(pl.col("waited"))).to_series().to_numpy()
    assert came.sum() == pytest.approx(shares.sum(), rel=0.01)
    assert shares[waited > WINDOW].min() == 1


def test_the_share_of_a_delay_by_hand() -> None:
    waited = pl.DataFrame({"e": [0.0, 10.0, 50.0, 100.0, 1e9]})
    shares = waited.select(Delay(100.0, 0.02).share(pl.col("e"))).to_series().to_list()
    whole = 1 - math.exp(-2)
    assert shares == pytest.approx([0.02e-3 / whole, (1 - math.exp(-0.2)) / whole, (1 - math.exp(-1)) / whole, 1, 1], rel=1e-3)
    assert waited.select(fit_delay(np.zeros(0), np.zeros(0), 100.0).share(pl.col("e"))).to_series().to_list() == [1.0]


def test_a_row_that_may_still_convert_is_no_whole_negative() -> None:
    logits = torch.tensor([0.4, -1.0, 2.0, 60.0, -60.0], requires_grad=True)
    labels, maturity = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0]), torch.tensor([0.25, 1.0, 0.5, 0.5, 0.5])
    p = expit([0.4, -1.0, 2.0])
    by_hand = [-math.log(1 - 0.25 * p[0]), -math.log(1 - p[1]), -math.log(p[2]), math.log(2), 0.0]
    loss = cross_entropy(logits, labels, None, maturity)
    assert loss.item() == pytest.approx(sum(by_hand) / 5, abs=1e-6)  # of logits of 60 in float32
    loss.backward()
    slopes = [0.25 * p[0] * (1 - p[0]) / (1 - 0.25 * p[0]), p[1], p[2] - 1, 0, 0]
    assert (5 * logits.grad).tolist() == pytest.approx(slopes, abs=1e-6)
    plain = cross_entropy(logits, labels, torch.ones(5))
    assert cross_entropy(logits, labels, None, torch.ones(5)).item() == pytest.approx(plain.item())


def test_a_calibration_of_young_rows_is_that_of_old_ones() -> None:
    random = np.random.default_rng(3)
    logits = random.normal(-1, 1.5, 60_000)
    maturity = random.uniform(0.05, 1, 60_000)
    converted = random.random(60_000) < expit(0.7 * logits - 0.5)
    seen = (converted & (random.random(60_000) < maturity)).astype(np.float64)
    found = fit(logits, seen, maturity=maturity)
    assert (found.scale, found.shift) == pytest.approx((0.7, -0.5), abs=0.04)
    assert (maturity * found.on_log(logits)).sum() == pytest.approx(seen.sum())
    assert fit(logits, seen).on_log(logits).mean() < 0.6 * converted.mean()  # what it would be without


@pytest.mark.parametrize("labels", [[0, 0, 0], [1, 1, 1], [1, 0, 1]])
def test_a_calibration_of_rows_that_convert_more_than_they_can(labels: list[float]) -> None:
    found = fit(np.array([-1.0, 0.0, 2.0]), np.array(labels, np.float64), maturity=np.full(3, 0.01))
    assert np.isfinite(found.on_log(np.array([-1.0, 0.0, 2.0]))).all()


def log_of(folder, hours: int, rate: float, seed: int = 5):
    """Rankings of two ads each half a minute; a1 is clicked by half and converts within hours."""
    random, made, events = np.random.default_rng(seed), [], []
    for i in range(hours * 120):
        ts = joining.T0 + i * 30.0
        made.append(joining.ranking(f"r{i}", ts, ("a1", "a2"), user_id=f"u{i % 7}", history=[]))
        if random.random() < 0.6:
            events.append(joining.click(f"r{i}", ts=ts + 5, user_id=f"u{i % 7}"))
            if random.random() < 0.5 and (took := random.exponential(1 / rate)) < 7 * HOUR:
                events.append(joining.conversion(f"r{i}", ts=ts + took, user_id=f"u{i % 7}"))
    end = joining.T0 + hours * HOUR
    joining.write_raw(folder, parse_schema(SCHEMA), made, sorted((e for e in events if e.ts < end), key=lambda e: e.ts), end)
    (folder / attribution.SETTINGS).write_bytes(attribution.settings_text(SETTINGS))
    return folder


def test_attribution_says_what_would_have_come_by_now(tmp_path) -> None:
    folder = log_of(tmp_path / "log", 5, 1 / HOUR)
    frame = pl.concat(open_log(folder).between(0, 1e12, ["conversion", "conversion_maturity"]))
    ages = joining.T0 + 5 * HOUR - frame["ts"].to_numpy()
    rates = np.log(1 - frame["conversion_maturity"].to_numpy() * -math.expm1(-7)) / -ages  # were it a day
    assert 0.7 / HOUR < np.median(rates) < 1.4 / HOUR
    assert np.all(np.diff(frame["conversion_maturity"].to_numpy()[np.argsort(ages, kind="stable")]) >= -1e-12)
    (closed,) = open_log(folder, settings=Attribution(60.0, conversion_window=120.0)).between(0, 1e12, ["conversion_maturity"])
    assert closed["conversion_maturity"].unique().to_list() == [1.0]  # no row is younger than its window of clicks


def test_a_head_is_trained_on_a_log_whose_windows_are_open(traced_export, tmp_path) -> None:
    folder = log_of(tmp_path / "log", 5, 1 / (2 * HOUR))
    options = ("--log", folder, "--model", "esmm", "--models", tmp_path / "models", "--epochs", 2, "--set", "threads=1", "--no-report")
    code, out, err = run("train", *options, "--set", "batch=64", "--set", "hidden=8-4", "--set", "learning_rate=0.01")
    assert code == 0, (out, err)
    assert "conversions in " in out
    assert "rows may still get theirs" in err
    settings, means = TrainSettings(epochs=2, batch=64, threads=1, learning_rate=0.01, delayed=False), []
    bundle = next((tmp_path / "models" / "esmm").glob("2*"))
    data, progress = open_log(folder), small.quiet()
    means.append(score_rows(load_bundle(bundle), data, "valid", progress)["p_conversion"].mean())
    without = train(data, "esmm", small.NETWORK_SETTINGS["esmm"], settings, progress)
    logits = predict_heads(without.network, encode_split(data, "valid", without.encoder, HEADS))["conversion"]
    means.append(without.calibrations["conversion"].on_log(logits).mean())
    assert means[0] == pytest.approx(0.5 * 0.6 * 0.5 * -math.expm1(-3.5), rel=0.4)
    assert means[0] > 1.4 * means[1]


def test_a_maturity_that_is_none_is_a_sentence(tmp_path) -> None:
    data = small.data_set(tmp_path, (30, 30, 30))
    path = tmp_path / "train" / "0.parquet"
    frame = pl.read_parquet(path).with_columns(conversion=pl.col("label"), conversion_maturity=0.5)
    frame.write_parquet(path)
    rows = encode_split(data, "train", small.encoder(), HEADS)
    assert rows.labels_of(np.array([3, 1])).maturity["conversion"].tolist() == [0.5, 0.5]
    assert rows.take(np.array([3])).maturity["conversion"].tolist() == [0.5]
    assert encode_split(data, "train", small.encoder(), HEADS, delayed=False).maturity == {}
    for wrong in (0.0, 1.5, math.nan):
        frame.with_columns(conversion_maturity=wrong).write_parquet(path)
        with pytest.raises(DataError, match="conversion_maturity must hold numbers above 0, at most 1"):
            encode_split(data, "train", small.encoder(), HEADS)


def test_a_conversion_of_a_young_row_is_paid_for_as_many_as_it_stands_for() -> None:
    rows = {"bid_type": ["cpa", "cpa", "cpa", "cpc"], "bid": [2_000_000] * 4, "price": [None, None, 1_000_000, None], "label": [1] * 4}
    rows |= {"conversion": [1, 0, 1, 1], "conversion_maturity": [0.5, 0.5, None, 0.5], "bidding": [True] * 4}
    assert pl.DataFrame(rows).select(PAID)["paid"].to_list() == [4.0, 0.0, 1.0, 2.0]
