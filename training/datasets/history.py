"""Histories built from a log's own past: the ads that the same user clicked before a row.

Knows nothing about splits or features; rows are counted in the log's order of time.
"""

import numpy as np
import polars as pl

from features.vocabulary import Ids

from .prepared import pieces


class Past:
    """The clicks of a log by user and time, for looking up which ones came before a row. A user "" is nobody and has no past."""

    def __init__(self, log: pl.DataFrame, length: int, before: Ids | None = None) -> None:
        """`log` holds label, user_id, ad_id and perhaps ts, in order of time; `length` is the most behaviours kept.

        `before (n,)` is the row at which each row's past ends; left out, that is the row itself.
        """
        self._log, self._length = log, length
        self._users = log["user_id"].rank("dense").to_numpy().astype(np.int64)
        self._before = np.arange(len(log)) if before is None else before
        self._stride = len(log) + 1
        clicks = np.flatnonzero(((log["label"] == 1) & (log["user_id"] != "")).to_numpy())
        keys = self._users[clicks] * self._stride + clicks
        order = np.argsort(keys, kind="stable")
        self._keys = keys[order]
        self._clicks = np.append(clicks[order], 0)  # never empty, so that padding has a row to point at

    def histories(self, rows: Ids | slice) -> pl.Series:
        """The ads of the rows' pasts, oldest first, as List(String)."""
        return self._lists("ad_id", *self._behaviours(self._users[rows], self._before[rows]))

    def columns(self, rows: Ids | slice) -> dict[str, pl.Series]:
        """The columns of the rows' pasts: `history` and, if the log has times, `history_ts`, when each behaviour was."""
        past = self._behaviours(self._users[rows], self._before[rows])
        times = {"history_ts": self._lists("ts", *past)} if "ts" in self._log.columns else {}
        return {"history": self._lists("ad_id", *past), **times}

    def after(self) -> pl.DataFrame:
        """Each user's history after the whole log, with times if the log has them: the table `histories.parquet`."""
        last = self._log.select("user_id").with_row_index("row").unique("user_id", keep="last").filter(pl.col("user_id") != "").sort("row")
        parts = [self._after(last[piece.start : piece.stop]) for piece in pieces(range(len(last)))]
        return pl.concat(parts) if parts else self._after(last)

    def _after(self, last: pl.DataFrame) -> pl.DataFrame:
        past = self._behaviours(self._users[last["row"].to_numpy()], np.full(len(last), len(self._log)))
        table = last.select("user_id").with_columns(history=self._lists("ad_id", *past))
        return table.with_columns(history_ts=self._lists("ts", *past)) if "ts" in self._log.columns else table

    def _behaviours(self, users: Ids, before: Ids) -> tuple[Ids, Ids]:
        """Rows of the clicks of `users (k,)` before the rows `before (k,)`: `(k, length)`, right-aligned, and how many count `(k,)`."""
        stop = np.searchsorted(self._keys, users * self._stride + before)
        count = np.minimum(stop - np.searchsorted(self._keys, users * self._stride), self._length)
        return self._clicks[np.maximum(stop[:, None] - self._length + np.arange(self._length), 0)], count

    def _lists(self, column: str, clicks: Ids, count: Ids) -> pl.Series:
        padded = self._log[column].gather(clicks.ravel()).reshape(clicks.shape).arr.to_list().alias("past")
        return padded.to_frame().with_columns(count=pl.Series(count)).select(pl.col("past").list.tail(pl.col("count")))["past"]
