"""What a model makes of an ad whoever is asking, such as its share of the first layer: computed when an ad is first ranked, then kept.

For the rows of a table of encoded ads, and again where a row has changed since. Knows nothing about requests or ONNX.
"""

from collections.abc import Callable

import numpy as np

from features.bundle import AD_ROWS
from features.encode import AdTable, Feeds
from features.vocabulary import Ids


class AdSide:
    """The values of one model, for the table that was asked for last: the catalogue of the moment."""

    def __init__(self, compute: Callable[[Feeds], Feeds], most_bytes: int) -> None:
        """`compute` makes of the tensors of ads `(1, C, W)` their values `(C, ...)`; nothing is kept where that takes more bytes."""
        self._compute, self._most = compute, most_bytes
        self._table: AdTable | None = None
        self._kept: Feeds = {}
        self._revisions = self._places = np.zeros(0, np.int64)
        self._used = 0

    def of(self, table: AdTable, rows: Ids) -> Feeds:
        """The values of many ads, and as `AD_ROWS (1, C)` where those of some rows `(C,)` of the table are; nothing where none are kept.

        Values that were given stay: those of an ad that changed are written elsewhere.
        """
        if table is not self._table or table.room != len(self._revisions):
            self._begin(table)
        if not self._kept:
            return {}
        old = (self._revisions.take(rows) != table.revisions(rows)).nonzero()[0]
        if len(old):
            stale = np.unique(rows.take(old))
            if self._used + len(stale) > table.room:  # ads have changed as often as there are ads
                self._begin(table)
                return self.of(table, rows)
            self._fill(table, stale)
        return {**self._kept, AD_ROWS: self._places.take(rows)[None]}

    def _fill(self, table: AdTable, rows: Ids) -> None:
        places = slice(self._used, self._used + len(rows))
        for name, values in self._compute(table.feeds(rows)).items():
            self._kept[name][places] = values
        self._places[rows], self._revisions[rows] = np.arange(places.start, places.stop), table.revisions(rows)
        self._used = places.stop

    def _begin(self, table: AdTable) -> None:
        """Keep what is made of this table from now on. Memory that is all zeros is taken from the system when it is written."""
        shapes = {name: (table.room, *values.shape[1:]) for name, values in self._compute(table.feeds(np.zeros(1, np.int64))).items()}
        fits = sum(4 * int(np.prod(shape)) for shape in shapes.values()) <= self._most
        self._table, self._used = table, 0
        self._revisions, self._places = np.zeros(table.room, np.int64), np.zeros(table.room, np.int64)
        self._kept = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()} if fits else {}
