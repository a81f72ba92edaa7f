"""Labels that are known before anything happens. Their series are there from the start, at zero.

A series that is not there answers no query, and one that appears with its first increment seems not to have grown: an alert on its
increase would miss what it is for. Knows nothing about prometheus_client.
"""

from collections.abc import Mapping, Sequence
from itertools import product

from features.events import JOINED, TYPES

Labels = Sequence[Sequence[str]]

STAGES = ("parse", "features", "queue", "inference", "post", "explain")
RANKED = ("/rank", "/v1/rank")
FAULTS = ("cut_off", "deadline", "not_ready", "over_limit", "scoring_failed", "unexpected")
"""Outcomes of rankings that are the service's to answer for, not the caller's: the availability objective counts them."""
STORE_FAULTS = ("store_timeout", "store_unreachable", "store_denied", "store_error")
FLUSHES: Labels = [("timer",), ("deadline",), ("full",), ("idle",)]
SHED: Labels = [("over_limit",), ("not_ready",)]
DEGRADED: Labels = [
    *product(["history", "user"], [*STORE_FAULTS, "store_corrupt"]),
    ("user", "stored_feature_mistyped"),
    ("catalogue", "not_loaded"),
    ("catalogue", "ad_mistyped"),
    ("catalogue", "ad_damaged"),
    ("inference", "not_finite"),
    ("events", "state_replaced"),
    ("store", "key_replaced"),
    ("background", "failed"),
]
LOOKUPS: Labels = [*product(["user", "ad"], ["hit", "miss"]), ("user", "error")]
EVENTS: Labels = [
    *product(TYPES, ["accepted", "duplicate", "malformed", "mistyped", "too_old", "in_the_future", "nobody", "contended", *STORE_FAULTS]),
    *product(JOINED, ["backlog"]),
    ("unknown", "malformed"),
]
RELOADS: Labels = [("loaded",), ("refused",), ("dropped",)]
SERVED: Labels = [
    ("written",),
    ("sampled_out",),
    ("caller_left",),
    ("version_named",),
    ("dropped_queue",),
    ("dropped_backlog",),
    ("dropped_memory",),
    ("dropped_store",),
    ("failed",),
]
CHALLENGED: Mapping[str, Sequence[str]] = {"shadow": ("ok", "error", "late", "dropped"), "canary": ("ok", "error", "late", "busy")}
VERDICTS = ("errors", "late", "p99", "p_click")
INCIDENTS = ("trimmed", "stream_lost", "other_log", "disk_full", "unreachable", "field_unknown", "value_unfit", "not_forwarded")
BRIDGE_INCIDENTS = ("kafka_away", "service_away", "not_committed")
OUTCOMES = ("joined", "duplicate", "late", "unknown_request", "not_shown", "other_user", "before_ranking", "no_impression")
JOIN_EVENTS: Labels = [*product(JOINED, OUTCOMES), ("conversion", "deferred")]
SHOWN = ("said", "reported", "assumed", "unknown")


def requests(model: str) -> Labels:
    """Of `adrank_requests_total`, for a model that is loaded, or `none`."""
    return list(product(RANKED, [model], ["ok", *FAULTS]))
