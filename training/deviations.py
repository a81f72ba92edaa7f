"""How far each ad's logit may be off for want of impressions: what Thompson sampling explores by.

The posterior of an ad's own intercept, all else given, in the Laplace approximation with a diagonal precision: 1 / τ² from the prior, and
p (1 - p) from each impression. τ² is how much ads differ, by the moments of DerSimonian and Laird 1986, "Meta-analysis in clinical trials".
"""

import io

import numpy as np

from features.encode import Encoder
from features.policy import Array
from features.schema import IDENTITY

from .datasets.encoded import Rows

AT_ONCE = 1_000_000
LEAST = 0.1
"""Of τ: nobody knows that all ads are alike."""


def deviations(shown: Array, clicks: Array) -> Array:
    """Deviations of logits `(A,)` of ads that were shown so often and had so many clicks `(A,)`, those that never were included."""
    rate = (clicks.sum() + 0.5) / (shown.sum() + 1)
    weight = shown[shown > 0] * rate * (1 - rate)  # what impressions tell of an ad's log-odds, were it as all others are
    off = (clicks[shown > 0] - shown[shown > 0] * rate) / weight
    freedom = weight.sum() - (weight**2).sum() / weight.sum() if len(weight) else 0.0
    between = ((weight * off**2).sum() - (len(weight) - 1)) / freedom if freedom > 0 else 0.0
    prior = max(between, LEAST**2)
    pseudo = 1 / (prior * rate * (1 - rate))
    p = (clicks + pseudo * rate) / (shown + pseudo)
    found: Array = (1 / np.sqrt(1 / prior + shown * p * (1 - p))).astype(np.float32)
    return found


def ad_deviations(rows: Rows, encoder: Encoder) -> Array | None:
    """Deviations by the id of an ad `(V,)`, from the rows of train; None where the schema does not tell ads by their ids."""
    slot = next((slot for slot in encoder.layouts["ad"].ids if slot.field.name == IDENTITY["ad"]), None)
    if slot is None:
        return None
    shown, clicks = np.zeros((2, encoder.vocabularies.categories[slot.field.vocabulary].size))
    for start in range(0, len(rows), AT_ONCE):
        ids, labels = rows.ad.ids[start : start + AT_ONCE, slot.start], rows.labels[start : start + AT_ONCE]
        np.add.at(shown, ids, 1)
        np.add.at(clicks, ids, labels)
    shown[:2] = clicks[:2] = 0  # an ad without an id of its own is a new one, however many of those there were
    return deviations(shown, clicks)


def npy(numbers: Array) -> bytes:
    """The file of a bundle that holds some numbers."""
    np.save(file := io.BytesIO(), numbers, allow_pickle=False)
    return file.getvalue()
