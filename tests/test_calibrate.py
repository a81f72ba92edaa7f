import math

import numpy as np
import pytest
from scipy.optimize import brentq
from sklearn.linear_model import LogisticRegression

from training.calibrate import PRIOR, SPAN, fit
from training.evaluate import log_loss


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def test_a_known_scale_and_shift_are_found_again() -> None:
    random = np.random.default_rng(0)
    logits = random.normal(0, 2, 200_000).astype(np.float32)
    labels = (random.random(len(logits)) < sigmoid(0.6 * logits - 1.2)).astype(np.float32)
    found = fit(logits, labels)
    assert (found.scale, found.shift) == (pytest.approx(0.6, abs=0.02), pytest.approx(-1.2, abs=0.02))
    assert found.sampling == 0.0
    assert found.on_log(logits).mean() == pytest.approx(labels.mean(), abs=1e-4)


def test_a_log_that_kept_a_tenth_of_the_non_clicks_gives_the_true_rate() -> None:
    random = np.random.default_rng(1)
    truth = random.normal(-3, 1, 400_000)
    clicks = random.random(len(truth)) < sigmoid(truth)
    kept = clicks | (random.random(len(truth)) < 0.1)
    found = fit(truth[kept], clicks[kept].astype(np.float32), negative_sampling=0.1)
    # What the log says, ten times the odds, and what the exported graph says.
    assert found.on_log(truth[kept]).mean() == pytest.approx(clicks[kept].mean(), abs=1e-4)
    exported = sigmoid(found.scale * truth + found.shift + found.sampling)
    assert clicks.mean() < 0.08
    assert clicks[kept].mean() > 0.3
    assert exported.mean() == pytest.approx(clicks.mean(), rel=0.02)
    assert np.abs(exported - sigmoid(truth)).mean() < 0.002


@pytest.mark.parametrize(("n", "clicks"), [(1000, 1), (1000, 3), (200, 2)])
def test_a_few_clicks_that_are_told_apart_make_no_certainties(n: int, clicks: int) -> None:
    logits = np.sort(np.random.default_rng(0).normal(-3, 1, n))
    labels = np.zeros(n)
    labels[-clicks:] = 1
    found = fit(logits, labels)
    p = found.on_log(logits)
    assert LogisticRegression(C=np.inf).fit(logits[:, None], labels).coef_[0, 0] > 5  # what there is no end to without a prior
    assert 0 < found.scale < 3.5
    assert p.sum() == pytest.approx(clicks)
    assert 1e-9 < p.min() < np.median(p) < p.max() < 0.5
    assert (found.rows, found.clicks) == (n, clicks)
    assert found.line().startswith(f"calibrated on {clicks} clicks in {n:,} rows of valid: slope ")
    assert "so few leave the mean p(click) uncertain by about" in found.line()


@pytest.mark.parametrize("apart", [30.0, 3000.0])
def test_two_clicks_that_lie_hundreds_of_logits_apart_are_not_certain(apart: float) -> None:
    logits = np.r_[np.random.default_rng(1).normal(-apart, 1, 298), apart, apart]
    labels = np.r_[np.zeros(298), 1, 1]
    p = fit(logits, labels).on_log(logits)
    assert p.sum() == pytest.approx(2)
    assert 1e-4 < p.min() < p.max() < 0.9


@pytest.mark.parametrize(("clicks", "slope"), [(5, 1.0), (5, 0.5), (50, 1.5), (500, 0.3)])
def test_calibrated_log_loss_on_other_rows_is_not_worse(clicks: int, slope: float) -> None:
    """A network whose logits are off by a slope and by 1, on the average of 60 draws."""
    random, worse = np.random.default_rng(clicks), []
    for _ in range(60):
        logits = random.normal(-3, 1, 3000)
        truth = sigmoid(slope * (logits + 3) + math.log(clicks / 1000))
        labels = (random.random(3000) < truth).astype(float)
        if labels[:1000].sum():
            p = fit(logits[:1000] + 1, labels[:1000]).on_log(logits[1000:] + 1)
            worse.append(log_loss(labels[1000:], p) - log_loss(labels[1000:], sigmoid(logits[1000:] + 1)))
    assert np.mean(worse) < 0


def test_with_many_clicks_it_is_the_likeliest_line() -> None:
    random = np.random.default_rng(2)
    logits = random.normal(-2, 1.5, 60_000).astype(np.float32)
    labels = (random.random(len(logits)) < sigmoid(1.4 * logits + 0.5)).astype(np.float32)
    found, model = fit(logits, labels), LogisticRegression(C=np.inf, tol=1e-10).fit(logits[:, None].astype(np.float64), labels)
    assert (found.scale, found.shift) == (pytest.approx(model.coef_[0, 0], rel=0.002), pytest.approx(model.intercept_[0], abs=0.01))
    assert "uncertain" not in found.line()


def test_the_slope_is_the_mode_under_its_prior() -> None:
    """Beside one that is looked for among many slopes, each with the intercept that suits it best."""
    random = np.random.default_rng(3)
    logits = random.normal(-1, 1, 300)
    labels = (random.random(300) < sigmoid(2.5 * logits)).astype(float)
    clicks, expected = labels.sum(), min(0.0, math.log(SPAN / np.ptp(logits)))
    targets = np.where(labels > 0, (clicks + 1) / (clicks + 2), 1 / (302 - clicks))

    def posterior(slope: float) -> float:
        shift = brentq(lambda b: sigmoid(slope * logits + b).sum() - targets.sum(), -20, 20)
        p = sigmoid(slope * logits + shift)
        return -(targets * np.log(p) + (1 - targets) * np.log1p(-p)).sum() + 0.5 * ((math.log(slope) - expected) / PRIOR) ** 2

    slopes = np.geomspace(0.5, 4, 2001)
    assert fit(logits, labels).scale == pytest.approx(slopes[np.argmin([posterior(s) for s in slopes])], rel=0.002)


@pytest.mark.parametrize(("labels", "mean"), [(np.zeros(8), 1 / 10), (np.ones(8), 9 / 10)])
def test_one_class_only_gives_platts_target_for_a_mean(labels: np.ndarray, mean: float) -> None:
    logits = np.linspace(-9.0, 0.0, 8)
    found = fit(logits, labels, 0.5)
    assert (found.scale, found.sampling) == (1.0, math.log(0.5))
    assert found.on_log(logits).mean() == pytest.approx(mean)


@pytest.mark.parametrize("spread", [1.0, 3000.0, 0.0])
def test_the_mean_is_right_and_the_order_stays_whatever_the_logits_are(spread: float) -> None:
    """Reversed logits, those of a training that diverged, and those of one that learned nothing."""
    random = np.random.default_rng(4)
    logits = random.normal(0, 1, 5000)
    labels = (random.random(5000) < sigmoid(-logits - 2)).astype(float)
    found = fit(logits * spread, labels)
    assert np.isfinite(fit(np.r_[3e38, -3e38, logits], np.r_[0, 0, labels]).shift)  # near what 32 bits hold
    p = found.on_log(logits * spread)
    assert found.scale > 0
    assert p.sum() == pytest.approx(labels.sum())
    assert log_loss(labels, p) < 1.05 * log_loss(labels, np.full(5000, labels.mean()))
