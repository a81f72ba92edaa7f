"""Logits to probabilities: Platt scaling fitted on valid, and the correction of negative down-sampling. Both end in the graph."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class Calibration:
    """p(click) = sigmoid(scale · logit + shift + sampling)."""

    scale: float = 1.0
    shift: float = 0.0
    sampling: float = 0.0
    """log of the share of non-clicks that the log kept. 0 where it kept all."""

    def on_log(self, logits: Array) -> Array:
        """Probabilities `(N,)` for the log as it was sampled, to be compared with its labels."""
        p: Array = 1.0 / (1.0 + np.exp(-(self.scale * logits.astype(np.float64) + self.shift)))
        return p

    def to_log(self, p_click: Array) -> Array:
        """What `on_log` would have given, from the probabilities of the exported graph."""
        p = np.minimum(p_click.astype(np.float64), 1.0 - 1e-9)
        odds = p / (1.0 - p) * math.exp(-self.sampling)
        share: Array = odds / (1.0 + odds)
        return share


def fit(logits: Array, labels: Array, negative_sampling: float = 1.0) -> Calibration:
    """Platt (1999) scaling by maximum likelihood; a log without both classes, or a reversed fit, leaves the logits alone.

    Keeping a share w of the non-clicks multiplies the odds of a click by 1 / w, hence log w is added to the logit
    (He et al. 2014, section 6.3).
    """
    sampling = math.log(negative_sampling)
    if len(np.unique(labels)) < 2:
        return Calibration(sampling=sampling)
    model = LogisticRegression(C=np.inf).fit(logits.astype(np.float64)[:, None], labels)
    scale, shift = float(model.coef_[0, 0]), float(model.intercept_[0])
    return Calibration(scale, shift, sampling) if scale > 0 else Calibration(sampling=sampling)
