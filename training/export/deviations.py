"""How far each ad's logit may be off for want of impressions: what Thompson sampling explores by.

The posterior of an ad's own intercept, all else given, in the Laplace approximation with a diagonal precision: 1 / τ² from the prior, and
p (1 - p) from each impression. τ² is how much ads differ, by the moments of DerSimonian and Laird 1986, "Meta-analysis in clinical trials".
"""

import io

import numpy as np
import polars as pl

from features.bundle import AD_DEVIATIONS
from features.encode import Encoder
from features.policy import Array

from ..datasets.prepared import Prepared

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


def ad_deviations(data: Prepared, encoder: Encoder) -> Array | None:
    """Deviations by the id of an ad `(V,)`, from the train split; None where the schema does not tell ads by their ids."""
    field = next((field for field in encoder.schema.side("ad") if field.name == "ad_id"), None)
    if field is None:
        return None
    vocabulary = encoder.vocabularies.categories[field.vocabulary]
    shown, clicks = np.zeros(vocabulary.size), np.zeros(vocabulary.size)
    for frame in data.frames("train"):
        of_ad = frame.drop_nulls("ad_id").group_by("ad_id").agg(pl.len(), pl.sum("label"))
        ids = vocabulary.encode(of_ad["ad_id"].to_list())
        np.add.at(shown, ids, of_ad["len"].to_numpy())
        np.add.at(clicks, ids, of_ad["label"].to_numpy())
    shown[:2] = clicks[:2] = 0  # an ad without an id of its own is a new one, however many of those there were
    return deviations(shown, clicks)


def deviations_file(data: Prepared, encoder: Encoder) -> dict[str, bytes]:
    """The bundle's file of `ad_deviations`, where it has such."""
    found, file = ad_deviations(data, encoder), io.BytesIO()
    if found is None:
        return {}
    np.save(file, found, allow_pickle=False)
    return {AD_DEVIATIONS: file.getvalue()}
