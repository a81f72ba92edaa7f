"""Whether a log can be made again offline: its tensors field by field, and its scores, by the versions that made them.

Rows are encoded through `features/` as training encodes them, so a difference means that training and serving do not see the same.
Scores are float32 on both sides and Float64 in the log, which holds each of them exactly; another processor or another order of sums
moves them by about 1e-7.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from rich.console import Console
from rich.table import Table

from features.bundle import GOLDEN_TOLERANCE, INT8_MODEL, INT8_TOLERANCE, MODEL, Bundle, BundleError, load_bundle
from features.encode import AdTable, Block
from features.schema import AGES, Slot

from .datasets.ads import ad_table
from .datasets.encoded import Rows, encode_frames
from .datasets.fields import check_fields
from .datasets.log import ImpressionLog
from .datasets.prepared import DataError, check_columns
from .export.graph import Graph

Array = np.ndarray[Any, np.dtype[Any]]
TOLERANCES = {MODEL: GOLDEN_TOLERANCE, INT8_MODEL: INT8_TOLERANCE}
GRAPHS = {"float32": MODEL, "int8": INT8_MODEL}
MADE_BY = {"model": pl.String(), "version": pl.Int64(), "p_click": pl.Float64()}
SECRET = frozenset({"user.user_id"})
"""Fields of which no example is given: it would tell whose row it is."""
ABSENT = "nothing"


@dataclass
class FieldSkew:
    """How often a field was encoded otherwise than it was served. The example is encoded too: ids, or numbers."""

    rows: int = 0
    differ: int = 0
    logged: str = ""
    recomputed: str = ""

    def see(self, part: str, logged: Array | None, recomputed: Array, secret: bool) -> None:
        """Compare one part of a row."""
        self.rows += 1
        if logged is None or logged.shape != recomputed.shape or not np.array_equal(logged, recomputed):
            self.differ += 1
            if self.differ == 1 and not secret:
                self.logged, self.recomputed = _example(part, logged, recomputed)


@dataclass
class VersionSkew:
    """How well a version's scores could be made again; `unusable` says why they could not be tried at all."""

    rows: int = 0
    compared: int = 0
    differ: int = 0
    """Rows that differ by more than the tolerance."""
    max_difference: float = 0.0
    unusable: str | None = None


@dataclass
class Skew:
    """What was found, by field and by (model, version)."""

    tolerance: float
    rows: int = 0
    with_tensors: int = 0
    fields: dict[str, FieldSkew] = field(default_factory=dict)
    versions: dict[tuple[str, int], VersionSkew] = field(default_factory=dict)

    @property
    def compared(self) -> int:
        """Rows whose score was compared."""
        return sum(version.compared for version in self.versions.values())

    @property
    def max_difference(self) -> float:
        """The largest of any version; not a number is larger than any."""
        return max((version.max_difference for version in self.versions.values()), default=0.0)

    @property
    def found(self) -> bool:
        """Whether a field differs, or a score by more than the tolerance."""
        return any(each.differ for each in self.fields.values()) or any(each.differ for each in self.versions.values())

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        versions = [{"model": model, "version": version, **asdict(each)} for (model, version), each in self.versions.items()]
        totals = {"skew": self.found, "rows": self.rows, "compared": self.compared, "with_tensors": self.with_tensors}
        fields = {name: asdict(each) for name, each in self.fields.items()}
        return {**totals, "max_difference": self.max_difference, "tolerance": self.tolerance, "versions": versions, "fields": fields}


@dataclass
class Checker:
    """One version's bundle, and the log's ads as it encodes them."""

    data: ImpressionLog
    bundle: Bundle
    graph: Graph
    table: AdTable

    def rows(self, frame: pl.DataFrame) -> Rows:
        """The rows as this version encodes them."""
        return encode_frames(self.data, [frame], self.bundle.encoder, self.table)


