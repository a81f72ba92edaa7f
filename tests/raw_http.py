"""A server in this process with real connections, and clients that write bytes, for the tests of what no HTTP client would send."""

import asyncio
import contextlib
import re
import socket
from collections.abc import AsyncIterator
from typing import Any

import uvicorn

from service.serving.connection import Connection
from service.serving.server import WorkerServer
from service.settings import Settings


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the method, the path and the body; `/big` with a large body, `/slow` after a while."""
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body, more = body + message.get("body", b""), message.get("more_body", False)
    if scope["path"] == "/slow":
        await asyncio.sleep(float(body or 0.2))
    names = b",".join(sorted(name for name, _ in scope["headers"] if name.startswith(b"x-")))
    answer = b"%s %s %s[%s]" % (scope["method"].encode(), scope["path"].encode(), names, body)
    answer = b"x" * 2**22 if scope["path"] == "/big" else answer
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(answer))]})
    await send({"type": "http.response.body", "body": answer})


async def early(scope: Any, receive: Any, send: Any) -> None:
    """Answers without reading the body."""
    await send({"type": "http.response.start", "status": 415, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


async def shut(*writers: asyncio.StreamWriter) -> None:
    """Close connections, whatever became of them."""
    for writer in writers:
        writer.transport.abort()  # what nobody reads would keep it open
    await asyncio.sleep(0)


class Raw:
    """Clients of the server that is at this port."""

    def __init__(self, server: WorkerServer, port: int) -> None:
        self.server, self.port = server, port

    @property
    def state(self) -> Any:
        return self.server.server_state

    async def open(self, receive_buffer: int | None = None, source: str | None = None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        client = socket.socket()
        if receive_buffer:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        if source:
            client.bind((source, 0))
        client.setblocking(False)
        await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", self.port))
        return await asyncio.open_connection(sock=client)

    async def ask(self, *pieces: bytes, end: bool = False, seconds: float = 0.4) -> tuple[bytes, bool]:
        """What comes for these pieces until it is quiet so long, and whether the connection was closed."""
        reader, writer = await self.open()
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(0.01)
        if end:
            writer.write_eof()
        out, closed = b"", False
        with contextlib.suppress(TimeoutError):
            while not closed:
                async with asyncio.timeout(seconds):
                    piece = await reader.read(2**16)
                out, closed = out + piece, not piece
        await shut(writer)
        return out, closed

    async def codes(self, *pieces: bytes, **how: Any) -> list[int | str]:
        """The statuses that come, and `closed` last if the connection was."""
        out, closed = await self.ask(*pieces, **how)
        return [int(code) for code in re.findall(rb"HTTP/1\.1 (\d{3})", out)] + (["closed"] if closed else [])


@contextlib.asynccontextmanager
async def raw(app: Any = echo, **settings: Any) -> AsyncIterator[Raw]:
    """A server of this application, with these settings."""
    config = uvicorn.Config(app, http=Connection, ws="none", lifespan="off", log_config=None, access_log=False)
    config.timeout_graceful_shutdown = 2
    config.timeout_keep_alive = settings.pop("keep_alive_seconds", 75)
    server = WorkerServer(config, Settings(farewell_seconds=0, **settings))
    listener = socket.create_server(("127.0.0.1", 0))
    task = asyncio.create_task(server._serve([listener]))
    while not server.started:
        assert not task.done(), task
        await asyncio.sleep(0.01)
    try:
        yield Raw(server, listener.getsockname()[1])
    finally:
        server.should_exit = True
        for connection in list(server.server_state.connections):
            connection.transport.abort()
        await task
        await asyncio.sleep(0.01)
        listener.close()
