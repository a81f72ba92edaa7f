"""What a connection writes."""

import asyncio

import pytest

from service.server import Joined

pytestmark = pytest.mark.anyio


class Sink:
    """A transport that keeps what is written."""

    def __init__(self):
        self.written, self.closed = [], False

    def write(self, data):
        self.written.append(data)

    def close(self):
        self.closed = True

    def is_closing(self):
        return self.closed

    def get_extra_info(self, name):
        return name


async def test_what_is_written_in_one_go_is_sent_in_one_piece_and_in_order():
    sink = Sink()
    joined = Joined(sink, asyncio.get_running_loop())
    joined.write(b"head ")
    joined.write(b"body")
    assert sink.written == []
    await asyncio.sleep(0)
    assert sink.written == [b"head body"]
    joined.write(b"next")
    await asyncio.sleep(0)
    assert sink.written == [b"head body", b"next"]
    assert joined.get_extra_info("peername") == "peername"


async def test_nothing_is_lost_when_it_closes():
    sink = Sink()
    joined = Joined(sink, asyncio.get_running_loop())
    joined.write(b"last")
    joined.close()
    assert (sink.written, sink.closed) == ([b"last"], True)
    await asyncio.sleep(0)
    assert sink.written == [b"last"]


async def test_nothing_is_written_to_a_client_who_left_meanwhile():
    sink = Sink()
    joined = Joined(sink, asyncio.get_running_loop())
    joined.write(b"answer")
    sink.closed = True
    await asyncio.sleep(0)
    assert sink.written == []
