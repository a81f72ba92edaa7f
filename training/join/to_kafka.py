"""Rankings of the streams on their way to a topic of Kafka, as JSON: what others read, beside the log. At least once."""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import orjson
from confluent_kafka import KafkaError, KafkaException, Producer

from features.packing import StateError
from features.served import ServedRecord
from features.state import StoreError, unpack_features
from features.streams import Entry

from .raw import read_served

FLUSH_SECONDS = 10.0
KAFKA_AWAY = "kafka_away"

log = logging.getLogger(__name__)


class KafkaTopic:
    """Sends entries, and says how many Kafka will never take."""

    def __init__(self, kafka: Mapping[str, str], topic: str) -> None:
        """`kafka` has librdkafka's settings."""
        ours = {"acks": "all", "delivery.timeout.ms": int(1000 * FLUSH_SECONDS), "error_cb": lambda error: log.debug("Kafka: %s", error)}
        self._producer, self._topic = Producer({"compression.type": "zstd", **kafka, **ours}), topic

    async def send(self, entries: Sequence[Entry]) -> int:
        """Send rankings; when this returns the brokers have them. How many are too large for them.

        Raises:
            StoreError: Kafka does not answer; some may have been sent, and are sent again.
        """
        failed = list[KafkaError]()
        for entry in entries:
            try:
                record = read_served(entry.value)
            except StateError:
                continue  # the log keeps it aside
            try:
                await self._produce(entry.id, record, failed)
            except KafkaException as error:
                failed.append(error.args[0])
        left = await asyncio.to_thread(self._producer.flush, FLUSH_SECONDS + 1)
        too_large = [error for error in failed if error.code() == KafkaError.MSG_SIZE_TOO_LARGE]
        if left or len(failed) > len(too_large):
            self._producer.purge()
            why = next((error.str() for error in failed if error not in too_large), "no answer")
            raise StoreError(KAFKA_AWAY, f"Kafka does not take rankings into {self._topic}: {why}")
        if too_large:
            log.warning("%d rankings are too large for %s, and stand in the log alone: %s", len(too_large), self._topic, too_large[0])
        return len(too_large)

    async def _produce(self, entry: str, record: ServedRecord, failed: list[KafkaError]) -> None:
        while True:
            try:
                self._producer.produce(
                    self._topic,
                    json_of(entry, record),
                    record.request_id,
                    on_delivery=lambda error, _: failed.append(error) if error else None,
                )
            except BufferError:  # its queue is full: wait for some to be delivered
                await asyncio.to_thread(self._producer.poll, 0.1)
            else:
                return


def json_of(entry: str, record: ServedRecord) -> bytes:
    """A ranking as others read it: `entry` is its own, the same if it comes again. Tensors, which are for our own checks, are left out."""
    values = asdict(record)
    del values["tensors"]
    values["ads"] = {ad_id: _features(packed) for ad_id, packed in record.ads.items()}
    return orjson.dumps({"entry": entry, **values}, str, orjson.OPT_NON_STR_KEYS)


def _features(packed: bytes) -> Mapping[str, Any]:
    try:
        return unpack_features(packed)
    except StateError:
        return {}
