import json
import re
from dataclasses import replace
from math import log
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sklearn

from training.evaluate import Measures, measure
from training.export.int8 import moved, refusal
from training.retrain.compare import METRICS, Comparison, Gate, Interval, _Resampled, bootstrap, compare, violations
from training.retrain.report import metric_rows
from training.train_settings import TrainError

N, USERS = 600, 60


def rows(seed: int = 0, users: int = USERS) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Labels, users and true probabilities, which users share in part; with ties."""
    random = np.random.default_rng(seed)
    user = random.integers(0, users, N)
    p = np.round(1 / (1 + np.exp(-(random.normal(0, 0.7, users)[user] + random.normal(-1, 1, N)))), 2).clip(0.01, 0.99)
    return (random.random(N) < p).astype(np.float32), user, p


def worse(p: np.ndarray[Any, Any], seed: int = 1) -> np.ndarray[Any, Any]:
    """The probabilities with noise on their logits."""
    noisy: np.ndarray[Any, Any] = 1 / (1 + np.exp(-(np.log(p / (1 - p)) + np.random.default_rng(seed).normal(0, 1.5, len(p)))))
    return noisy


def test_without_a_resample_the_metrics_are_those_of_every_other_place() -> None:
    labels, users, p = rows()
    found = compare(labels, users, p, worse(p))
    ours, theirs = measure(labels, p, users), measure(labels, worse(p), users)
    assert (found.challenger, found.champion) == (ours, theirs)
    for name in METRICS[:-1]:
        assert found.differences[name].value == pytest.approx(getattr(ours, name) - getattr(theirs, name), abs=1e-8), (
            name
        )  # labels are float32
    distance = abs(log(ours.calibration_ratio)) - abs(log(theirs.calibration_ratio))
    assert found.differences["calibration_distance"].value == pytest.approx(distance)
    assert found.calibration.value == pytest.approx(log(ours.calibration_ratio))


def test_a_weight_counts_a_users_rows_so_many_times() -> None:
    labels, users, p = rows()
    weights = np.random.default_rng(3).integers(0, 3, USERS)
    times = weights[users]
    # Copies of a user are users of their own to GAUC, which comes to the same: each has the same AUC and as many rows.
    repeated = measure(np.repeat(labels, times), np.repeat(p, times), np.repeat(users, times))
    found = dict(zip(METRICS, _Resampled(labels, users, p)(weights), strict=False))
    for name in ("auc", "gauc", "log_loss", "normalised_entropy"):
        assert found[name] == pytest.approx(getattr(repeated, name), abs=1e-12), name
    assert found["calibration_distance"] == pytest.approx(abs(log(repeated.calibration_ratio)))


def test_weighted_metrics_are_scikit_learns() -> None:
    labels, users, p = rows()
    weights = np.random.default_rng(4).integers(0, 4, USERS)
    each = weights[users]
    found = dict(zip(METRICS, _Resampled(labels, users, p)(weights), strict=False))
    assert found["auc"] == pytest.approx(sklearn.roc_auc_score(labels, p, sample_weight=each))
    assert found["log_loss"] == pytest.approx(sklearn.log_loss(labels, p, sample_weight=each))
    firsts = np.unique(np.sort(p)[np.arange(20) * N // 20])
    gaps = np.bincount(np.searchsorted(firsts, p, "right"), each * (labels - p))
    assert found["calibration_error"] == pytest.approx(np.abs(gaps).sum() / each.sum())


def test_a_comparison_does_not_depend_on_the_order_of_the_rows() -> None:
    labels, users, p = rows()
    order = np.random.default_rng(5).permutation(N)
    one, other = (compare(labels[some], users[some], p[some], np.full(N, 0.3)).as_dict() for some in (np.arange(N), order))
    for name in METRICS:
        assert one["differences"][name] == pytest.approx(other["differences"][name], abs=1e-12, nan_ok=True), name
    assert one["reliability"]["champion"] == [pytest.approx((0.3, labels.mean()))]
    assert one["reliability"]["challenger"] == [pytest.approx(point) for point in other["reliability"]["challenger"]]


def test_certainties_and_one_class_are_compared_and_refused_without_a_trace() -> None:
    users = np.arange(40)
    for labels in (np.zeros(40), np.ones(40), np.repeat([0.0, 1.0], 20)):
        for p in (np.zeros(40), np.ones(40), np.repeat([0.0, 1.0], 20), np.repeat([1.0, 0.0], 20)):
            found = compare(labels, users, p, np.full(40, 0.5))
            assert metric_rows(found)
            json.dumps(found.as_dict(), allow_nan=False)
            assert bool(violations(found, Gate())) == (not np.array_equal(labels, p) or not labels.any())
            moves = moved(found.challenger, found.challenger)
            assert (refusal(moves) is None) == (0 < labels.mean() < 1 and p.any())


def test_intervals_are_scipys() -> None:
    values = np.random.default_rng(0).exponential(size=200)
    [ours] = bootstrap(lambda weights: np.array([weights @ values / weights.sum()]), 200, resamples=4000)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=4000, method="percentile", rng=5).confidence_interval
    assert ours.value == pytest.approx(values.mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)  # of a width of 0.27


def test_intervals_of_a_mean_are_those_of_the_normal_distribution() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, 1000)
    [found] = bootstrap(lambda weights: np.array([weights @ values / weights.sum()]), 1000, resamples=4000)
    half = 1.96 * values.std() / 1000**0.5
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.012)


def test_rows_of_one_user_are_drawn_together() -> None:
    labels, users, p = rows()
    alone, copied = compare(labels, users, p, worse(p)), compare(*(np.tile(each, 4) for each in (labels, users, p, worse(p))))
    # Four copies of each row tell nothing new: drawn row by row, the interval would be half as wide.
    for name in METRICS[:4]:
        widths = [each.differences[name].high - each.differences[name].low for each in (alone, copied)]
        assert widths[1] == pytest.approx(widths[0], rel=0.02), name
    by_row = compare(np.tile(labels, 4), np.arange(4 * N), np.tile(p, 4), np.tile(worse(p), 4)).differences["log_loss"]
    assert by_row.high - by_row.low < 0.7 * (alone.differences["log_loss"].high - alone.differences["log_loss"].low)


def test_intervals_hold_what_they_promise() -> None:
    """Of two models that are equally good, the interval of the difference has 0 in it in about 95 of 100 logs."""
    covered = 0
    for seed in range(20):
        labels, users, p = rows(seed)
        covered += compare(labels, users, worse(p, seed), worse(p, seed + 1000)).differences["log_loss"].covers(0)
    assert covered >= 16  # binomial: 16 or more of 20 at 95 % happens in 997 of 1,000


METRICS_OF = Measures(0.7, 0.6, 0.5, 0.9, 0.01, 1.0, 1000, 200)


def found(
    loss: tuple[float, float, float] = (-0.01, -0.02, -0.001), calibration: tuple[float, float, float] = (0.0, -0.01, 0.01)
) -> Comparison:
    differences = dict.fromkeys(METRICS, Interval(0.0, -1.0, 1.0))
    differences |= {"log_loss": Interval(*loss), "calibration_distance": Interval(*calibration)}
    return Comparison(METRICS_OF, METRICS_OF, differences, Interval(0.0, -0.1, 0.1), {}, 50)


def test_a_better_challenger_passes() -> None:
    assert violations(found(), Gate()) == []


@pytest.mark.parametrize(
    ("loss", "gate", "passes"),
    [
        ((-0.01, -0.02, -0.0001), "better", True),
        ((-0.01, -0.02, 0.0), "better", False),
        ((-0.01, -0.02, 0.0004), "better", False),
        ((0.0, -0.001, 0.0004), "not-worse", True),  # 0.001 of 0.5 is 0.0005
        ((0.0, -0.001, 0.0006), "not-worse", False),
        ((float("nan"),) * 3, "not-worse", False),
    ],
)
def test_log_loss_has_to_be_better_or_not_worse(loss: tuple[float, float, float], gate: str, passes: bool) -> None:
    reasons = violations(found(loss), Gate(gate))
    assert (reasons == []) == passes
    assert all("log loss 0.50000 against the champion's 0.50000, difference" in reason for reason in reasons)


@pytest.mark.parametrize(
    ("calibration", "passes"),
    [
        ((0.009, 0.008, 0.0095), True),  # within the tolerance of 0.01
        ((0.03, -0.001, 0.06), True),  # noise
        ((0.03, 0.001, 0.06), False),
        ((-0.2, -0.3, -0.1), True),
        ((float("nan"),) * 3, False),
    ],
)
def test_calibration_must_not_be_worse(calibration: tuple[float, float, float], passes: bool) -> None:
    reasons = violations(found(calibration=calibration), Gate())
    assert (reasons == []) == passes
    assert all(reason.startswith("calibration is worse: p(click) over clicks is 1.0000, the champion's 1.0000") for reason in reasons)


@pytest.mark.parametrize(
    ("entropy", "calibration", "message"),
    [
        (0.99, (0.09, 0.08, 0.1), ""),
        (0.99, (0.2, -0.1, 0.5), ""),
        (1.0, (0.0, -0.1, 0.1), "no better than the click rate alone: normalised entropy is 1.0000"),
        (0.99, (0.2, 0.1, 0.3), r"calibration is off: .* \+0.2000 \(95 % interval \+0.1000 to \+0.3000\)"),
    ],
)
def test_a_first_version_must_be_sane(entropy: float, calibration: tuple[float, float, float], message: str) -> None:
    first = Comparison(replace(METRICS_OF, normalised_entropy=entropy), None, {}, Interval(*calibration), {}, 50)
    reasons = violations(first, Gate())
    assert len(reasons) == bool(message)
    for reason in reasons:
        assert re.search(message, reason)


@pytest.mark.parametrize(("setting", "value"), [("gate", "best"), ("log_loss_tolerance", -1.0), ("calibration_tolerance", float("nan"))])
def test_an_impossible_gate_is_a_sentence(setting: str, value: Any) -> None:
    with pytest.raises(TrainError, match=f"{setting} is {value!r}; it must be"):
        Gate(**{setting: value})
