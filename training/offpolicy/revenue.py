"""What logged ads were paid for, and what a bundle says that they are worth."""

from typing import Any

import numpy as np
import polars as pl

from ..datasets.prepared import DataError

Array = np.ndarray[Any, np.dtype[Any]]
BIDS: dict[str, pl.DataType] = {
    "conversion": pl.Int8(),
    "conversion_maturity": pl.Float64(),
    "bid": pl.Int64(),
    "bid_type": pl.String(),
    "price": pl.Int64(),
    "candidate_bids": pl.List(pl.Int64()),
    "candidate_bid_types": pl.List(pl.String()),
}
"""Columns of logs whose ads bid, in millionths of the currency."""
CONVERSIONS = pl.col("conversion") / pl.col("conversion_maturity").fill_null(1.0)
"""Those that will have come in the end, without bias: each that has stands for as many as it was unlikely to be there yet."""
EVENTS = pl.when(bid_type="cpm").then(1e-3).when(bid_type="cpa").then(CONVERSIONS).otherwise(pl.col("label"))
PAID = pl.when("bidding").then((pl.coalesce("price", "bid") / 1e6 * EVENTS).fill_null(0.0)).alias("paid")
"""What an impression came to, in the currency: the price that was told, or else the bid, for what it is paid for."""
CONVERSION = "p_conversion"


def worth_of(bids: pl.DataFrame, at: Array, heads: dict[str, Array]) -> Array:
    """What an impression of candidates `(R, C)` is worth by a bundle's probabilities; `at` says which of the bids are theirs.

    Raises:
        DataError: ads bid for conversions, which the bundle does not predict.
    """
    bid, kind = np.maximum(bids["bid"].to_numpy(), 0)[at] / 1e6, bids["bid_type"].to_numpy()[at]
    if CONVERSION not in heads and (kind == "cpa").any():
        raise DataError("ads of the log bid for conversions (cpa), which the bundle does not predict; replay one with a head conversion")
    worth: Array = bid * np.select([kind == "cpm", kind == "cpa"], [np.full(at.shape, 1e-3), heads.get(CONVERSION, 0.0)], heads["p_click"])
    return worth
