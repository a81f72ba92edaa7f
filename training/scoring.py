"""Bundles over a data set: what each row is given, and two of them side by side, by head and by segment."""

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from rich.progress import Progress

from features.bundle import Bundle, replace_file

from .calibrate import sampled_heads
from .datasets.ads import ad_table
from .datasets.encoded import encode_frames, maturity_name, maturity_of, outcome_of
from .datasets.fields import check_fields
from .datasets.prepared import DataError, Prepared
from .export.graph import Graph
from .networks.contract import CLICK
from .retrain.compare import Comparison, compare
from .retrain.gate import users_of
from .segments import segments

Array = np.ndarray[Any, np.dtype[Any]]
KEYS = ("request_id", "position", "ts", "user_id", "ad_id")


@dataclass(frozen=True)
class PartCompared:
    """Two bundles on some of the rows: all of a head whose label is known, or of these a segment."""

    head: str
    segment: str | None
    found: Comparison


def score_rows(bundle: Bundle, data: Prepared, split: str, progress: Progress) -> pl.DataFrame:
    """A row's ids, as far as there are such, its labels, and `p_<head>` of each head, float32, as the bundle serves it.

    Encoded file by file. Where a share of the non-clicks was kept, p(click) is lower than these rows' click rate, as it is when served.

    Raises:
        DataError: the split is absent or empty, or does not fit the bundle's schema or lacks a field of it.
        BundleError: ONNX Runtime does not take its graph.
    """
    check_fields(data, bundle.schema, data.files(split))
    theirs, graph, parts = replace(data, schema=bundle.schema), Graph(bundle), []
    more = [head for head in bundle.manifest.get("heads", ()) if head != CLICK]
    ads, task = ad_table(theirs, bundle.encoder), progress.add_task("scoring", total=None)
    waits = [maturity_name(head) for head in more]
    for frame in theirs.frames(split, ["request_id", *more, *waits]):
        scores = graph.by_head(encode_frames(theirs, [frame], bundle.encoder, ads)) if len(frame) else {}
        kept = frame.select(name for name in (*KEYS, "label", *more, *waits) if name in frame.columns)
        parts.append(kept.with_columns(pl.Series(f"p_{head}", p) for head, p in scores.items()))
        progress.update(task, advance=len(frame))
    if not any(map(len, parts)):
        raise DataError(f"the {split} split of {data.folder} has no row")
    progress.update(task, total=sum(map(len, parts)))
    return pl.concat([part for part in parts if len(part)], how="diagonal")


def write_scores(scored: pl.DataFrame, out: Path) -> None:
    """Write the table whole or not at all.

    Raises:
        DataError: it cannot be written.
    """
    scored.write_parquet(data := io.BytesIO())
    try:
        replace_file(out, data.getvalue())
    except OSError as error:
        raise DataError(f"cannot write {out}: {error.strerror or error}") from error


def compare_bundles(first: Bundle, second: Bundle, data: Prepared, split: str, field: str | None, progress: Progress) -> list[PartCompared]:
    """Both on the rows of a split, each head that both have and that the rows have labels of; by the values of a `field` as well.

    The statistics are those of the gate (`retrain/compare.py`): users are drawn, with all of their rows.

    Raises:
        DataError: as `score_rows` and `segments` do.
    """
    some = segments(data, split, field) if field else []
    both = [score_rows(bundle, data, split, progress) for bundle in (first, second)]
    users, heads = users_of(data, split), [head for head in heads_of(both[0]) if f"p_{head}" in both[1].columns]
    found, every = [], [(None, np.ones(len(users), np.bool_)), *some]
    for head, name, rows in progress.track([(head, *each) for head in heads for each in every], description="comparing"):
        labels = both[0]["label"].to_numpy().astype(np.float32) if head == CLICK else outcome_of(both[0], head, data)
        known = rows & ~np.isnan(labels)
        if known.any():
            ours, theirs = (on_log(scored, head, data)[known] for scored in both)
            found.append(PartCompared(head, name, compare(labels[known], users[known], theirs, ours)))
    return found


def heads_of(scored: pl.DataFrame) -> Iterator[str]:
    """The heads that a table has scores and labels of."""
    heads = (name.removeprefix("p_") for name in scored.columns if name.startswith("p_"))
    return (head for head in heads if head == CLICK or head in scored.columns)


def on_log(scored: pl.DataFrame, head: str, data: Prepared) -> Array:
    """Probabilities `(N,)` to compare with labels: of what has come by now, on rows as they were sampled."""
    served = {name: scored[f"p_{name}"].to_numpy() for name in (CLICK, head)}
    p = sampled_heads(served, data.negative_sampling)[head]
    return p if head == CLICK else p * maturity_of(scored, head, data)
