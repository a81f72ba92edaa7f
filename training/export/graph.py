"""A published bundle on encoded rows: what one of its graphs gives in ONNX Runtime. Knows nothing about logs."""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as states

from features.bundle import MODEL, Bundle, BundleError, Contents
from features.encode import Block, Feeds
from features.graph_file import GraphFileError, graph_facts
from features.schema import AGES, Schema

from ..datasets.encoded import Rows
from ..evaluate import check_finite
from ..tables import Table
from .onnx import tables_of

Array = np.ndarray[Any, np.dtype[Any]]
REQUESTS, PAIRS = 128, 8192
"""Requests, and ads of them all, that are scored at once; a served graph holds a matrix for each behaviour of each request."""


# ONNX Runtime's exceptions share no base below Exception.
FAILURES: tuple[type[Exception], ...] = (
    RuntimeError,
    *(kind for kind in vars(states).values() if isinstance(kind, type) and issubclass(kind, Exception)),
)


def open_graph(graph: Contents | Path, what: str = "the bundle") -> onnxruntime.InferenceSession:
    """A session of ONNX Runtime on the CPU, with a graph as it was exported, whose large tables are to outlive it, or with a file.

    Raises:
        BundleError: it takes no such graph; if that is since it is too old, which one does.
    """
    try:
        if not isinstance(graph, Path) and (tables := tables_of(graph)):
            return _open_with(graph, tables)
        return onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    except FAILURES as error:
        try:
            too_new = graph_facts(graph.read_bytes() if isinstance(graph, Path) else graph).refusal(onnxruntime.__version__)
        except GraphFileError as not_one:
            too_new = str(not_one)
        raise BundleError(f"{what} cannot be scored with: {too_new or error}") from error


def _open_with(graph: Contents, tables: Mapping[str, tuple[str, Table]]) -> onnxruntime.InferenceSession:
    """A session that has the tables where they are in memory: their files are only looked for."""
    options = onnxruntime.SessionOptions()
    held = {name: onnxruntime.OrtValue.ortvalue_from_numpy(table) for name, (_, table) in tables.items()}  # the options only point to them
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / MODEL
        path.write_bytes(graph)
        for name, (file, _) in tables.items():
            path.with_name(file).touch()
            options.add_initializer(name, held[name])
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class Graph:
    """Scores with a graph of a bundle, on the CPU."""

    def __init__(self, bundle: Bundle, file: str = MODEL) -> None:
        """Load one of the bundle's graphs, by its file's name.

        Raises:
            BundleError: ONNX Runtime does not take it.
        """
        self.schema: Schema = bundle.schema
        self._session = open_graph(bundle.path / file, f"bundle {bundle.path}")

    @property
    def heads(self) -> list[str]:
        """The names of its outputs."""
        return [entry.name for entry in self._session.get_outputs()]

    def p_click(self, rows: Rows, ads: Block | None = None, head: str = "p_click") -> Array:
        """The probabilities `(N,)` float32 of the rows' own ads, or those `(N, C)` of `ads (N, C, ...)` for each of the rows.

        `head` names another output.
        """
        step = REQUESTS if ads is None else max(1, min(REQUESTS, PAIRS // ads.ids.shape[1]))
        (scores,) = outputs(self._session, [head], (feeds_of(self.schema, rows, some, ads) for some in chunks(np.arange(len(rows)), step)))
        return scores[:, 0] if ads is None else scores

    def by_head(self, rows: Rows) -> dict[str, Array]:
        """The probabilities `(N,)` float32 of the rows' own ads, of each head that the graph has."""
        return by_head(self._session, self.schema, rows, chunks(np.arange(len(rows))))


def by_head(session: onnxruntime.InferenceSession, schema: Schema, rows: Rows, parts: Iterable[Array]) -> dict[str, Array]:
    """The probabilities `(N,)` float32 of the rows' own ads, of each head that a graph has, some rows at a time.

    Raises:
        DataError: one is no finite number.
    """
    names = [output.name for output in session.get_outputs() if output.name.startswith("p_")]
    found = outputs(session, names, (feeds_of(schema, rows, some) for some in parts))
    return {name.removeprefix("p_"): p[:, 0] for name, p in zip(names, found, strict=True)}


def outputs(session: onnxruntime.InferenceSession, names: Sequence[str], feeds: Iterable[Feeds]) -> list[Array]:
    """Outputs of a graph for the rows of some feeds, one after the other.

    Raises:
        DataError: a probability is no finite number: measured with it, the whole would be none, or be wrong.
    """
    found = [np.concatenate(parts) for parts in zip(*(session.run(names, each) for each in feeds), strict=True)]
    check_finite(*found)
    return found


def chunks(rows: Array, step: int = REQUESTS) -> list[Array]:
    """Numbers of rows, so many at a time."""
    return np.array_split(rows, range(step, len(rows), step))


def feeds_of(schema: Schema, rows: Rows, some: Array, ads: Block | None = None) -> Feeds:
    """The tensors of some rows: requests of their own ad, or of `ads (N, C, ...)`."""
    rows, at = rows.take(some), np.arange(len(some))
    longest = max(1, int((rows.history > 0).sum(1).max(initial=0)))
    own = rows.ad.take(at[:, None]) if ads is None else ads.take(some)
    ages = {} if rows.ages is None else {AGES: np.ascontiguousarray(rows.ages[:, :longest])}
    blocks = {"user": rows.user.take(at), "history": rows.behaviours.take(rows.history[:, :longest]), "ad": own}
    return {
        name: np.ascontiguousarray(blocks[part].ids if name.endswith("_ids") else blocks[part].numbers)
        for name, (part, width) in schema.tensors.items()
        if width
    } | ages
