"""An example for each route of the OpenAPI document: what is sent, and what comes back. `/docs` has them to try."""

from typing import Any

RANKED: dict[str, Any] = {
    "request_id": "r1",
    "model": {"name": "din", "version": "20261122161036", "schema": "efa81c997e6af5ad"},
    "ads": [
        {"ad_id": "a98", "rank": 1, "p_click": 0.73051786},
        {"ad_id": "a13", "rank": 2, "p_click": 0.5664624},
    ],
    "omitted": [{"ad_id": "a56", "reason": "top_k"}],
    "degraded": [],
    "timings_ms": {"parse": 0.106, "features": 0.362, "queue": 0.107, "inference": 0.626, "total": 1.343},
}
TO_RANK = {"user": {"id": "u378"}, "context": {"slot": "feed"}, "candidates": ["a13", "a98", "a56"], "options": {"top_k": 2}}
BIDDING = {
    "user": {"id": "u378"},
    "candidates": {"ad_id": ["a13", "a98", "a56"], "bid": [0.8, 0.9, 200], "bid_type": ["cpc", "cpc", "cpm"], "multiplier": [1, 0.5, 1]},
    "options": {"objective": "ecpm", "reserve": 100, "prices": True},
}
OF_ALL: dict[str, Any] = {
    "user": {"id": "u378"},
    "candidates": "all",
    "filters": {"category": ["travel", "food"]},
    "options": {"top_k": 2},
}
SOLD = RANKED | {
    "ads": [
        {"ad_id": "a13", "rank": 1, "p_click": 0.5664624, "ecpm": 453.16992, "price": 0.580327},
        {"ad_id": "a98", "rank": 2, "p_click": 0.73051786, "ecpm": 328.733037, "price": 0.273779},
        {"ad_id": "a56", "rank": 3, "p_click": 0.3076662, "ecpm": 200.0, "price": 100.0},
    ],
    "omitted": [],
}
EVENTS = [
    {"type": "impression", "event_id": "e1", "ts": 1764512000, "request_id": "r1", "ad_id": "a98", "position": 1},
    {"type": "click", "event_id": "e2", "ts": 1764512007, "user_id": "u378", "ad_id": "a98", "request_id": "r1"},
    {"type": "conversion", "event_id": "e3", "ts": 1764512900, "request_id": "r1", "ad_id": "a98", "value": 19.9},
    {"type": "user", "event_id": "e4", "ts": 1764513000, "user_id": "u378", "features": {"age": "25"}},
    {"type": "ad", "event_id": "e5", "ts": 1764513000, "ad_id": "a56", "active": True},
]
TOLD = {"request_id": "0b9f", "events": [{"event_id": each["event_id"], "status": "accepted"} for each in EVENTS]}
MODEL = {
    **RANKED["model"],
    "default": True,
    "provider": "CPUExecutionProvider",
    "precision": "float32",
    "loaded": 1795363862.4,
    "challenger": None,
}
READY = {
    "status": "ready",
    "reasons": [],
    "store": {"kind": "redis", "status": "up"},
    "served_log": {"status": "open", "detail": None},
    "models": {"default": "din", "loaded": ["din"], "refused": {}, "notice": None},
    "catalogue": {"loaded": True, "ads": 400, "lag_seconds": 0.02, "reason": None, "detail": None},
}
FIELD = {"name": "age", "side": "user", "kind": "category", "vocabulary": "age", "missing": "padding"}
EXAMPLES: dict[str, tuple[Any, Any]] = {
    "/rank": (TO_RANK, RANKED),
    "/v1/rank": (BIDDING, SOLD),
    "/v1/events": ({"events": EVENTS}, TOLD),
    "/livez": (None, {"status": "alive"}),
    "/readyz": (None, READY),
    "/metrics": (None, '# TYPE adrank_requests_total counter\nadrank_requests_total{model="din",outcome="ok"} 42.0\n'),
    "/v1/models": (None, {"models": [MODEL], "default": "din", "notice": None, "refused": {}}),
    "/v1/schema": (None, {"schemas": {"efa81c997e6af5ad": {"models": ["din"], "name": "world", "fields": [FIELD]}}}),
}
"""By path: the body that is sent, None where there is none, and the answer when all is well."""
