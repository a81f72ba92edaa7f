"""The shared connection to Redis: against a server that answers as it is told, then every form of address against real ones."""

import asyncio
import shutil
import subprocess
import time

import hiredis
import pytest
import uvloop
from conftest import Server, free_port

from service import line as module
from service.line import REFUSED_SECONDS, Address, Line
from service.store import RedisStore

pytestmark = pytest.mark.anyio


class Echo:
    """Answers each command with its last word, as slowly as it is told, and counts who connects."""

    def __init__(self):
        self.port, self.connections, self.asked, self.seconds, self.mute = free_port(), 0, [], 0.0, False
        self._server, self._writers = None, []

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        return self

    async def __aexit__(self, *_):
        self._server.close()
        await self.hang_up()

    async def hang_up(self):
        for writer in self._writers:
            writer.close()
        self._writers.clear()
        await asyncio.sleep(0.01)

    async def _serve(self, reader, writer):
        self.connections += 1
        self._writers.append(writer)
        parser = hiredis.Reader()
        while data := await reader.read(65_536):
            parser.feed(data)
            while (command := parser.gets()) is not False:
                self.asked.append(command)
                await asyncio.sleep(self.seconds)
                if not self.mute and not writer.is_closing():
                    word = command[-1]
                    writer.write(word if word.startswith((b"-", b"!")) else b"$%d\r\n%s\r\n" % (len(word), word))

    def line(self, timeout=0.2, **more):
        return Line(Address("127.0.0.1", self.port, **more), timeout)


@pytest.fixture
async def echo():
    async with Echo() as server:
        yield server


async def test_many_at_once_share_a_connection_and_each_gets_its_own(echo):
    line = echo.line(timeout=5)
    words = [f"w{i}".encode() for i in range(500)]
    assert await asyncio.gather(*(line.ask(b"GET", word) for word in words)) == words
    assert echo.connections == 1
    line.close()


async def test_a_late_reply_is_dropped_and_the_connection_stays(echo):
    line = echo.line(timeout=0.05)
    await line.ask(b"GET", b"first")
    echo.seconds = 0.1
    with pytest.raises(TimeoutError):
        await line.ask(b"GET", b"late")
    echo.seconds = 0
    await asyncio.sleep(0.1)
    assert await line.ask(b"GET", b"own") == b"own"
    assert echo.connections == 1
    line.close()


async def test_a_connection_that_stays_silent_is_replaced(echo, monkeypatch):
    monkeypatch.setattr(module, "SILENT_SECONDS", 0.1)
    line = echo.line(timeout=0.05)
    await line.ask(b"GET", b"first")
    echo.mute = True
    began = time.monotonic()
    while echo.connections == 1:
        with pytest.raises((TimeoutError, ConnectionError)):
            await line.ask(b"GET", b"nobody hears this")
        assert time.monotonic() - began < 5
    assert time.monotonic() - began >= 0.1
    echo.mute = False
    await echo.hang_up()
    assert await line.ask(b"GET", b"own") == b"own"
    line.close()


async def test_a_connection_that_rested_is_not_silent(echo, monkeypatch):
    monkeypatch.setattr(module, "SILENT_SECONDS", 0.1)
    line = echo.line(timeout=0.05)
    await line.ask(b"GET", b"first")
    await asyncio.sleep(0.2)
    echo.seconds = 0.08
    with pytest.raises(TimeoutError):
        await line.ask(b"GET", b"late")
    await asyncio.sleep(0.05)
    echo.seconds = 0
    assert await line.ask(b"GET", b"own") == b"own"
    assert echo.connections == 1
    line.close()


async def test_one_attempt_is_shared_and_a_refusal_is_remembered_for_a_moment(monkeypatch):
    loop, attempts, connect = asyncio.get_running_loop(), [], asyncio.get_running_loop().create_connection

    async def counted(*args, **more):
        attempts.append(args)
        return await connect(*args, **more)

    monkeypatch.setattr(loop, "create_connection", counted)
    line = Line(Address("127.0.0.1", free_port()), 1.0)
    for _ in range(2):
        answers = await asyncio.gather(*(line.ask(b"PING") for _ in range(20)), return_exceptions=True)
        assert {type(answer) for answer in answers} == {ConnectionError}
    assert len(attempts) == 1
    await asyncio.sleep(REFUSED_SECONDS)
    with pytest.raises(ConnectionError):
        await line.ask(b"PING")
    assert len(attempts) == 2


async def test_a_connection_closed_while_idle_or_awaited_is_mended_once(echo):
    line = echo.line(timeout=1)
    await line.ask(b"GET", b"first")
    await echo.hang_up()
    assert await line.ask(b"GET", b"second") == b"second"
    echo.mute = True
    asking = asyncio.create_task(line.ask(b"GET", b"third"))
    await asyncio.sleep(0.05)
    echo.mute = False
    await echo.hang_up()
    assert await asking == b"third"
    assert echo.connections == 3
    line.close()


