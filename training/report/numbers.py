"""What a training's report says, as numbers and texts for JSON: of the test split, which nothing was chosen by, and of the data.

No row is told of by its user: the ids of users and what is known of them stay out.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl
from rich.progress import Progress
from scipy.stats import beta, hypergeom
from sklearn.metrics import precision_recall_curve, roc_curve

from features.vocabulary import PADDING, UNKNOWN

from ..datasets.prepared import SPLITS, Prepared, column_of, columns_of
from ..datasets.vocabularies import joined
from ..evaluate import auc, reliability
from ..fit import Epoch, predict, predict_heads
from ..importance import importances_of
from ..networks.contract import CLICK
from ..segments import segments
from ..train import Trained

Array = np.ndarray[Any, np.dtype[Any]]
Told = dict[str, Any]
IMPORTANCE_ROWS, MOMENTS, POINTS, WORST, TOP = 2_000, 40, 150, 10, (1, 5, 10)
NOT_TOLD = ("init_from", "report", "segment")
"""Of the settings: a path of the training machine, and what was asked of the report itself."""


def findings(data: Prepared, trained: Trained, reference: Mapping[str, Any], progress: Progress) -> Told:
    """All that the report says, but for the scores themselves; `reference` is what `reference.json` holds, train counted by field."""
    rows = trained.held_out
    p = trained.calibration.on_log(predict(trained.network, rows))
    both = 0 < rows.labels.sum() < len(p)
    wanted = (lambda dealt: predict(trained.network, dealt), rows, trained.encoder.schema, progress, IMPORTANCE_ROWS)
    _, some, falls = importances_of(*wanted) if both else (0.0, 0, [])
    precision, recall, _ = precision_recall_curve(rows.labels, p) if both else np.zeros((3, 0))
    false, true, _ = roc_curve(rows.labels, p) if both else np.zeros((3, 0))
    others = {f"{head}, {split}": m.as_dict() for head, found in trained.head_metrics.items() for split, m in found.items()}
    return {
        "network": trained.family,
        "data": data.schema.name,
        "metrics": {split: m.as_dict() for split, m in trained.metrics.items()} | others,
        "epochs": [epoch_told(each) for each in trained.epochs],
        "best": max(trained.epochs, key=lambda each: each.score).number if trained.epochs else None,
        "roc": thinned(false, true),
        "precision_recall": thinned(recall[::-1], precision[::-1]),
        "reliability": reliability_told(rows.labels, p),
        "heads": heads_told(trained),
        "examination": trained.examination.told() if trained.examination else [],
        "segments": segments_told(data, trained.settings.get("segment"), rows.labels, p),
        "users": by_user(rows.labels, p, rows.users),
        "importance": {"rows": some, "fields": [vars(each) for each in falls]},
        "worst": worst(data, rows.labels, p),
        "splits": {split: {"rows": n, "clicks": trained.clicks[split]} for split, n in trained.rows.items()},
        "moments": moments(data),
        "fields": fields_told(trained, reference["fields"]),
        "settings": {name: value for name, value in trained.settings.items() if name not in NOT_TOLD},
        "timings": timings(progress),
        "scores": histogram(rows.labels, p),
    }


def epoch_told(epoch: Epoch) -> Told:
    """An epoch, as a learning curve has it."""
    valid = epoch.valid.as_dict()
    return {"number": epoch.number, "train_loss": finite(epoch.train_loss), "valid_loss": valid["log_loss"], "valid_auc": valid["auc"]}


def finite(value: float) -> float | None:
    """The value, None where it is no number."""
    return float(value) if np.isfinite(value) else None


def with_interval(clicks: Array, rows: Array) -> dict[str, Array]:
    """Rates and their 95 % intervals by Clopper and Pearson (1934), as if the rows did not depend on each other."""
    low, high = beta.ppf(0.025, clicks, rows - clicks + 1), beta.ppf(0.975, clicks + 1, rows - clicks)
    return {"rate": clicks / rows, "low": np.where(clicks > 0, low, 0.0), "high": np.where(clicks < rows, high, 1.0)}


def reliability_told(labels: Array, p: Array) -> list[Told]:
    """The bins of the reliability diagram: mean p(click), click rate, its interval, and rows."""
    means, rate, rows = reliability(labels, p)
    return pl.DataFrame({"p": means, "rows": rows, **with_interval(np.rint(rate * rows), rows)}).to_dicts()


def heads_told(trained: Trained) -> Told:
    """The bins of the reliability diagrams of heads other than the click, on the rows whose label is known, of what has come by now."""
    rows, told, others = trained.held_out, {}, [head for head in trained.calibrations if head != CLICK]
    for head, logits in predict_heads(trained.network, rows).items() if others else ():
        if head != CLICK:
            labels, known = rows.known(head)
            p = trained.calibrations[head].on_log(logits[known]) * rows.maturity_of(head, known)
            told[head] = reliability_told(labels[known], p)
    return told


def thinned(x: Array, y: Array) -> list[tuple[float, float]]:
    """At most so many points of a curve, spread evenly along it."""
    way = np.cumsum(np.hypot(np.diff(x, prepend=x[:1]), np.diff(y, prepend=y[:1])))
    kept = np.unique(np.searchsorted(way, np.linspace(0, way[-1], POINTS))).tolist() if len(x) else []
    return [(float(x[i]), float(y[i])) for i in kept]


def histogram(labels: Array, p: Array) -> Told:
    """How p(click) is spread over the rows that were clicked and over the others: the share of each in every bin."""
    edges = np.linspace(0, max(float(np.quantile(p, 0.999)), 1e-6), 41)
    counts = {name: np.histogram(np.minimum(p[labels == label], edges[-1]), edges)[0] for name, label in (("clicked", 1), ("others", 0))}
    return {"edges": edges.tolist(), **{name: (each / max(each.sum(), 1)).tolist() for name, each in counts.items()}}


def segments_told(data: Prepared, asked: str | None, labels: Array, p: Array) -> Told:
    """Calibration and AUC by the values of the field that was asked for, or else of the first category of the context, if there is one."""
    usual = (field.path for field in data.schema.side("context") if field.kind == "category")
    path, told = asked or next(usual, None), []
    for value, some in segments(data, "test", path) if path else ():
        rate = {name: float(each) for name, each in with_interval(labels[some].sum(), some.sum()).items()}
        told.append(
            {"value": value, "rows": int(some.sum()), **rate, "p": float(p[some].mean()), "auc": finite(auc(labels[some], p[some]))}
        )
    return {"field": path, "values": told}


def by_user(labels: Array, p: Array, users: Array) -> list[Told]:
    """HR@K and NDCG@K, the mean over users with more than K rows, some clicked and some not; and what rows in a random order give."""
    order = np.lexsort((labels, -p, users))  # of equal p, clicks come last
    labels, told = labels[order], []
    _, group, sizes = np.unique(users[order], return_inverse=True, return_counts=True)
    rank = np.arange(len(labels)) - (np.cumsum(sizes) - sizes)[group]
    clicks, gains = np.bincount(group, labels), labels / np.log2(rank + 2)
    for k in TOP:
        some = (clicks > 0) & (clicks < sizes) & (sizes > k)
        of, clicked, best = sizes[some], clicks[some], np.cumsum(1 / np.log2(np.arange(k) + 2))
        ideal = best[np.minimum(clicked, k).astype(int) - 1]
        hits, gained = (np.bincount(group, each * (rank < k))[some] for each in (labels, gains))
        rates = {"hr": hits > 0, "chance_hr": hypergeom.sf(0, of, clicked.astype(int), k)}
        rates |= {"ndcg": gained / ideal, "chance_ndcg": clicked / of * best[-1] / ideal}
        if some.any():
            told.append({"k": k, "users": int(some.sum()), **{name: float(each.mean()) for name, each in rates.items()}})
    return told


def worst(data: Prepared, labels: Array, p: Array) -> list[Told]:
    """The rows of test with the highest loss: ad, context, features of the ad, label and p(click). Nothing of the user."""
    right = np.where(labels > 0, p, 1 - p)
    chosen, at, begin = np.argsort(right, kind="stable")[:WORST].tolist(), dict[int, Told](), 0
    tables = data.lookups("ad")
    fields = [field for field in data.schema.fields if field.side != "user" and field.kind != "vector" and field.name != "ad_id"]
    for frame in data.frames("test"):
        here = [i for i in chosen if begin <= i < begin + len(frame)]
        some = joined(frame[[i - begin for i in here]], data.schema, tables)
        named = some.select(column.alias(field.path) for field in fields if (column := column_of(some, field)) is not None).to_dicts()
        for i, ad_id, features in zip(here, some["ad_id"], named or [{}] * len(here), strict=True):
            told = {"ad_id": ad_id, "label": int(labels[i]), "p": float(p[i]), "loss": float(-np.log(max(right[i], 1e-12)))}
            at[i] = {**told, "features": {path: value for path, value in features.items() if value is not None}}
        begin += len(frame)
    return [at[i] for i in chosen]


def moments(data: Prepared) -> list[Told]:
    """The click rate of what is served, over all splits, in steps of time; none where rows have no times."""
    files = sorted({path for split in SPLITS for path in data.files(split)})
    if not all("ts" in columns_of(path) for path in files):
        return []
    parts = [pl.scan_parquet(path, glob=False).select(pl.col("ts").cast(pl.Float64), pl.col("label").cast(pl.Int64)) for path in files]
    begin, end = data.span
    rows = pl.concat(parts).drop_nulls().filter(pl.col("ts") >= begin, pl.col("ts") < end)
    first, last = rows.select(first=pl.min("ts"), last=pl.max("ts")).collect().row(0)
    if first is None or first == last:
        return []
    width = (last - first) / MOMENTS
    step = ((pl.col("ts") - first) / width).floor().clip(0, MOMENTS - 1).alias("step")
    counted = rows.group_by(step).agg(clicks=pl.sum("label"), rows=pl.len()).sort("step").collect()
    rates = with_interval(counted["clicks"].to_numpy(), counted["rows"].to_numpy())
    served = {name: rate / (rate + (1 - rate) / data.negative_sampling) for name, rate in rates.items()}
    return pl.DataFrame({"ts": first + (counted["step"].to_numpy() + 0.5) * width, **served}).to_dicts()


def fields_told(trained: Trained, reference: Mapping[str, Any]) -> list[Told]:
    """By field: the share of train's rows that miss it, how many values its vocabulary has, which share of test's that does not know."""
    schema, told = trained.encoder.schema, []
    rows = max((sum(each["counts"]) for each in reference.values() if each["kind"] != "list"), default=0) or 1
    slots = {slot.field.path: (part, slot.columns) for part in ("user", "ad") for slot in schema.layouts[part].ids}
    for field in schema.fields:
        seen, values, unknown = reference.get(field.path), None, None
        missing = seen["counts"][-1 if seen["kind"] == "number" else -2] / rows if seen else None
        if not field.dense:
            part, columns = slots[field.path]
            ids = (trained.held_out.user if part == "user" else trained.held_out.ad).ids[:, columns]
            values = trained.encoder.vocabularies.categories[field.vocabulary].size
            unknown = float((ids == UNKNOWN).sum() / max((ids != PADDING).sum(), 1))
        told.append({"field": field.path, "kind": field.kind, "missing": missing, "values": values, "unknown": unknown})
    return told


def timings(progress: Progress) -> dict[str, float]:
    """The seconds that each step of this training took, the epochs together."""
    tasks, took = progress.tasks, dict[str, float]()
    begins = [i for i, task in enumerate(tasks) if task.description == "learning vocabularies"]
    for task in tasks[begins[-1] if begins else 0 :]:
        name = re.sub(r"^epoch \d+$", "epochs", task.description)
        took[name] = took.get(name, 0.0) + (task.finished_time or task.elapsed or 0.0)
    return took
