"""How connections end that their clients keep: idle ones after a while, and with the service those that still bring a request first."""

import asyncio

import pytest
from processes import fill, serving

pytestmark = pytest.mark.anyio


async def test_a_connection_that_pauses_gets_its_answer_after_the_service_was_told_to_end(repository, server):
    await fill(server.url)
    async with serving(repository, server.url, farewell_seconds=30) as client:
        await client.rank()
        client.process.terminate()
        await asyncio.sleep(1)
        answer = await client.post("/rank", json={"user": {"id": "u1"}, "candidates": ["a1"]})
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        await asyncio.to_thread(client.process.wait, 10)  # it does not wait for longer than there is one


async def test_an_idle_connection_is_closed_when_it_was_idle_for_long(repository, server):
    async with serving(repository, server.url, keep_alive_seconds=1) as client:
        reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
        writer.write(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await reader.readline()).split()[1] == b"200"
        async with asyncio.timeout(90):
            assert await reader.read()  # the rest of the answer
            assert await reader.read() == b""
        writer.close()
