"""The streams between the service and the log: their names, and what a reader of them promises.

Knows nothing about Redis (`service/store/streams.py`) or about what stands in the entries (`served.py`, `events.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

Stream = Literal["adrank:served", "adrank:events"]
STREAMS: tuple[Stream, ...] = get_args(Stream)
SERVED, EVENTS = STREAMS
FIELD = b"v"
"""The one field of an entry, whose value is a packed record."""
BATCH_BYTES = 8 * 2**20
"""A batch ends with the entry that takes it to so many bytes: rankings that explored are megabytes each."""
FIGURES, FIGURES_BYTES = "adrank:join:figures", 2**19
"""What the joiner tells the console, and at most how large that is."""
TOO_OLD, WRONG_TYPE = "store_too_old", "store_wrong_type"
"""Reasons of a StoreError that waiting does not mend: a server that lacks what is needed, and a key that is no stream."""


class StreamLostError(RuntimeError):
    """The stream or its group is not there, as where Redis was emptied: `begin` makes both anew."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry as it was delivered. Its value is empty where it has none."""

    id: str
    value: bytes

    @property
    def ts(self) -> float:
        """When it was appended, in seconds since 1970, by the clock of Redis."""
        return int(self.id.partition("-")[0]) / 1000


@dataclass(frozen=True, slots=True)
class Batch:
    """Entries in their order, and whether the stream had no more when they were read."""

    entries: Sequence[Entry]
    drained: bool


@dataclass(frozen=True, slots=True)
class Extent:
    """What stands in a stream: how many entries, since when the oldest; and how many were trimmed that nobody has been told of."""

    length: int
    oldest: float | None
    trimmed: int
    now: float
    """The time, by the clock of Redis."""

    @property
    def kept(self) -> float:
        """Up to when all that was appended has been acknowledged, whoever took it."""
        return self.now if self.oldest is None else self.oldest


@dataclass(frozen=True, slots=True)
class Owner:
    """A log that the streams are written into: its id, where it is, and for how many seconds its sinks may be thought to be at work."""

    id: str
    place: str
    seconds: int = 0


class Streams(Protocol):
    """One of several readers that share a group. Every method but `close` raises StoreError where Redis does not answer."""

    @property
    def consumer(self) -> str:
        """What this reader is called: no other is."""

    async def own(self, log: Owner, take_over: bool = False) -> Owner | None:
        """Write into this log for the next `log.seconds` seconds, unless another log's sink is at work; 0 ends it.

        The log that the streams were written into before, None where it is the same or there was none. Where it has `seconds` left and
        they are not to be taken over, nothing has changed.
        """

    async def begin(self, stream: Stream) -> bool:
        """Make the stream and the group where they are not there; whether they had to be made."""

    async def read(self, stream: Stream, count: int) -> Batch:
        """At most `count` new entries and about `BATCH_BYTES`. Does not wait for any.

        Raises:
            StreamLostError: there is no such stream or group.
        """

    async def claim(self, stream: Stream, count: int, idle: float) -> Sequence[Entry]:
        """As many of those that somebody was given `idle` seconds ago or more and has not acknowledged: they are given to this reader.

        Raises:
            StreamLostError: there is no such stream or group.
        """

    async def pending(self, stream: Stream) -> int:
        """How many entries anybody was given and has not acknowledged."""

    async def acknowledge(self, stream: Stream, ids: Sequence[str]) -> None:
        """Take entries out of the stream: they are kept elsewhere."""

    async def extent(self, stream: Stream) -> Extent:
        """What stands in the stream. What was trimmed is told once, to whoever asks first.

        Raises:
            StreamLostError: there is no such stream.
        """

    async def figures(self) -> bytes:
        """What a joiner told the console last; nothing where none did."""

    async def tell(self, figures: bytes) -> None:
        """Tell the console."""

    async def close(self) -> None:
        """Let go of connections."""
