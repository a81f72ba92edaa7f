import dataclasses
import json
import math
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sklearn
from sklearn.calibration import calibration_curve

from tests.test_datasets import patient
from training.datasets.prepared import DataError
from training.evaluate import auc, calibration_error, gauc, log_loss, measure
from training.retrain.compare import points

# Few distinct probabilities, so that ties are common.
rows = st.lists(st.tuples(st.integers(0, 1), st.sampled_from([0.0, 0.1, 0.2, 0.5, 0.9, 1.0]), st.integers(0, 3)), min_size=1, max_size=40)
Rows = list[tuple[int, float, int]]


def arrays(table: Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    labels, p, users = zip(*table, strict=True)
    return np.array(labels, np.float32), np.array(p), np.array(users, np.uint32)


def naive_auc(table: Rows) -> float:
    """The share of pairs of a click and a non-click that are in order, ties counted half; None where there is no pair."""
    pairs = [(a, b) for label, a, _ in table if label for other, b, _ in table if not other]
    return sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs) if pairs else math.nan


@patient
@given(rows)
def test_auc_is_the_share_of_pairs_in_order(table: Rows) -> None:
    labels, p, _ = arrays(table)
    assert auc(labels, p) == pytest.approx(naive_auc(table), nan_ok=True)
    if 0 < labels.sum() < len(labels):
        assert auc(labels, p) == pytest.approx(sklearn.roc_auc_score(labels, p))


@patient
@given(rows)
def test_gauc_weighs_users_by_their_rows_and_leaves_out_those_of_one_class(table: Rows) -> None:
    labels, p, users = arrays(table)
    of_users = [[row for row in table if row[2] == user] for user in set(users.tolist())]
    both = [(naive_auc(part), len(part)) for part in of_users if len({label for label, _, _ in part}) == 2]
    expected = sum(area * weight for area, weight in both) / sum(weight for _, weight in both) if both else math.nan
    assert gauc(labels, p, users) == pytest.approx(expected, nan_ok=True)
    order = np.random.default_rng(0).permutation(len(table))
    assert gauc(labels[order], p[order], users[order]) == pytest.approx(expected, nan_ok=True)


@patient
@given(rows)
def test_log_loss_is_scikit_learn_s(table: Rows) -> None:
    labels, p, _ = arrays(table)
    inside = np.clip(p, 0.01, 0.99)
    assert log_loss(labels, inside) == pytest.approx(sklearn.log_loss(labels, inside, labels=[0, 1]))


def test_a_certainty_that_is_wrong_is_dear_but_finite() -> None:
    assert log_loss(np.array([1, 0]), np.array([0.0, 1.0])) == pytest.approx(-math.log(1e-12), rel=1e-4)
    assert log_loss(np.array([0, 1]), np.array([0.0, 1.0])) == pytest.approx(0.0, abs=1e-11)


def test_normalised_entropy_is_against_the_constant() -> None:
    labels, users = np.array([1, 0, 0, 0], np.float32), np.zeros(4, np.int64)
    assert measure(labels, np.full(4, 0.25), users).normalised_entropy == pytest.approx(1.0)
    p = np.array([0.5, 0.25, 0.25, 0.25])
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    loss = -(math.log(0.5) + 3 * math.log(0.75)) / 4
    assert measure(labels, p, users).normalised_entropy == pytest.approx(loss / entropy)


def test_calibration_error_by_hand() -> None:
    # 40 rows make 20 bins of two, in the order of p: 19 bins are right (rate 0.5, mean 0.5), the last says 0.9 and has no click.
    labels = np.array([0, 1] * 19 + [0, 0], np.float32)
    p = np.array([0.5] * 38 + [0.9, 0.9])
    assert calibration_error(labels, p) == pytest.approx(0.9 / 20)
    order = np.random.default_rng(0).permutation(40)
    by_p = np.linspace(0.01, 0.8, 40)
    assert calibration_error(np.zeros(40)[order], by_p[order]) == pytest.approx(by_p.mean())
    assert calibration_error(np.array([1.0]), np.array([0.25])) == pytest.approx(0.75)


