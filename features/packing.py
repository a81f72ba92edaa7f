"""Values as bytes for the store and its streams: MessagePack by msgspec, which holds what it reads to the type that is asked for.

Knows nothing about what is packed.
"""

from collections.abc import Callable
from typing import Any

import msgspec

pack: Callable[[object], bytes] = msgspec.msgpack.Encoder().encode
"""Any value, of plain types and structs, as MessagePack."""


class StateError(ValueError):
    """A packed value is not what it is read as, or is another user's."""


def unpacker(kind: Any, what: str, most: int | None = None) -> Callable[[bytes], Any]:
    """What reads packed values of a type, of so many bytes at most. It raises StateError for any other value, which is not `what`."""
    decode = msgspec.msgpack.Decoder(kind).decode

    def unpack(value: bytes) -> Any:
        if most is not None and len(value) > most:
            raise StateError(f"the value takes more than {most:,} bytes, the most that are read")
        try:
            return decode(value)
        except (ValueError, msgspec.MsgspecError, RecursionError) as error:
            raise StateError(f"the value is not {what}: {error}") from error

    return unpack