async def test_an_error_is_its_askers_alone(echo):
    line = echo.line()
    answers = await asyncio.gather(
        *(line.ask(b"GET", word) for word in (b"a", b"-ERR no\r\n", b"b", b"-LOADING soon\r\n")), return_exceptions=True
    )
    assert answers[0::2] == [b"a", b"b"]
    assert [type(answer) for answer in answers[1::2]] == [hiredis.ReplyError, ConnectionError]
    line.close()


async def test_nonsense_ends_the_connection_and_not_the_line(echo):
    line = echo.line()
    with pytest.raises(ConnectionError):
        await line.ask(b"GET", b"!nonsense\r\n")
    assert await line.ask(b"GET", b"own") == b"own"
    line.close()


async def test_what_may_be_owed_is_bounded(echo, monkeypatch):
    monkeypatch.setattr(module, "MOST_WAITING", 10)
    echo.mute = True
    line = echo.line(timeout=0.1)
    answers = await asyncio.gather(*(line.ask(b"GET", b"x") for _ in range(12)), return_exceptions=True)
    assert [type(answer) for answer in answers] == [TimeoutError] * 10 + [ConnectionError] * 2
    line.close()


async def test_the_greeting_comes_first_and_one_that_is_refused_is_told(echo):
    line = echo.line(greeting=[("SELECT", "3")])
    await asyncio.gather(line.ask(b"GET", b"x"), line.ask(b"GET", b"y"))
    assert echo.asked == [[b"SELECT", b"3"], [b"GET", b"x"], [b"GET", b"y"]]
    line.close()
    refused = echo.line(greeting=[("AUTH", "-WRONGPASS who are you\r\n")])
    with pytest.raises(ConnectionError, match="who are you"):
        await refused.ask(b"GET", b"x")
    assert [b"GET", b"x"] not in echo.asked[4:]


async def test_a_greeting_may_take_long_and_what_follows_it_may_not(echo):
    line = echo.line(timeout=0.5, greeting=[("SELECT", "3")])
    await line.ask(b"GET", b"x")
    echo.mute = True
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        await line.ask(b"GET", b"y")
    assert time.monotonic() - began < module.CONNECT_SECONDS / 2
    line.close()


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_reply_that_came_while_the_loop_was_busy_is_no_timeout(new_loop):
    server = Server("valkey")

    async def block(seconds):
        time.sleep(seconds)  # as a model does that runs on the event loop

    async def ask():
        line = Line(Address("127.0.0.1", server.port), 0.02)
        await line.ask(b"SET", b"k", b"v")
        for busy in (0.03, 0.1):
            asking = asyncio.create_task(line.ask(b"GET", b"k"))
            blocking = asyncio.create_task(block(busy))  # in the same turn of the loop, so that uvloop has sent nothing yet
            assert await asking == b"v"
            await blocking
            asking = asyncio.create_task(line.ask(b"GET", b"k"))
            await asyncio.sleep(0)  # it is sent
            time.sleep(busy)
            assert await asking == b"v"
        server.pause()
        with pytest.raises(TimeoutError):  # the guard does not wait for ever
            await line.ask(b"GET", b"k")
        line.close()

    try:
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(ask())
    finally:
        server.resume()
        server.stop()


class TestAddresses:
    async def ask(self, url):
        store = RedisStore(url, timeout=2, ttl=100, on_damaged=lambda: None)
        await store.ping()
        await store.close()

    async def test_a_user_a_password_and_a_database(self):
        server = Server("valkey", "--requirepass", "a:b c")
        try:
            await self.ask(f"redis://:a%3Ab%20c@127.0.0.1:{server.port}/3")
            await self.ask(f"redis://default:a%3Ab%20c@127.0.0.1:{server.port}/3")
        finally:
            server.stop()

    async def test_a_unix_socket(self, tmp_path):
        server = Server("valkey", "--unixsocket", str(tmp_path / "s"))
        try:
            await self.ask(f"unix://{tmp_path}/s?db=2")
        finally:
            server.stop()

    @pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes the certificate")
    async def test_tls_and_a_certificate_that_is_not_trusted(self, tmp_path):
        key, certificate, port = tmp_path / "key.pem", tmp_path / "certificate.pem", free_port()
        make = (
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            "2",
            "-subj",
            "/CN=x",
            "-addext",
            "subjectAltName=IP:127.0.0.1",
        )
        subprocess.run([*make, "-keyout", key, "-out", certificate], check=True, capture_output=True)
        options = ("--tls-port", str(port), "--tls-cert-file", str(certificate), "--tls-key-file", str(key), "--tls-auth-clients", "no")
        server = Server("redis-server", *options)
        try:
            await self.ask(f"rediss://127.0.0.1:{port}/1?ssl_ca_certs={certificate}")
            store = RedisStore(f"rediss://127.0.0.1:{port}/1", timeout=2, ttl=100, on_damaged=lambda: None)
            with pytest.raises(RuntimeError, match=r"(?i)cannot be reached.*certificate"):
                await store.ping()
            await store.close()
        finally:
            server.stop()
