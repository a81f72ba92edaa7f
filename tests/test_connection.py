"""What a connection writes, and its limits: memory, numbers, time."""

import asyncio

import pytest
from conftest import until
from raw_http import raw, shut

pytestmark = pytest.mark.anyio


HEAD = b"GET /a HTTP/1.1\r\nhost: x\r\n"


class TestMemory:
    async def test_a_pipeline_waits_for_its_answers_to_be_read(self):
        async with raw() as client:
            _, writer = await client.open(receive_buffer=4096)
            sent, piece = 0, (HEAD + b"\r\n") * 1_000
            while sent < 2**24:
                writer.write(piece)
                try:
                    async with asyncio.timeout(0.5):
                        await writer.drain()
                except TimeoutError:
                    break
                sent += len(piece)
            (connection,) = client.state.connections
            assert sent < 2**24
            assert len(connection.waiting) < 2**19
            await shut(writer)

    @pytest.mark.parametrize(
        ("endless", "status"),
        [
            (b"GET /a HTTP/1.1\r\nhost: x\r\na: ", 431),
            (HEAD + b"b" * 5_000, 431),
            (b"GET /", 431),
            (b"POST /a HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n5;", 431),
            (b"POST /a HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\na:", 431),
        ],
    )
    async def test_nothing_around_a_body_is_endless(self, endless, status):
        async with raw(max_head_bytes=8_192) as client:
            assert await client.codes(endless, b"b" * 3_000) == []
            assert await client.codes(endless, *[b"b" * 3_000] * 4) == [status, "closed"]

    async def test_a_head_over_a_limit_is_told_so_by_its_status(self):
        async with raw(max_head_bytes=8_192, max_headers=20, max_url_bytes=100) as client:
            assert await client.codes(HEAD + b"a: " + b"b" * 8_000 + b"\r\n\r\n") == [200]
            assert await client.codes(HEAD + b"a: " + b"b" * 8_200 + b"\r\n\r\n") == [431, "closed"]
            assert await client.codes(HEAD + b"a: b\r\n" * 19 + b"\r\n") == [200]
            assert await client.codes(HEAD + b"a: b\r\n" * 20 + b"\r\n") == [431, "closed"]
            assert await client.codes(HEAD.replace(b"/a", b"/" + b"a" * 100) + b"\r\n") == [414, "closed"]

    async def test_trailers_that_come_with_the_last_chunk_are_bounded_too(self):
        async with raw(max_head_bytes=1_024) as client:
            start = b"POST /a HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n"
            assert await client.codes(start, b"0\r\n" + b"a: b\r\n" * 300) == [431, "closed"]

    async def test_answers_that_nobody_reads_make_way_for_others(self):
        async with raw(max_unsent_bytes=2**21) as client:
            stalled = [await client.open(receive_buffer=4096) for _ in range(10)]
            for _, writer in stalled:
                writer.write(b"GET /big HTTP/1.1\r\nhost: x\r\n\r\n")
            await asyncio.sleep(0.5)
            held = sum(each.unsent for each in client.state.connections)
            assert 0 < held <= 2**21
            assert len(client.state.connections) < 10
            assert await client.codes(HEAD + b"\r\n") == [200]
            await shut(*(writer for _, writer in stalled))


class TestNumbers:
    async def test_one_connection_too_many_is_told_so(self):
        async with raw(max_connections=16, peer_share=1) as client:
            kept = [await client.open() for _ in range(16)]
            await asyncio.sleep(0.05)
            out, closed = await client.ask()
            assert out.startswith(b"HTTP/1.1 503 ")
            assert b"retry-after: 1\r\n" in out
            assert closed
            await shut(kept.pop()[1])
            await asyncio.sleep(0.05)
            assert await client.codes(HEAD + b"\r\n") == [200]
            await shut(*(writer for _, writer in kept))

    async def test_one_address_leaves_connections_to_others(self):
        async with raw(max_connections=16, peer_share=0.5) as client:
            kept = [await client.open() for _ in range(8)]
            await asyncio.sleep(0.05)
            assert await client.codes(HEAD + b"\r\n") == [503, "closed"]
            reader, writer = await client.open(source="127.0.0.2")
            writer.write(HEAD + b"\r\n")
            assert (await reader.readline()) == b"HTTP/1.1 200 OK\r\n"
            await shut(writer, *(each for _, each in kept))
            await asyncio.sleep(0.05)
            assert client.state.places.held == 0


class TestTime:
    """Limits are kept with a second's tolerance, so these wait for it."""

    async def closed_after(self, client, *pieces, seconds=4.0, **how):
        reader, writer = await client.open(**how)
        for piece in pieces:
            writer.write(piece)
        begun = asyncio.get_running_loop().time()
        async with asyncio.timeout(seconds):
            out = await reader.read()
        await shut(writer)
        return out, asyncio.get_running_loop().time() - begun

    @pytest.mark.parametrize("piece", [b"", b"G", HEAD, b"\r\n"])
    async def test_a_connection_without_a_whole_head_is_closed(self, piece):
        async with raw(head_timeout_ms=200) as client:
            out, took = await self.closed_after(client, piece)
            assert out == b""
            assert 0.15 < took < 1.5

    async def test_a_second_head_has_the_same_time(self):
        async with raw(head_timeout_ms=200) as client:
            out, took = await self.closed_after(client, HEAD + b"\r\n", b"GET /a HT")
            assert out.endswith(b"GET /a []")
            assert took < 2

    async def test_dripping_bytes_win_no_time(self):
        async with raw(head_timeout_ms=300) as client:
            _, writer = await client.open()
            for _ in range(20):
                writer.write(b"G")
                await asyncio.sleep(0.1)
                if not client.state.connections:
                    break
            assert not client.state.connections
            await shut(writer)

    async def test_an_idle_connection_keeps_its_own_time(self):
        async with raw(head_timeout_ms=200, keep_alive_seconds=3) as client:
            assert await client.codes(HEAD + b"\r\n", seconds=1.6) == [200]

    async def test_a_request_that_does_not_come_whole(self):
        async with raw(request_timeout_ms=200) as client:
            out, took = await self.closed_after(client, b"POST /a HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\nx")
            assert out.startswith(b"HTTP/1.1 408 ")
            assert took < 4

    async def test_an_answer_that_is_not_ready(self):
        async with raw(request_timeout_ms=200) as client:
            out, _ = await self.closed_after(client, b"POST /slow HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\n\r\n9")
            assert out.startswith(b"HTTP/1.1 504 ")

    async def test_an_answer_that_is_not_read(self):
        async with raw(answer_timeout_ms=1000) as client:
            _, writer = await client.open(receive_buffer=4096)
            writer.write(b"GET /big HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            assert await until(lambda: any(each.unsent > 2**16 for each in client.state.connections))
            assert await until(lambda: not client.state.connections)
            await shut(writer)

    async def test_who_is_refused_can_read_why_though_it_still_sends(self):
        async with raw(max_head_bytes=1_024) as client:
            out, closed = await client.ask(*[b"GET /" + b"a" * 2**16] + [b"a" * 2**16] * 20, seconds=3)
            assert out.startswith(b"HTTP/1.1 431 ")
            assert closed


async def test_strangers_write_few_lines(caplog):
    async with raw() as client:
        for _ in range(40):
            await client.ask(b"BAD\r\n\r\n", seconds=0.02)
    assert 0 < len([record for record in caplog.records if record.levelname == "WARNING"]) <= 20