def find_skew(data: ImpressionLog, models: Path, name: str | None = None, sample: int | None = None, precision: str = "float32") -> Skew:
    """Encode and score the rows of a log again, with the versions in the repository `models`, and compare.

    `name` leaves out the rows of other models. Of scores at least a `sample` of so many rows of the window is compared, evenly spread.

    Raises:
        DataError: the log is damaged, or there was nothing to compare.
    """
    skew, checkers = Skew(TOLERANCES[GRAPHS[precision]]), dict[tuple[str, int], Checker | None]()
    every = 1 if sample is None else max(1, sum(part.rows for part in data.parts) // sample)
    for frame in _frames(data, name):
        chosen = frame.with_columns(score=pl.int_range(skew.rows, skew.rows + len(frame)) % every == 0)
        skew.rows += len(frame)
        for (model, version), some in chosen.group_by(["model", "version"], maintain_order=True):
            key = str(model), int(version)
            version_skew = skew.versions.setdefault(key, VersionSkew())
            version_skew.rows += len(some)
            if key not in checkers:
                checkers[key], version_skew.unusable = _checker(data, models, key, GRAPHS[precision])
            if checker := checkers[key]:
                _compare_fields(skew, some, checker)
                _compare_scores(version_skew, some.filter("score"), checker, skew.tolerance)
    if not skew.compared:
        why = "; ".join(f"{model} {version}: {each.unusable}" for (model, version), each in skew.versions.items())
        raise DataError(f"{data.folder} has no row that could be compared; {why or f'none of {name} is in the window'}")
    return skew


def _frames(data: ImpressionLog, name: str | None) -> Iterator[pl.DataFrame]:
    tensors = [f"tensors.{part}_{kind}" for part in ("user", "history", "ad") for kind in ("ids", "numbers")] + [f"tensors.{AGES}"]
    for frame in data.between(-np.inf, np.inf, (*MADE_BY, *tensors)):
        check_columns(frame, MADE_BY, data.folder)
        yield frame if name is None else frame.filter(pl.col("model") == name)


def _checker(data: ImpressionLog, models: Path, key: tuple[str, int], graph: str) -> tuple[Checker | None, str | None]:
    """What checks a version's rows, or why nothing does."""
    path = models / key[0] / str(key[1])
    if not path.is_dir():
        return None, f"{path} is not there any more"
    try:
        bundle = load_bundle(path)
    except BundleError as error:
        return None, str(error)
    if graph not in bundle.files:
        return None, f"{path} has no {graph}"
    try:
        check_fields(data, bundle.schema, [part.path for part in data.parts])
    except DataError as error:
        return None, str(error)
    own = replace(data, schema=bundle.schema)
    return Checker(own, bundle, Graph(bundle, graph), ad_table(own, bundle.encoder)), None


def _compare_scores(version_skew: VersionSkew, frame: pl.DataFrame, checker: Checker, tolerance: float) -> None:
    if len(frame):
        off = np.abs(checker.graph.p_click(checker.rows(frame)) - frame["p_click"].to_numpy())
        off[np.isnan(off)] = np.inf
        version_skew.compared += len(frame)
        version_skew.differ += int((off > tolerance).sum())
        version_skew.max_difference = max(version_skew.max_difference, float(off.max()))


def _compare_fields(skew: Skew, frame: pl.DataFrame, checker: Checker) -> None:
    """Compare the tensors of those rows that have some."""
    tensors = {name: f"tensors.{name}" for name in checker.bundle.schema.tensors if f"tensors.{name}" in frame.columns}
    some = frame.filter(pl.any_horizontal(pl.col(column).is_not_null() for column in tensors.values())) if tensors else frame.clear()
    if not len(some):
        return
    skew.with_tensors += len(some)
    rows = checker.rows(some)
    logged = {name: some[column].to_list() for name, column in tensors.items()}
    for row in range(len(some)):
        values = {name: column[row] for name, column in logged.items() if column[row] is not None}
        _compare_row(skew, checker, values, _parts(rows, row))


def _parts(rows: Rows, row: int) -> dict[str, Block]:
    """The parts of one row's request, each `(n, width)`: as many rows as behaviours, else one."""
    history = rows.history[row]
    past = rows.behaviours.take(history[: max(1, int((history > 0).sum()))])
    parts = {"user": rows.user.take([row]), "history": past, "ad": rows.ad.take([row])}
    if rows.ages is not None:
        parts[AGES] = Block(np.zeros((len(past), 0), np.int64), rows.ages[row, : len(past), None])
    return parts


def _compare_row(skew: Skew, checker: Checker, logged: Mapping[str, list[float]], parts: Mapping[str, Block]) -> None:
    schema = checker.bundle.schema
    for name, (part, width) in schema.tensors.items():
        if name == AGES:
            ages = np.array(logged[AGES], np.float32)[:, None] if AGES in logged else None
            skew.fields.setdefault("history_ts", FieldSkew()).see("history", ages, parts[AGES].numbers, secret=False)
            continue
        is_ids = name.endswith("_ids")
        ours = parts[part].ids if is_ids else parts[part].numbers
        theirs = np.array(logged.get(name, []), ours.dtype)
        whole = theirs.reshape(-1, width) if len(theirs) and len(theirs) % width == 0 else None
        slots: tuple[Slot, ...] = schema.layouts[part].ids if is_ids else schema.layouts[part].numbers
        for slot in slots:
            path = f"history.{slot.field.name}" if part == "history" else slot.field.path
            seen = skew.fields.setdefault(path, FieldSkew())
            seen.see(part, None if whole is None else whole[:, slot.columns], ours[:, slot.columns], path in SECRET)


def _example(part: str, logged: Array | None, recomputed: Array) -> tuple[str, str]:
    """Both values in short; of a history where it first differs, or how long it is."""
    if logged is None:
        return ABSENT, _text(recomputed[0])
    if len(logged) != len(recomputed):
        return f"behaviours: {len(logged)}", f"behaviours: {len(recomputed)}"
    at = int((logged != recomputed).any(1).argmax())
    where = f"behaviour {at + 1}: " if part == "history" else ""
    return where + _text(logged[at]), where + _text(recomputed[at])


def _text(values: Array) -> str:
    return " ".join(f"{value:g}" if values.dtype.kind == "f" else str(value) for value in values.tolist())


def show(skew: Skew, console: Console) -> None:
    """Tables for people, and what they come to."""
    versions = Table("model", "version", "rows", "compared", "largest difference", f"above {skew.tolerance:g}")
    for (model, version), each in skew.versions.items():
        measured = (f"{each.max_difference:.2g}", f"{each.differ:,}") if each.compared else ("-", "-")
        versions.add_row(model, str(version), f"{each.rows:,}", f"{each.compared:,}", *measured)
    console.print(versions)
    for (model, version), each in skew.versions.items():
        if each.unusable:
            console.print(f"{each.rows:,} rows of {model} {version} were not compared: {each.unusable}", soft_wrap=True, markup=False)
    if skew.fields:
        fields = Table("field", "rows", "differ", "logged", "recomputed", title="encoded values", title_justify="left")
        for path, seen in skew.fields.items():
            fields.add_row(path, f"{seen.rows:,}", f"{seen.differ:,}", seen.logged, seen.recomputed)
        console.print(fields)
    else:
        console.print("no row of these versions has tensors, so that no field was compared; scores alone were")
    console.print("skew found" if skew.found else "no skew")
