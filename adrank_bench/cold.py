"""How a network does on ads and users that training has rarely seen, or never."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl

from training.datasets.prepared import Prepared
from training.evaluate import auc, log_loss

Groups = np.ndarray[Any, np.dtype[np.int64]]
EDGES = {"0": (0, 0), "1 to 10": (1, 10), "more": (11, 2**62)}
"""Impressions of train, from and to."""


def exposures(data: Prepared, split: str = "test") -> dict[str, Groups]:
    """How many rows of train each row of a split has in common `(N,)`: of its `ad`, and of its `user`.

    Raises:
        DataError: a split cannot be read.
    """
    train, rows = (pl.concat([frame.select("ad_id", "user_id") for frame in data.frames(each)]) for each in ("train", split))
    found = {}
    for side in ("ad", "user"):
        key = f"{side}_id"
        seen = rows.join(train[key].value_counts(name="seen"), on=key, how="left", maintain_order="left")["seen"]
        found[side] = seen.fill_null(0).cast(pl.Int64).to_numpy()
    return found


def by_exposure(exposure: Mapping[str, Groups], labels: np.ndarray[Any, Any], p_click: np.ndarray[Any, Any]) -> list[dict[str, Any]]:
    """AUC and log loss of the rows of each group; of one class only there is no AUC."""
    groups = []
    for side, seen in exposure.items():
        for name, (low, high) in EDGES.items():
            some = (seen >= low) & (seen <= high)
            if some.any():
                area, loss = auc(labels[some], p_click[some]), log_loss(labels[some], p_click[some])
                known = area if np.isfinite(area) else None
                groups.append({"of": side, "seen": name, "rows": int(some.sum()), "auc": known, "log_loss": loss})
    return groups
