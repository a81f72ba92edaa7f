import numpy as np
import pytest

from training.calibrate import Calibration, fit


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


def test_to_log_undoes_the_correction() -> None:
    logits = np.linspace(-12, 12, 99)
    calibration = Calibration(0.7, 0.3, np.log(0.05))
    exported = sigmoid(0.7 * logits + 0.3 + np.log(0.05))
    assert np.allclose(calibration.to_log(exported), calibration.on_log(logits), rtol=1e-6)
    assert np.allclose(Calibration().to_log(exported), exported, rtol=1e-12)
    assert calibration.to_log(np.array([0.0, 1.0], np.float32)) == pytest.approx([0.0, 1.0])


@pytest.mark.parametrize("labels", [np.zeros(5), np.ones(5)])
def test_one_class_only_leaves_the_logits_alone(labels: np.ndarray) -> None:
    assert fit(np.arange(5.0), labels, 0.5) == Calibration(1.0, 0.0, np.log(0.5))


def test_a_reversed_fit_leaves_the_logits_alone() -> None:
    assert fit(np.array([3.0, 2.0, 1.0, 0.0]), np.array([0, 0, 1, 1])) == Calibration()
