"""Bodies of requests: of what type and coding, how large, how fast. Knows nothing of what they say."""

import asyncio
import zlib
from typing import NamedTuple

from starlette.types import Receive, Scope

from .. import errors
from ..serving.shares import Shares
from ..settings import Settings

OF_THE_BODY = (b"content-type", b"content-encoding", b"content-length")
GZIP = 16 + zlib.MAX_WBITS
MEMBERS = 16
"""Parts of a gzip file that are read: each copies what follows it."""


class Body(NamedTuple):
    """A body as it was sent."""

    data: bytes
    zipped: bool

    def text(self, limit: int) -> bytes:
        """The body as it was meant, of at most `limit` bytes.

        Raises:
            DamagedBodyError: it is not what its coding says.
            TooLargeError: it is over the limit.
        """
        return _unzip(self.data, limit) if self.zipped else self.data


class Reader:
    """Reads bodies. So many bytes of all those that have not come whole are held, and of those of one caller."""

    def __init__(self, settings: Settings) -> None:
        self._limit, self._seconds = settings.max_body_bytes, settings.body_timeout_ms / 1000
        self._shares = Shares(max(settings.max_reading_bytes, 2 * self._limit), settings.peer_share, self._limit)

    async def read(self, scope: Scope, receive: Receive, plain: bool = False) -> Body:
        """The body, arriving in time and within the limit however it is sent; `plain`: a type of text, or none, will do.

        Raises:
            ServiceError: it is not JSON by its type, too large, too slow, or its sender left.
        """
        sent = _joined_headers(scope)
        kind = sent.get(b"content-type", b"").partition(b";")[0].strip().lower()
        json = kind == b"application/json" or (kind.startswith(b"application/") and kind.endswith(b"+json"))
        if not json and not (plain and kind in (b"", b"text/plain")):
            raise errors.NotJsonTypeError("send the header Content-Type: application/json")
        coding = sent.get(b"content-encoding", b"").strip().lower()
        if coding not in (b"", b"identity", b"gzip", b"x-gzip"):
            raise errors.CodingError("send the body as it is, or with Content-Encoding: gzip")
        declared = sent.get(b"content-length", b"")
        if declared.isdigit() and int(declared) > self._limit:
            raise _too_large(self._limit)
        try:
            async with asyncio.timeout(self._seconds):
                return Body(await self._whole(peer(scope), receive), coding.endswith(b"gzip"))
        except TimeoutError:
            raise errors.SlowBodyError(f"the body did not arrive within {self._seconds:g} s") from None

    async def _whole(self, peer: str | None, receive: Receive) -> bytes:
        parts, size, more = [], 0, True
        try:
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise errors.CallerLeftError("the caller left before the body was whole")
                part, more = message.get("body", b""), message.get("more_body", False)
                if size + len(part) > self._limit:
                    raise _too_large(self._limit)
                if not self._shares.take(peer, len(part)):
                    raise errors.OverLimitError("the bodies that are being read take all the memory there is for them; try again")
                size += len(part)
                parts.append(part)
        finally:
            self._shares.give_back(peer, size)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def _joined_headers(scope: Scope) -> dict[bytes, bytes]:
    """What the headers say of the body; what is said twice stands together, and is neither of the two."""
    joined: dict[bytes, bytes] = {}
    for name, value in scope["headers"]:
        if name in OF_THE_BODY:
            joined[name] = joined[name] + b"," + value if name in joined else value
    return joined


def peer(scope: Scope) -> str | None:
    """The address that a request came from; None where there is none."""
    client = scope.get("client")
    return client[0] if client else None


def _unzip(data: bytes, limit: int) -> bytes:
    parts, size = [], 0
    for _ in range(MEMBERS):
        stream = zlib.decompressobj(GZIP)
        try:
            parts.append(stream.decompress(data, limit + 1 - size))
        except zlib.error as error:
            raise errors.DamagedBodyError(f"the body is no gzip: {error}") from None
        size += len(parts[-1])
        if size > limit:
            raise _too_large(limit)
        if not stream.eof:
            raise errors.DamagedBodyError("the body ends before its gzip does")
        data = stream.unused_data
        if not data:
            return b"".join(parts)
    raise errors.DamagedBodyError(f"the body's gzip has more than {MEMBERS} parts")


def _too_large(limit: int) -> errors.TooLargeError:
    return errors.TooLargeError(f"the body is over the limit of {limit} bytes")
