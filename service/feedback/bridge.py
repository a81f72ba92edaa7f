"""Events from topics of Kafka into a service, over `POST /v1/events`: at least once, so that by their ids each is done once.

Offsets are committed after the service has said what became of the events, and after those that it will never take stand in the topic of
dead letters. A service or a Kafka that is away is waited for. Knows nothing about what is in an event: the service judges it.
"""

import logging
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import httpx
import orjson
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition
from httpx_retries import Retry

from adrank_client import Adrank, Event, RefusedError
from features.errors import AdrankError

READ, POLL_SECONDS = 500, 0.5
"""Events of a batch, and how long one waits for more."""
HTTP_SECONDS = FLUSH_SECONDS = 30.0
RETRY_SECONDS = (0.1, 0.5, 1.0, 2.0, 5.0)
WHOLE = (400, 413, 422)
"""Statuses of a batch that is refused as a whole, for what is in it or for its size: its halves may be taken."""
KAFKA, SERVICE, NOT_COMMITTED = "kafka_away", "service_away", "not_committed"

log = logging.getLogger(__name__)


class AwayError(AdrankError, RuntimeError):
    """The service or Kafka did not do its part: what was not done is to be tried again."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


class Verdict(NamedTuple):
    """What became of an event: accepted, duplicate or rejected, and of the last why."""

    status: str
    reason: str = ""
    detail: str = ""


NOT_JSON = Verdict("rejected", "not_json", "not an object of JSON")


class BridgeWatch(Protocol):
    """Who is told what the bridge does."""

    def events(self, outcome: str, count: int) -> None:
        """Events ended so: `accepted`, `duplicate`, or why they were rejected."""

    def incident(self, kind: str) -> None:
        """Something happened that should not."""


class EventsService:
    """Where events go: asked once at a time, since whoever moves them keeps what was not taken, and must not be held up for long."""

    def __init__(self, url: str, token: str = "") -> None:
        if not url.startswith(("http://", "https://")):
            raise AwayError(SERVICE, f"{url} is no address of a service, such as http://127.0.0.1:8000")
        self._url, self._service = url, Adrank(url, token or None, HTTP_SECONDS, telling=Retry(total=0))

    def judged(self, events: Sequence[Event]) -> list[Verdict]:
        """What became of each event.

        Raises:
            AwayError: the service does not answer, or not now.
        """
        try:
            return [Verdict(each["status"], each.get("reason") or "", each.get("detail") or "") for each in self._service.tell(events)]
        except RefusedError as error:
            if error.status not in WHOLE:
                raise AwayError(SERVICE, f"the service at {self._url} answers {error}") from error
            if len(events) == 1:
                return [Verdict("rejected", f"http_{error.status}", str(error))]
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:  # the last: it is no service of ours
            raise AwayError(SERVICE, f"the service at {self._url} does not answer: {error or type(error).__name__}") from error
        half = len(events) // 2
        return self.judged(events[:half]) + self.judged(events[half:])


class Bridge:
    """Moves events until it is stopped."""

    def __init__(self, kafka: Mapping[str, str], topics: Sequence[str], service: EventsService, watch: BridgeWatch, dead: str = "") -> None:
        """`kafka` has librdkafka's settings of a consumer; events that are never taken go to the topic `dead`, or are told of and left."""
        self._service, self._watch, self._dead, self._topics = service, watch, dead, topics
        ours = {"enable.auto.commit": False, "auto.offset.reset": "earliest", "error_cb": self._said}
        self._consumer = Consumer({**kafka, **ours})
        of_groups = ("group.", "session.", "heartbeat.", "max.poll.", "fetch.", "partition.")
        self._producer = Producer({name: value for name, value in kafka.items() if not name.startswith(of_groups)} | {"acks": "all"})
        self._held: list[Message] = []
        self._away = ""
        """What is waited for, said once."""
        self.counts: Counter[str] = Counter()

    def run(self, stop: threading.Event) -> None:
        """Move events until `stop` is set; what was taken by then is finished, if that can be done at once."""
        self._consumer.subscribe(list(self._topics))
        tries = 0
        try:
            while not stop.is_set():
                try:
                    self._held = self._held or self._take()
                    self._finish()
                    tries = 0
                except AwayError as error:
                    self._tell(error.kind, str(error))
                    self._wait(stop, RETRY_SECONDS[min(tries, len(RETRY_SECONDS) - 1)])
                    tries += 1
        finally:
            self._consumer.close()

    def _take(self) -> list[Message]:
        messages = self._consumer.consume(READ, POLL_SECONDS)
        for error in filter(None, (message.error() for message in messages)):
            if error.fatal():
                raise KafkaException(error)
            self._said(error)
        return [message for message in messages if not message.error()]

    def _finish(self) -> None:
        """Have what is held done, and commit it."""
        if not self._held:
            return
        objects = [_object(message.value()) for message in self._held]
        judged = iter(self._service.judged([each for each in objects if each is not None]))
        verdicts = [NOT_JSON if each is None else next(judged) for each in objects]
        self._bury([pair for pair in zip(self._held, verdicts, strict=True) if pair[1].status == "rejected"])
        for outcome, count in Counter(verdict.reason if verdict.status == "rejected" else verdict.status for verdict in verdicts).items():
            self._watch.events(outcome, count)
            self.counts[outcome] += count
        ends = {(message.topic(), message.partition()): message.offset() + 1 for message in self._held}
        self._held = []
        if self._away:
            self._consumer.resume(self._consumer.assignment())
            log.info("going on")
            self._away = ""
        try:
            self._consumer.commit(offsets=[TopicPartition(*place, end) for place, end in ends.items()], asynchronous=False)
        except KafkaException as error:  # as after a rebalance: whoever has the partitions now is given them again, and ids are known
            self._watch.incident(NOT_COMMITTED)
            log.warning("what the service took could not be committed, and may be sent to it again: %s", error)

    def _bury(self, bad: Sequence[tuple[Message, Verdict]]) -> None:
        """Put what is never taken where somebody may look at it."""
        if not bad:
            return
        message, verdict = bad[0]
        place = f"{message.topic()}, partition {message.partition()}, offset {message.offset()}"
        log.warning("%d events were rejected, the first at %s: %s: %s", len(bad), place, verdict.reason, verdict.detail)
        if not self._dead:
            return
        failed: list[KafkaError] = []
        for message, verdict in bad:
            place = f"{message.topic()}/{message.partition()}/{message.offset()}"
            headers = [("reason", verdict.reason), ("detail", verdict.detail), ("from", place)]
            told = {"headers": headers, "on_delivery": lambda error, _: failed.append(error) if error else None}
            self._producer.produce(self._dead, message.value(), message.key(), **told)
        if self._producer.flush(FLUSH_SECONDS) or failed:
            self._producer.purge()
            raise AwayError(KAFKA, f"Kafka does not take dead letters into {self._dead}: {failed[0] if failed else 'no answer'}")

    def _wait(self, stop: threading.Event, seconds: float) -> None:
        """Stay a member of the group meanwhile, without being given more."""
        if self._held:
            self._consumer.pause(self._consumer.assignment())
            if (message := self._consumer.poll(0)) is not None and not message.error():
                self._held.append(message)
        stop.wait(seconds)

    def _said(self, error: KafkaError) -> None:
        if error.code() != KafkaError._PARTITION_EOF:
            self._tell(KAFKA, f"Kafka: {error.str()}")

    def _tell(self, kind: str, what: str) -> None:
        self._watch.incident(kind)
        if self._away != kind:
            log.warning("waiting: %s", what)
        self._away = kind


def _object(value: bytes | None) -> Event | None:
    try:
        found = orjson.loads(value or b"")
    except orjson.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None