def naive_calibration_error(table: Rows) -> float:
    """20 bins of equally many rows by p, in plain Python; a row whose p another bin began with joins that bin."""
    ordered = sorted(p for _, p, _ in table)
    firsts = sorted({ordered[i * len(ordered) // 20] for i in range(20)})
    bins: dict[float, list[tuple[int, float]]] = {}
    for label, p, _ in table:
        bins.setdefault(max(first for first in firsts if first <= p), []).append((label, p))
    return sum(abs(sum(label - p for label, p in part)) for part in bins.values()) / len(table)


@patient
@given(rows, st.randoms(use_true_random=False))
def test_no_metric_depends_on_the_order_of_the_rows(table: Rows, random: Random) -> None:
    found = dataclasses.astuple(measure(*arrays(table)))
    assert calibration_error(*arrays(table)[:2]) == pytest.approx(naive_calibration_error(table))
    bins = points(*arrays(table)[:2])
    random.shuffle(table)
    assert dataclasses.astuple(measure(*arrays(table))) == pytest.approx(found, nan_ok=True)
    assert points(*arrays(table)[:2]) == [pytest.approx(point) for point in bins]


def test_one_score_for_all_rows_is_calibrated_where_it_is_their_click_rate() -> None:
    labels, p = np.repeat([1.0, 0.0], [25, 75]), np.full(100, 0.25)
    assert calibration_error(labels, p) == pytest.approx(0.0)
    assert calibration_error(labels, p.astype(np.float32)) == pytest.approx(0.0)
    assert points(labels, p) == [(0.25, 0.25)]
    two = np.repeat([0.2, 0.3], [60, 40])
    clicks = np.concatenate([np.repeat([1.0, 0.0], [12, 48]), np.repeat([1.0, 0.0], [12, 28])])
    assert calibration_error(clicks, two) == pytest.approx(0.0)
    assert np.array(points(clicks, two)) == pytest.approx(np.array([(0.2, 0.2), (0.3, 0.3)]))


def test_bins_of_distinct_scores_have_equally_many_rows_and_are_scikit_learn_s() -> None:
    random = np.random.default_rng(2)
    p = random.permutation(np.linspace(0.01, 0.6, 400))
    labels = (random.random(400) < p).astype(np.float32)
    rates, means = calibration_curve(labels, p, n_bins=20, strategy="quantile")
    assert np.array(points(labels, p)) == pytest.approx(np.stack([means, rates], 1))
    assert calibration_error(labels, p) == pytest.approx(np.abs(means - rates).mean())


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_a_certainty_in_32_bits_is_finite_too(kind: type) -> None:
    sure = np.array([1.0, 0.0], kind)
    assert log_loss(np.array([0, 1]), sure) == pytest.approx(-math.log(1e-12), rel=1e-4)
    assert log_loss(np.array([1, 0]), sure) == pytest.approx(0.0, abs=1e-11)


def test_all_metrics_at_once() -> None:
    labels, p, users = arrays([(1, 0.8, 0), (0, 0.6, 0), (0, 0.1, 1), (1, 0.5, 1)])
    found = measure(labels, p, users)
    assert (found.auc, found.gauc, found.rows, found.clicks) == (0.75, 1.0, 4, 2)
    assert found.log_loss == pytest.approx(-(math.log(0.8) + math.log(0.4) + math.log(0.9) + math.log(0.5)) / 4)
    assert found.calibration_ratio == pytest.approx(1.0)


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_only_has_no_auc_and_that_is_null_in_json(label: int) -> None:
    found = measure(np.full(3, label, np.float32), np.array([0.2, 0.3, 0.4]), np.arange(3))
    document = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert (document["auc"], document["gauc"], document["normalised_entropy"]) == (None, None, None)
    assert document["log_loss"] > 0
    assert (document["calibration_ratio"] is None) == (label == 0)


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="no row to measure"):
        measure(np.array([]), np.array([]), np.array([]))
    with pytest.raises(DataError, match="no number for 1 of 2 rows, the first of them row 2"):
        measure(np.array([1.0, 0.0]), np.array([0.5, np.nan]), np.array([0, 0]))
