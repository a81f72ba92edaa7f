"""How long ago a user's behaviours were: the one rule, for the service, for training and for what compares them.

A request's time counts in whole seconds, as the log keeps it. A behaviour of unknown time counts as one of 1970, which is older than
all others, so that what is unknown is told from what is new; one that seems later than the request has the age 0.
"""

from typing import Any

import numpy as np

from .vocabulary import Numbers

UNKNOWN_TIME = 0.0
"""In seconds since 1970."""


def ages_of(now: Any, ts: Any) -> Numbers:
    """Ages in seconds, float32, of behaviours at `ts`, seen at `now`: times in seconds since 1970, of shapes that broadcast."""
    times = np.asarray(ts, np.float64)
    times = np.where(np.isfinite(times), times, UNKNOWN_TIME)
    ages: Numbers = np.maximum(np.floor(now) - times, 0.0).astype(np.float32)
    return ages
