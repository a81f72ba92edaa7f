"""How good the probabilities of the newest impressions were, and how far their fields have drifted: by model, over a sliding window.

A window is the last `IMPRESSIONS` of a model's rows, in whole hours and measurements: the oldest leaves when the others are enough.
"""

import logging
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from features.bundle import Bundle, BundleError, load_bundle
from features.repository import model_names

from ..retrain.drift import LEAST_ROWS, BinCounts, Reference, UnfitReferenceError, read_reference, stability, vocabulary_of, watched

IMPRESSIONS = 100_000
POSITIONS = 10
"""Positions that are told apart; those after them are `more`."""
PLACES = (*(str(position) for position in range(1, POSITIONS + 1)), "more")
OTHER = "_other"
"""Stands for models that the repository does not have; no model can be called so."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sums:
    """Of some impressions, by place `(11,)`: how many, their clicks, their p(click); and the log loss of all, in nats."""

    rows: BinCounts
    clicks: BinCounts
    p_click: BinCounts
    loss: float

    @classmethod
    def of(cls, frame: pl.DataFrame) -> "Sums":
        """Those of rows of the log."""
        place = np.minimum(frame["position"].to_numpy(), POSITIONS + 1) - 1
        p, label = frame["p_click"].to_numpy(), frame["label"].to_numpy().astype(np.float64)
        sure = np.clip(p, 1e-12, 1 - 1e-12)
        loss = -np.where(label > 0, np.log(sure), np.log1p(-sure)).sum()
        rows, clicks, p_click = (np.bincount(place, each, len(PLACES)).astype(np.float64) for each in (np.ones(len(p)), label, p))
        return cls(rows, clicks, p_click, float(loss))

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(self.rows + other.rows, self.clicks + other.clicks, self.p_click + other.p_click, self.loss + other.loss)


@dataclass(frozen=True)
class Quality:
    """Of the window of one model. What cannot be told yet is not a number."""

    calibration: float
    """Sum of p(click) over clicks."""
    by_place: Mapping[str, float]
    normalised_entropy: float
    """Log loss over the entropy of the click rate (He et al. 2014, eq. 1)."""
    drift: Mapping[str, float]
    """By field, the population stability index against the training reference of the version that served most lately."""


class Window:
    """The newest impressions of one model."""

    def __init__(self, models: Path) -> None:
        self._sums: deque[Sums] = deque()
        self._drift = Drift(models)

    def add(self, name: str, frame: pl.DataFrame) -> Sums:
        """Add rows that a model served; their sums."""
        sums = Sums.of(frame)
        self._sums.append(sums)
        total = sum(each.rows.sum() for each in self._sums)
        while total - self._sums[0].rows.sum() >= IMPRESSIONS:
            total -= self._sums.popleft().rows.sum()
        self._drift.add(name, frame)
        return sums

    def quality(self) -> Quality:
        """What the window comes to."""
        total = sum(list(self._sums)[1:], self._sums[0])
        rows, clicks = total.rows.sum(), total.clicks.sum()
        rate = clicks / rows
        entropy = -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate)) if 0 < rate < 1 else float("nan")
        places = {place: _ratio(p, c) for place, n, p, c in zip(PLACES, total.rows, total.p_click, total.clicks, strict=True) if n}
        return Quality(_ratio(total.p_click.sum(), clicks), places, float(total.loss / rows / entropy), self._drift.measured())


def _ratio(p_click: float, clicks: float) -> float:
    return float(p_click / clicks) if clicks else float("nan")


class Drift:
    """The newest rows of the version that serves, counted by field as its training reference is."""

    def __init__(self, models: Path) -> None:
        self._models = models
        self._version = -1
        self._bundle: Bundle | None = None
        self._references: Mapping[str, Reference] = {}
        self._counts: deque[tuple[int, Mapping[str, BinCounts]]] = deque()

    def add(self, name: str, frame: pl.DataFrame) -> None:
        """Count rows. Another version begins anew with its own reference; while two serve, the one with more rows of a file counts."""
        version = int(frame["version"].value_counts(sort=True)["version"][0])
        if version != self._version:
            self._version, self._bundle, self._references = version, None, {}
            self._counts.clear()
            self._load(name, version)
        rows = frame.filter(pl.col("version") == self._version)
        if self._bundle is None or rows.is_empty():
            return
        counts = {}
        for path, (column, field) in watched(self._bundle.schema, rows.columns).items():
            if path in self._references:
                counts[path] = self._references[path].count(rows[column], vocabulary_of(field, self._bundle.vocabularies))
        self._counts.append((len(rows), counts))
        while sum(each for each, _ in self._counts) - self._counts[0][0] >= IMPRESSIONS:
            self._counts.popleft()

    def _load(self, name: str, version: int) -> None:
        try:
            bundle = load_bundle(self._models / name / str(version))
            references = read_reference(bundle)
        except (BundleError, UnfitReferenceError) as error:
            log.warning("no drift of %s %d is told: %s", name, version, error)
            return
        if references is None:
            log.info("no drift of %s %d is told: its bundle has no training reference", name, version)
            return
        self._bundle, self._references = bundle, references

    def measured(self) -> Mapping[str, float]:
        """The index of each field, once there are rows enough to tell."""
        if sum(rows for rows, _ in self._counts) < LEAST_ROWS:
            return {}
        together = {path: np.sum([counts[path] for _, counts in self._counts], 0) for path in self._counts[0][1]}
        return {path: stability(counts, np.array(self._references[path].counts)) for path, counts in together.items()}


class Windows:
    """The windows of the models of a repository; rows of models that are not in it count as `_other`, which has no reference."""

    def __init__(self, models: Path) -> None:
        self._models = models
        self._windows: dict[str, Window] = {}

    def name(self, model: str) -> str:
        """What a model counts as."""
        return model if model in model_names(self._models) else OTHER

    def add(self, rows: pl.DataFrame) -> dict[str, tuple[Sums, Quality]]:
        """Add the rows of a file; of each model in it their sums, and what its window then comes to."""
        known = pl.col("model").is_in(model_names(self._models))
        named = rows.with_columns(label_of=pl.when(known).then(pl.col("model")).otherwise(pl.lit(OTHER)))
        by_model = {}
        for (name,), frame in named.group_by("label_of", maintain_order=True):
            window = self._windows.setdefault(str(name), Window(self._models))
            by_model[str(name)] = window.add(str(name), frame), window.quality()
        return by_model
