"""What every peer serves: the row-wise graph of a benchmark model, and what a competent team writes around it whichever server it takes.

Ads are held encoded in numpy, the user's state is one GET, and the request is repeated for each candidate. It answers with the same scores
as adrank. Imports nothing that a peer's environment of its own would not have: see `make bench-peers`.
"""

import asyncio
import os
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime
from msgspec import msgpack

from features.bundle import load_bundle
from features.encode import Encoder, Feeds
from service.store.redis import RedisStore, user_key

BUNDLE, ROWWISE, REDIS = "PEER_BUNDLE", "PEER_ROWWISE", "PEER_REDIS"
"""How the processes of a peer are told what to serve."""
HOST = "127.0.0.1"


class PeerAds:
    """The catalogue, encoded; row 0 is no ad."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder, self._rows = encoder, dict[str, int]()
        self.ids = np.zeros((1, encoder.layouts["ad"].width), np.int64)

    async def load(self, redis: str) -> None:
        """Read all of it."""
        store = RedisStore(redis, timeout=5, ttl=1, on_damaged=lambda: None)
        found = {ad.ad_id: ad.features async for batch in store.all_ads() for ad in batch}
        await store.close()
        names = [field.name for field in self._encoder.schema.side("ad") if field.name != "ad_id"]
        columns: dict[str, Any] = {name: [features.get(name) for features in found.values()] for name in names}
        self.ids = np.vstack([self.ids, self._encoder.encode("ad", {"ad_id": list(found), **columns}, len(found)).ids])
        self._rows = {ad_id: row for row, ad_id in enumerate(found, 1)}

    def take(self, ad_ids: list[str]) -> np.ndarray[Any, Any]:
        """Encoded ads `(n, W)`."""
        rows = self._rows
        return self.ids[[rows.get(ad_id, 0) for ad_id in ad_ids]]


class PeerModel:
    """The row-wise graph and what it needs to be asked."""

    def __init__(self, bundle: Path, rowwise: Path) -> None:
        loaded = load_bundle(bundle)
        self.name, self.encoder = loaded.name, loaded.encoder
        schema = loaded.schema
        self._fields = [(field.name, self.encoder.vocabularies.categories[field.vocabulary]) for field in schema.side("user")]
        self._length, self._history = schema.history_length, self.encoder.history_ids
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(rowwise, options, providers=["CPUExecutionProvider"])

    def feeds(self, ads: PeerAds, user_id: str, packed: Any, candidates: list[str]) -> Feeds:
        """Tensors of a request, one row a candidate; `packed` is the user's state as the store has it."""
        _, _, features, behaviours, *_ = msgpack.decode(packed) if packed else (0, 0, {}, [], [])
        known = {"user_id": user_id, **features}
        user = np.array([[int(vocabulary.encode([known.get(name)])[0]) for name, vocabulary in self._fields]])
        feeds = {"user_ids": np.repeat(user, len(candidates), axis=0), "ad_ids": ads.take(candidates)}
        if self._length:
            history = ads.take(behaviours[-self._length :])[:, self._history] if behaviours else np.zeros((1, len(self._history)), np.int64)
            feeds["history_ids"] = np.repeat(history[None], len(candidates), axis=0)
        return feeds

    def score(self, feeds: Feeds) -> np.ndarray[Any, np.dtype[np.float32]]:
        """p(click) `(C,)`."""
        scores: np.ndarray[Any, np.dtype[np.float32]] = self._session.run(None, feeds)[0]
        return scores

    def answer(self, ads: PeerAds, user_id: str, packed: Any, candidates: list[str]) -> dict[str, Any]:
        """The whole ranking, as JSON has it."""
        scores = self.score(self.feeds(ads, user_id, packed, candidates))
        order, values = np.argsort(-scores, kind="stable").tolist(), scores.tolist()
        ranked = [{"ad_id": candidates[row], "rank": rank, "p_click": values[row]} for rank, row in enumerate(order, 1)]
        return {"request_id": uuid.uuid4().hex, "model": self.name, "ads": ranked}


def loaded() -> tuple[PeerModel, PeerAds]:
    """The model and the catalogue that the environment names."""
    model = PeerModel(Path(os.environ[BUNDLE]), Path(os.environ[ROWWISE]))
    ads = PeerAds(model.encoder)
    with ThreadPoolExecutor(1) as apart:  # some servers have an event loop by now
        apart.submit(asyncio.run, ads.load(os.environ[REDIS])).result()
    return model, ads


def key_of(user_id: str) -> str:
    """Where the store keeps a user's state."""
    return user_key(user_id)


def command(serve: Callable[[int, int], None]) -> click.Command:
    """The command line of a peer, which is to `serve` at a port with so many workers."""

    @click.command()
    @click.option("--bundle", type=click.Path(exists=True, path_type=Path), required=True)
    @click.option("--rowwise", type=click.Path(exists=True, path_type=Path), required=True)
    @click.option("--redis", required=True)
    @click.option("--port", type=int, required=True)
    @click.option("--workers", type=int, default=2, show_default=True)
    def main(bundle: Path, rowwise: Path, redis: str, port: int, workers: int) -> None:
        """Serve."""
        os.environ.update({BUNDLE: str(bundle.absolute()), ROWWISE: str(rowwise.absolute()), REDIS: redis})
        serve(port, workers)

    return main
