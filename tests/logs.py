"""A log folder as docs/log.md says, written by hand from served rankings and clicks. For tests of what reads a log."""

import hashlib
from collections.abc import Container, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from features.encode import Encoder, Features
from features.schema import Schema, Side
from features.served import ServedRecord
from features.state import unpack_features
from features.vocabulary import Vocabularies
from training.datasets.prepared import DTYPES

TYPES: Mapping[str, pl.DataType] = {
    "label": pl.Int8(),
    "user_id": pl.String(),
    "ad_id": pl.String(),
    "ts": pl.Float64(),
    "history": pl.List(pl.String()),
    "request_id": pl.String(),
    "model": pl.String(),
    "version": pl.Int64(),
    "position": pl.Int64(),
    "p_click": pl.Float64(),
    "propensity": pl.Float64(),
    "policy": pl.String(),
    "known": pl.Boolean(),
    "revision": pl.UInt64(),
    "history_revisions": pl.List(pl.UInt64()),
    "history_ts": pl.List(pl.Float64()),
    "conversion": pl.Int8(),
    "value": pl.Float64(),
    "click_ts": pl.Float64(),
    "candidates": pl.List(pl.String()),
    "candidate_revisions": pl.List(pl.UInt64()),
    "candidate_bids": pl.List(pl.Int64()),
    "candidate_bid_types": pl.List(pl.String()),
    "bid": pl.Int64(),
    "bid_type": pl.String(),
    "price": pl.Int64(),
}
KINDS = {np.dtype(np.int64): pl.List(pl.Int64()), np.dtype(np.float32): pl.List(pl.Float32())}


def revision(packed: bytes) -> int:
    """Of an ad's features: never 0."""
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "big") | 1


def write_log(
    folder: Path, served: Sequence[ServedRecord], schema: Schema, clicks: Container[tuple[str, str]] = (), number: int = 0, files: int = 1
) -> Path:
    """Write rankings, in `files` files an hour; `clicks` holds (request_id, ad_id)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "schema.toml").write_text(schema.to_toml(), "utf-8")
    encoder = Encoder(schema, Vocabularies({}, {}))  # it only cleans
    (folder / "ads").mkdir(exist_ok=True)
    _ads(served, encoder).write_parquet(folder / "ads" / f"{number:08}.parquet")
    hours: dict[str, list[ServedRecord]] = {}
    for each in served:
        hours.setdefault(f"{datetime.fromtimestamp(each.ts, UTC):day=%Y-%m-%d/hour=%H}", []).append(each)
    for hour, rankings in hours.items():
        (folder / hour).mkdir(parents=True, exist_ok=True)
        for i in range(min(files, len(rankings))):
            rows = [row for each in rankings[i::files] for row in _rows(each, encoder, clicks)]
            _frame(rows, schema).write_parquet(folder / hour / f"{number + i:08}.parquet")
    return folder


def _ads(served: Sequence[ServedRecord], encoder: Encoder) -> pl.DataFrame:
    types = {"ad_id": pl.String(), "revision": pl.UInt64()} | _field_types(encoder.schema, "ad")
    versions = {(ad_id, revision(packed)): packed for each in served for ad_id, packed in each.ads.items()}
    rows = [
        {"ad_id": ad_id, "revision": number} | _values(encoder, "ad", unpack_features(packed))
        for (ad_id, number), packed in versions.items()
    ]
    return pl.DataFrame(rows, schema=types)


def _rows(served: ServedRecord, encoder: Encoder, clicks: Container[tuple[str, str]]) -> list[dict[str, Any]]:
    revisions = {ad_id: revision(packed) for ad_id, packed in served.ads.items()}
    shared = {
        "user_id": served.user_id,
        "ts": served.ts,
        "history": list(served.history),
        "history_ts": list(map(float, served.history_ts)) or None,
        "history_revisions": [revisions.get(ad_id, 0) for ad_id in served.history],
        "request_id": served.request_id,
        "model": served.model,
        "version": served.version,
        "policy": served.policy,
        **_values(encoder, "user", served.user),
        **_values(encoder, "context", served.context),
    }
    tensors = _tensors(served, encoder)
    rows = []
    for i, ad_id in enumerate(served.ad_ids):
        known = ad_id in served.ads and ad_id not in served.unknown
        stored = unpack_features(served.ads[ad_id]) if known else {}
        clicked = (served.request_id, ad_id) in clicks
        row = {
            **shared,
            "label": int(clicked),
            "ad_id": ad_id,
            "position": (served.positions or range(1, len(served.ad_ids) + 1))[i],
            "p_click": served.p_click[i],
            "propensity": served.propensity[i],
            "known": known,
            "revision": revisions[ad_id] if known else 0,
            "conversion": 0,
            "value": 0.0,
            "click_ts": served.ts + 1 if clicked else None,
            **_values(encoder, "ad", stored),
            **_values(encoder, "ad", served.sent.get(ad_id, {})),
        }
        if not i and served.candidates:
            of_candidates = [0 if ad_id in served.unknown else revisions.get(ad_id, 0) for ad_id in served.candidates]
            row |= {"candidates": list(served.candidates), "candidate_revisions": of_candidates}
            row |= {"candidate_bids": list(served.bids) or None, "candidate_bid_types": list(served.bid_types) or None}
        if served.bids:
            at = list(served.candidates or served.ad_ids).index(ad_id)
            row |= {"bid": served.bids[at], "bid_type": served.bid_types[at], "price": served.prices[i] if served.prices else None}
        row |= {f"tensors.{name}": (array[0, i] if name.startswith("ad_") else array).ravel().tolist() for name, array in tensors.items()}
        rows.append(row)
    return rows


def _values(encoder: Encoder, side: Side, features: Features) -> dict[str, Any]:
    return {f"{side}.{name}": value for name, value in encoder.usable(side, features)[0].items()}


def _tensors(served: ServedRecord, encoder: Encoder) -> dict[str, np.ndarray[Any, Any]]:
    """The tensors of a ranking: `user (1, W)`, `history (1, T, W)`, `ad (1, C, W)`."""
    found = {}
    for name, data in served.tensors.items():
        part, width = encoder.tensors[name]
        rows = np.frombuffer(data, np.int64 if name.endswith("_ids") else np.float32)
        rows = rows.reshape(-1, width) if width else rows
        found[name] = rows if part == "user" else rows[None]
    return found


def _field_types(schema: Schema, side: Side) -> dict[str, pl.DataType]:
    return {field.path: DTYPES[field.kind] for field in schema.side(side) if field.name not in ("user_id", "ad_id")}


def _frame(rows: Sequence[Mapping[str, Any]], schema: Schema) -> pl.DataFrame:
    types = {**TYPES, **_field_types(schema, "user"), **_field_types(schema, "context"), **_field_types(schema, "ad")}
    tensors = {f"tensors.{name}": KINDS[np.dtype(np.int64 if name.endswith("_ids") else np.float32)] for name in schema.tensors}
    return pl.DataFrame([dict.fromkeys([*types, *tensors]) | dict(row) for row in rows], schema={**types, **tensors})
