"""The users and ads of a benchmark model: random, from a seed, and the same each time."""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from features.encode import Encoder, Features
from features.schema import IDENTITY, Field, Schema
from features.state import Ad, UserState
from features.vocabulary import FIRST, HashBuckets, Vocabularies, Vocabulary
from service.app import open_store
from service.settings import load_settings

AT_ONCE = 10_000
SECONDS_BETWEEN = 3_600


@dataclass(frozen=True)
class Population:
    """`sizes` says how many values each vocabulary has; every user has a full history of random ads."""

    schema: Schema
    sizes: Mapping[str, int]
    seed: int = 0

    @property
    def user_ids(self) -> list[str]:
        """All users."""
        return [value("user_id", i) for i in range(self.sizes["user_id"])]

    @property
    def ad_ids(self) -> list[str]:
        """All ads."""
        return [value("ad_id", i) for i in range(self.sizes["ad_id"])]

    @property
    def encoder(self) -> Encoder:
        """Of vocabularies that know every value."""
        values: dict[str, Vocabulary | HashBuckets] = {name: HashBuckets(buckets) for name, buckets in self._hashed.items()}
        listed = {name: Vocabulary([value(name, i) for i in range(size)]) for name, size in self.sizes.items() if name not in values}
        return Encoder(self.schema, Vocabularies({**listed, **values}, {}))

    @property
    def heights(self) -> dict[str, int]:
        """Ids in use of each vocabulary, padding and unknown included."""
        return {name: size + FIRST for name, size in {**self.sizes, **self._hashed}.items()}

    @property
    def _hashed(self) -> dict[str, int]:
        return {field.vocabulary: field.buckets for field in self.schema.fields if field.buckets}

    def ads(self) -> Iterator[Ad]:
        """Every ad with its features."""
        yield from map(Ad, self.ad_ids, self._features(self.schema.side("ad"), self.sizes["ad_id"], 1))

    def users(self) -> Iterator[tuple[str, UserState]]:
        """Every user with features and behaviours."""
        random, length, now = np.random.default_rng([self.seed, 3]), self.schema.history_length, int(time.time())
        times = list(range(now - length * SECONDS_BETWEEN, now, SECONDS_BETWEEN))
        fields = self.schema.side("user")
        for user_id, features in zip(self.user_ids, self._features(fields, self.sizes["user_id"], 2), strict=True):
            behaviours = [value("ad_id", i) for i in random.integers(self.sizes["ad_id"], size=length).tolist()]
            yield user_id, UserState(features, behaviours, times)

    def _features(self, fields: Iterable[Field], rows: int, stream: int) -> Iterator[Features]:
        random = np.random.default_rng([self.seed, stream])
        own = [field for field in fields if field.name not in IDENTITY.values()]
        for start in range(0, rows, AT_ONCE):
            count = min(AT_ONCE, rows - start)
            columns = [random.integers(self.sizes[field.vocabulary], size=count).tolist() for field in own]
            for row in range(count):
                yield {field.name: value(field.vocabulary, column[row]) for field, column in zip(own, columns, strict=True)}


def value(vocabulary: str, i: int) -> str:
    """The text of a vocabulary's value `i`."""
    return {"user_id": f"u{i}", "ad_id": f"a{i}"}.get(vocabulary, f"{vocabulary}-{i}")


async def fill(population: Population, redis: str) -> None:
    """Write the users and ads into the store at that URL.

    Raises:
        StoreError: the store does not answer.
    """
    store = open_store(load_settings({"redis": redis}))
    try:
        await store.put_ads(population.ads())
        await store.put_users(population.users())
    finally:
        await store.close()
