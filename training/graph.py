"""A published bundle on encoded rows: what one of its graphs gives in ONNX Runtime. Knows nothing about logs."""

from typing import Any

import numpy as np
import onnxruntime

from features.bundle import MODEL, Bundle
from features.encode import Block, Feeds
from features.schema import Schema

from .datasets.encoded import Rows

Array = np.ndarray[Any, np.dtype[Any]]
REQUESTS, PAIRS = 128, 8192
"""Requests, and ads of them all, that are scored at once; a served graph holds a matrix for each behaviour of each request."""


class Graph:
    """Scores with a graph of a bundle, on the CPU."""

    def __init__(self, bundle: Bundle, file: str = MODEL) -> None:
        """Load one of the bundle's graphs, by its file's name."""
        self.schema: Schema = bundle.schema
        self._session = onnxruntime.InferenceSession((bundle.path / file).read_bytes(), providers=["CPUExecutionProvider"])

    def p_click(self, rows: Rows, ads: Block | None = None) -> Array:
        """The probabilities `(N,)` float32 of the rows' own ads, or those `(N, C)` of `ads (N, C, ...)` for each of the rows."""
        some = rows.ad.take(np.arange(len(rows))[:, None]) if ads is None else ads
        step = max(1, min(REQUESTS, PAIRS // some.ids.shape[1]))
        chunks = np.array_split(np.arange(len(rows)), range(step, len(rows), step))
        scores: Array = np.concatenate([self._session.run(None, self._feeds(rows, some, chunk))[0] for chunk in chunks])
        return scores[:, 0] if ads is None else scores

    def _feeds(self, rows: Rows, ads: Block, chunk: Array) -> Feeds:
        longest = max(1, int((rows.history[chunk] > 0).sum(1).max(initial=0)))
        blocks = {"user": rows.user.take(chunk), "history": rows.behaviours.take(rows.history[chunk][:, :longest]), "ad": ads.take(chunk)}
        return {
            name: np.ascontiguousarray(blocks[part].ids if name.endswith("_ids") else blocks[part].numbers)
            for name, (part, _) in self.schema.tensors.items()
        }
