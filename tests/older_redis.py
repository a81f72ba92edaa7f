"""A server as an older or a compatible one would be: a proxy before a real one that edits its replies."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import hiredis

Edit = Callable[[Any], Any]


def without(*names: bytes) -> Edit:
    """Take these names, and the value after each, out of every reply that is a list of names and values."""

    def edit(reply: Any) -> Any:
        if not isinstance(reply, list):
            return reply
        skipped = {at for i, word in enumerate(reply) if isinstance(word, bytes) and word in names for at in (i, i + 1)}
        return [edit(word) for i, word in enumerate(reply) if i not in skipped]

    return edit


def _packed(reply: Any) -> bytes:
    if reply is None:
        return b"$-1\r\n"
    if isinstance(reply, hiredis.ReplyError):
        return b"-%s\r\n" % str(reply).encode()
    if isinstance(reply, int):
        return b":%d\r\n" % reply
    if isinstance(reply, list):
        return b"*%d\r\n" % len(reply) + b"".join(map(_packed, reply))
    return b"$%d\r\n%s\r\n" % (len(reply), reply)


@asynccontextmanager
async def editing(port: int, edit: Edit) -> AsyncIterator[str]:
    """The URL of a proxy before the server at that port."""

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(2**16):
            writer.write(data)
            await writer.drain()

    async def edited(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        replies = hiredis.Reader(notEnoughData=Ellipsis)
        while data := await reader.read(2**16):
            replies.feed(data)
            while (reply := replies.gets()) is not Ellipsis:
                writer.write(_packed(edit(reply)))
            await writer.drain()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served_by, to_server = await asyncio.open_connection("127.0.0.1", port)
        ways = [asyncio.ensure_future(forward(reader, to_server)), asyncio.ensure_future(edited(served_by, writer))]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            writer.close()
            to_server.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
    finally:
        server.close()
