"""What to ask a service: users and ads drawn from its store, and the bodies of requests with them."""

import asyncio
import json
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass

import numpy as np

from features.state import StoreError
from service.settings import Settings
from service.store.redis import RedisStore

from .load import LoadError

FORMS = ("ids", "columns", "rows")
USERS = 10_000
ADS = 50_000
BODIES = 2_000
BYTES = 64 * 2**20
"""Of all bodies together: there are fewer where they are large."""


@dataclass(frozen=True)
class Entities:
    """Users and ads that a store has, or a share of them where it has very many."""

    user_ids: Sequence[str]
    ad_ids: Sequence[str]


def draw(settings: Settings, candidates: int) -> Entities:
    """Entities of the store that the settings name.

    Raises:
        StoreError: the store does not answer.
        LoadError: it has no users, or fewer ads than a request is to have candidates.
    """
    if settings.redis.startswith("memory:"):
        raise LoadError("users and ads are drawn from Redis, and memory:// is none: name the service's store with --redis")
    entities = asyncio.run(_drawn(settings, max(ADS, candidates)))
    if not entities.user_ids or not entities.ad_ids:
        what = "ads" if entities.user_ids else "users"
        raise LoadError(f"the store {settings.store_name} has no {what}: fill it with adrank load, or name another with --redis")
    if candidates > len(entities.ad_ids):
        raise LoadError(f"the store {settings.store_name} has {len(entities.ad_ids):,} ads, fewer than {candidates:,} candidates")
    return entities


async def _drawn(settings: Settings, most: int) -> Entities:
    store, found = RedisStore(settings.redis, timeout=5, ttl=1, on_damaged=lambda: None), set[str]()
    try:
        user_ids = await store.user_ids(USERS)
        async with aclosing(store.all_ads()) as batches:  # type: ignore[type-var]  # a generator in fact
            async for batch in batches:
                found.update(ad.ad_id for ad in batch if ad.active)
                if len(found) >= most:
                    break
    except StoreError as error:
        raise StoreError(error.reason, f"the store {settings.store_name} cannot be read: {error}") from error
    finally:
        await store.close()
    return Entities(user_ids, sorted(found))


def bodies(entities: Entities, candidates: int, form: str = "ids", seed: int = 0) -> list[bytes]:
    """JSON bodies of random requests of `candidates` different ads, in one of `FORMS`."""
    random, made, size = np.random.default_rng(seed), list[bytes](), 0
    while len(made) < BODIES and size < BYTES:
        user_id = entities.user_ids[int(random.integers(len(entities.user_ids)))]
        rows = random.choice(len(entities.ad_ids), candidates, replace=False, shuffle=False).tolist()
        document = {"user": {"id": user_id}, "candidates": _in_form([entities.ad_ids[row] for row in rows], form)}
        made.append(json.dumps(document, separators=(",", ":")).encode())
        size += len(made[-1])
    return made


def _in_form(ad_ids: list[str], form: str) -> object:
    return {"ids": ad_ids, "columns": {"ad_id": ad_ids}, "rows": [{"ad_id": ad_id} for ad_id in ad_ids]}[form]
