"""The streams between the service and the joiner: their names, and what a reader of them promises.

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
TOO_OLD, WRONG_TYPE = "store_too_old", "store_wrong_type"
"""Reasons of a StoreError that waiting does not mend: a server that lacks what is needed, and a key that is no stream."""


class StreamLostError(RuntimeError):
    """The stream or its group is not there, as where Redis was emptied: `begin` makes both anew."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry as it was delivered. Its value is None where it was trimmed after an earlier delivery, empty where it has none."""

    id: str
    value: bytes | None

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
    """How many entries a stream has ever had, how many stand in it, and when the oldest of these was appended."""

    added: int
    length: int
    oldest: float | None


@dataclass(frozen=True, slots=True)
class Owner:
    """A log that the streams are joined into: its id, where it is, and for how many seconds its joiner may be thought to be at work."""

    id: str
    place: str
    seconds: int = 0


class Streams(Protocol):
    """A reader of streams that takes each entry once. Every method but `close` raises StoreError where Redis does not answer."""

    async def own(self, log: Owner, take_over: bool = False) -> Owner | None:
        """Join into this log for the next `log.seconds` seconds, unless another log's joiner is at work; 0 ends it.

        The log that the streams were joined into before, None where it is the same or there was none. Where it has `seconds` left and
        they are not to be taken over, nothing has changed.
        """

    async def begin(self, stream: Stream) -> bool:
        """Make the stream and the group where they are not there; whether they had to be made."""

    async def read(self, stream: Stream, count: int) -> Batch:
        """At most `count` entries and about `BATCH_BYTES`: first those delivered before and never acknowledged, then new ones.

        Does not wait for any.

        Raises:
            StreamLostError: there is no such stream or group.
        """

    async def acknowledge(self, stream: Stream, ids: Sequence[str]) -> None:
        """Take entries out of the stream: they are kept elsewhere."""

    def rewind(self, stream: Stream) -> None:
        """Read what was delivered and not acknowledged again: it could not be kept."""

    async def extent(self, stream: Stream) -> Extent:
        """What the stream has and had.

        Raises:
            StreamLostError: there is no such stream.
        """

    async def close(self) -> None:
        """Let go of connections."""
