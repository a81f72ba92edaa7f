"""One training: a prepared data set and a network in, a calibrated network and what it measures out. The loop is in `fit.py`.

Knows nothing about ONNX or bundles (`export.py`).
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.progress import Progress

from features.encode import Encoder
from features.policy import Array
from features.vocabulary import Vocabularies

from .calibrate import Calibration, fit
from .checkpoint import Checkpoint, identity
from .datasets.encoded import Rows, encode_split
from .datasets.memory import GB, Memory
from .datasets.prepared import SPLITS, Prepared, wrong_head
from .datasets.vocabularies import learn_vocabularies
from .deviations import ad_deviations
from .device import device_of
from .distributed import Logits
from .evaluate import Measures, check_finite, measure
from .first_order import settled
from .fit import Epoch, deterministic, fit_network, predict_heads
from .networks import NETWORKS, build
from .networks.contract import CLICK, Fields, Network
from .networks.pretrained import copy_embeddings
from .networks.warm_start import warm_start
from .position import Curve, by_tower, check_position_bias, examined, placed, tower_of, weighted
from .shards import check_split
from .tenure import Tenure, renewed
from .train_settings import TrainError, TrainSettings
from .workers import check_workers, fit_by_workers


@dataclass(frozen=True)
class Trained:
    """The network of the best epoch, in evaluation mode, and what belongs to it."""

    family: str
    network: Network
    encoder: Encoder
    calibrations: dict[str, Calibration]
    """By head."""
    epochs: list[Epoch]
    metrics: dict[str, Measures]
    """By split, of calibrated probabilities."""
    settings: dict[str, Any]
    held_out: Rows
    """The test split, encoded: what int8, the gate and the report ask about it needs no second encoding."""
    rows: dict[str, int] = field(default_factory=dict)
    clicks: dict[str, int] = field(default_factory=dict)
    """By split."""
    head_metrics: dict[str, dict[str, Measures]] = field(default_factory=dict)
    """Of the heads other than the click, by head and split."""
    tenure: Tenure = field(default_factory=Tenure)
    """Which values are idle, for the training that goes on from this one."""
    examination: Curve | None = None
    """How much more likely the first place is clicked than others, where `position_bias` keeps places apart."""
    ad_deviations: Array | None = None
    """How far the logit of each ad may be off for want of impressions `(V,)`; None where ads are not told by their ids."""

    @property
    def calibration(self) -> Calibration:
        """That of the click."""
        return self.calibrations[CLICK]


@dataclass(frozen=True)
class Start:
    """A network to go on from, and the vocabularies that its embeddings are laid out by."""

    network: Network
    vocabularies: Vocabularies
    negative_sampling: float = 1.0
    """The share of non-clicks in the rows that the network was trained on: its logits are right for those."""
    embeddings_only: bool = False
    """Take the embeddings of values that both know, for a network that may be another one; all else begins fresh."""
    idle: Mapping[str, dict[str, int]] = field(default_factory=dict)
    """See `Tenure.idle`."""


def train(  # noqa: PLR0915  # its steps, one after the other
    data: Prepared,
    family: str,
    network_settings: Any,
    settings: TrainSettings,
    progress: Progress,
    start: Start | None = None,
    checkpoint: Checkpoint | None = None,
) -> Trained:
    """Learn vocabularies, encode, train, calibrate on valid, and measure valid and test once. `start` is where the weights begin.

    Raises:
        CheckpointError: see `Checkpoint`.
        DataError: a split is absent or empty, or a column does not fit the schema.
        TrainError: the network cannot be built for this schema, or is not that of `start`; or the device is not there.
    """
    for split in SPLITS:
        data.files(split)  # an absent test split would be found after hours
    heads, whole = heads_of(family, settings.heads), start if start and not start.embeddings_only else None
    check_position_bias(data, settings.position_bias, heads)
    tenure = Tenure(settings.evict_after, dict(whole.idle) if whole else {})
    settings = replace(settings, device=device_of(settings.device).type)
    if start and settings.shard_rows:
        raise TrainError("tables that are split over workers begin fresh; leave out --init-from, or --shard-rows")
    if settings.workers > 1:
        check_workers()
    with deterministic(settings):
        with _step(progress, "learning vocabularies"):
            encoder = Encoder(data.schema, learn_vocabularies(data, whole.vocabularies if whole else None, tenure))
        with _step(progress, "encoding"):
            encoded = partial(_encoded, data, encoder, heads, settings)
            rows, valid = encoded()
        curve = examined(data, rows, settings.position_bias)
        rows, encoded = weighted(rows, curve), partial(encoded, curve)
        left, settings = settings.open, settings.for_rows(len(rows))
        for line in (*_from_disk(rows, data.memory, settings), *_waiting(rows)):
            progress.console.print(line, soft_wrap=True)
        few = bool(whole.network.first_weights()) if whole else len(rows) < settings.flat_below
        network_settings = settled(network_settings, few)
        progress.console.print(settings.summary(len(rows)), soft_wrap=True)
        try:
            fields = Fields.of(data.schema, encoder.vocabularies, heads)._replace(shard_rows=settings.shard_rows)
            network = build(family, fields, network_settings)
            check_split(family, network)
            if whole:
                shift = math.log(whole.negative_sampling / data.negative_sampling)
                warm_start(whole.network, network, shift, renewed(whole.vocabularies, encoder.vocabularies))
            else:
                _begin_embeddings(network, encoder.vocabularies, start, progress)
            network.position_bias = tower_of(settings.position_bias, rows)
        except ValueError as error:
            raise TrainError(str(error)) from error
        if checkpoint:
            both = {**vars(network_settings), **vars(settings)}
            checkpoint.training = identity(family, both, data.schema.to_toml(), (rows, valid))
        fitted = partial(fit_by_workers, encoded) if settings.workers > 1 else fit_network
        epochs = fitted(network, rows, valid, settings, progress, warm=whole is not None, checkpoint=checkpoint)
        counted = {"train": (len(rows), int(rows.labels.sum(dtype=np.float64)))}
        logits = predict_heads(network, valid)
        examination = _without_places(network, logits[CLICK], rows, curve, progress)
        off = ad_deviations(rows, encoder)
        del rows
        calibrations = {head: calibrated(valid, head, logits[head], data.negative_sampling) for head in heads}
        measured = {"valid": measured_heads(valid, logits, calibrations)}
        with _step(progress, "measuring on test"):
            test = encode_split(data, "test", encoder, heads, settings.delayed)
            measured["test"] = measured_heads(test, predict_heads(network, test), calibrations)
        metrics = {split: found[CLICK] for split, found in measured.items()}
        network.cpu()
        facts = {**vars(network_settings), **vars(settings), "threads": torch.get_num_threads(), "by_data": left}
    counted |= {split: (m.rows, m.clicks) for split, m in metrics.items()}
    by_split = ({split: counts[i] for split, counts in counted.items()} for i in range(2))
    others = {head: {split: found[head] for split, found in measured.items()} for head in heads if head != CLICK}
    rows_by_split, clicks_by_split = by_split
    told = (rows_by_split, clicks_by_split, others, tenure, examination, off)
    return Trained(family, network, encoder, calibrations, epochs, metrics, facts, test, *told)


def _encoded(
    data: Prepared, encoder: Encoder, heads: tuple[str, ...], settings: TrainSettings, curve: Curve | None = None
) -> tuple[Rows, Rows]:
    rows, valid = (encode_split(data, split, encoder, heads, settings.delayed) for split in ("train", "valid"))
    rows, valid = placed(data, rows, valid) if settings.position_bias else (rows, valid)
    return weighted(rows, curve), valid


def _without_places(network: Network, logits: Logits, rows: Rows, curve: Curve | None, progress: Progress) -> Curve | None:
    """Take the tower off a network, and say what it, or the curve that weighed clicks, makes of places."""
    if network.position_bias is not None:
        curve, network.position_bias = by_tower(network.position_bias, logits, rows.places), None
    for line in curve.summary(rows) if curve else ():
        progress.console.print(line, soft_wrap=True)
    return curve


def _waiting(rows: Rows) -> Iterator[str]:
    """Which rows may still convert, for people."""
    for head, maturity in rows.maturity.items():
        young = maturity[maturity < 1]
        yield f"{head}: {len(young):,} of {len(rows):,} rows may still get theirs, {young.mean():.0%} of which would have come by now"


def _begin_embeddings(network: Network, vocabularies: Vocabularies, start: Start | None, progress: Progress) -> None:
    """Copy the embeddings of a network to begin with, and say so; and say it where there is none, and should be."""
    if start is not None:
        for copied in copy_embeddings(start.network, start.vocabularies, network, vocabularies):
            progress.console.print(copied.line(), soft_wrap=True)
    elif network.starts_from:
        wanted = f"--init-from a bundle of {network.starts_from} lets its embeddings begin there"
        progress.console.print(f"this network starts fresh: {wanted}", soft_wrap=True)


def _from_disk(rows: Rows, memory: Memory, settings: TrainSettings) -> Iterator[str]:
    """How the rows of train are read where they are not in memory, for people."""
    if rows.mapped:
        mixed = min(settings.shuffle_rows, len(rows))
        pool = rows.mapped.size * mixed // len(rows)
        if 4 * pool > memory.most:
            what = f"{mixed:,} rows that are mixed at once take {pool / GB:.2g} GB of {memory.most / GB:.3g} GB"
            raise TrainError(f"{what}; say --set shuffle_rows= with fewer, or more --memory")
        yield f"rows are read from disk, {rows.mapped.size / GB:.3g} GB, and mixed {mixed:,} at once"


def heads_of(family: str, asked: str = "") -> tuple[str, ...]:
    """The heads that a network is trained with: those asked for, such as "click-conversion", or else its own.

    Raises:
        TrainError: what is asked for is not the click and names of columns.
    """
    heads = tuple(asked.split("-")) if asked else NETWORKS[family].own_heads
    wrong = [mistake for head in heads[1:] if (mistake := wrong_head(head))]
    if heads[:1] != (CLICK,) or len(set(heads)) < len(heads) or wrong:
        mistakes = "; ".join(wrong) or "the click comes first, and each head once"
        raise TrainError(f"heads is {asked!r}; expected a value such as click-conversion: {mistakes}")
    return heads


def calibrated(rows: Rows, head: str, logits: Logits, negative_sampling: float) -> Calibration:
    """The calibration of a head's logits `(N,)`, on the rows whose label is known.

    Raises:
        DataError: a logit is no number.
    """
    labels, known = rows.known(head)
    check_finite(logits[known])
    return fit(logits[known], labels[known], negative_sampling if head == CLICK else 1.0, rows.maturity_of(head, known))


def measured_heads(rows: Rows, logits: Mapping[str, Logits], calibrations: Mapping[str, Calibration]) -> dict[str, Measures]:
    """By head, what its calibrated probabilities of what has come by now come to, on the rows whose label is known."""
    found = {}
    for head, calibration in calibrations.items():
        labels, known = rows.known(head)
        seen = calibration.on_log(logits[head][known]) * rows.maturity_of(head, known)
        found[head] = measure(labels[known], seen, rows.users[known])
    return found


@contextmanager
def _step(progress: Progress, description: str) -> Iterator[None]:
    task = progress.add_task(description, total=None)
    yield
    progress.update(task, total=1, completed=1)
