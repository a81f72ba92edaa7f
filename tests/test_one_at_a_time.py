"""What is read as a request, and what is not: framing, upgrades, trailers, pipelines, ends."""

import asyncio

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_http import early, raw

pytestmark = pytest.mark.anyio
GET = b"GET /a HTTP/1.1\r\nhost: x\r\n\r\n"
CHUNKED = b"POST /c HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
HELLO = b"5\r\nhello\r\n0\r\n\r\n"
H2C = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n"


def post(body=b"hello", headers=b"", version=b"1.1", path=b"/p"):
    return b"POST %s HTTP/%s\r\nhost: x\r\n%scontent-length: %d\r\n\r\n%s" % (path, version, headers, len(body), body)


def bodies(out):
    """The bodies of answers, in their order."""
    client = h11.Connection(h11.CLIENT)
    found = []
    while out:
        client = h11.Connection(h11.CLIENT)
        client.send(h11.Request(method="GET", target="/", headers=[("host", "x")]))
        client.send(h11.EndOfMessage())
        client.receive_data(out)
        body = b""
        while type(event := client.next_event()) is not h11.EndOfMessage:
            body += bytes(event.data) if isinstance(event, h11.Data) else b""
        found.append(body)
        out = client.trailing_data[0]
    return found


async def test_requests_of_a_pipeline_are_answered_in_their_order():
    async with raw() as client:
        out, closed = await client.ask(post() + GET + CHUNKED + HELLO + GET)
        assert (bodies(out), closed) == ([b"POST /p [hello]", b"GET /a []", b"POST /c [hello]", b"GET /a []"], False)


@pytest.mark.parametrize(
    "upgrade", [H2C, H2C.replace(b"upgrade: h2c", b"uPgRaDe:websocket"), b"connection: upgrade\r\nUpgrade: TLS/1.0\r\n"]
)
async def test_an_upgrade_is_ignored_and_the_body_stays_a_body(upgrade):
    request = post(GET, upgrade)
    async with raw() as client:
        for pieces in ((request + GET,), (request[: -len(GET)], GET + GET)):
            out, _ = await client.ask(*pieces)
            assert bodies(out) == [b"POST /p [" + GET + b"]", b"GET /a []"]
        chunked = CHUNKED.replace(b"host: x\r\n", b"host: x\r\n" + upgrade)
        assert bodies((await client.ask(chunked + HELLO + GET))[0]) == [b"POST /c [hello]", b"GET /a []"]


async def test_trailers_are_no_headers_of_this_request_or_the_next():
    async with raw() as client:
        for pieces in ((CHUNKED + HELLO[:-1], b"\n" + post(headers=H2C)), (CHUNKED + HELLO[:-3], b"\n\r\n" + post(headers=H2C))):
            assert bodies((await client.ask(*pieces))[0]) == [b"POST /c [hello]", b"POST /p [hello]"]
        for pieces in ((CHUNKED + HELLO[:-2] + b"x-forged: 1\r\n\r\n" + GET,), (CHUNKED, HELLO[:-2], b"x-forged: 1\r\n", b"\r\n" + GET)):
            out, _ = await client.ask(*pieces)
            assert bodies(out) == [b"POST /c [hello]", b"GET /a []"]


@pytest.mark.parametrize("garbage", [b"GARBAGE\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"GET\r\n\r\n", b"GET / HTTP/1.1\nhost: x\n\n"])
async def test_what_follows_a_request_does_not_lose_its_answer(garbage):
    async with raw() as client:
        for request in (post(b"0.1", path=b"/slow"), CHUNKED + HELLO):
            assert await client.codes(request + garbage) == [200, 400, "closed"]


async def test_a_client_that_closes_its_half_gets_its_answers():
    async with raw() as client:
        assert await client.codes(post(b"0.1", path=b"/slow"), end=True) == [200, "closed"]
        assert await client.codes(post(b"0.1", path=b"/slow") + GET + GET, end=True) == [200, 200, 200, "closed"]
        assert await client.codes(GET + GET[:-3], end=True) == [200, 400, "closed"]
        assert await client.codes(post()[:-1], end=True) == [400, "closed"]
        assert await client.codes(GET[:10], end=True) == [400, "closed"]
        assert await client.codes(end=True) == ["closed"]


WRONG = {
    "both lengths": (post(headers=b"transfer-encoding: chunked\r\n"), 400),
    "both lengths, the other way": (CHUNKED[:-2] + b"content-length: 5\r\n\r\nhello", 400),
    "two lengths": (post(headers=b"content-length: 5\r\n"), 400),
    "a list of lengths": (post().replace(b"length: 5", b"length: 5, 5"), 400),
    "a signed length": (post().replace(b"length: 5", b"length: +5"), 400),
    "a length in hex": (post().replace(b"length: 5", b"length: 0x5"), 400),
    "a huge length": (post().replace(b"length: 5", b"length: 99999999999999999999"), 400),
    "a folded header": (b"GET / HTTP/1.1\r\nhost: x\r\na: b\r\n c\r\n\r\n", 400),
    "a folded coding": (CHUNKED.replace(b"encoding: ", b"encoding:\r\n ") + HELLO, 400),
    "a space before the colon": (post().replace(b"length:", b"length :"), 400),
    "no colon": (b"GET / HTTP/1.1\r\nhost: x\r\nfoo\r\n\r\n", 400),
    "a bare CR": (b"GET / HTTP/1.1\r\nhost: x\ra: b\r\n\r\n", 400),
    "a bare LF": (b"GET / HTTP/1.1\r\nhost: x\n\r\n", 400),
    "only LF": (b"GET / HTTP/1.1\nhost: x\n\n", 400),
    "a NUL": (b"GET / HTTP/1.1\r\nhost: x\r\na: \x00\r\n\r\n", 400),
    "another coding": (CHUNKED.replace(b"chunked", b"gzip, chunked") + HELLO, 501),
    "an unknown coding": (CHUNKED.replace(b"chunked", b"xchunked") + HELLO, 501),
    "chunked twice": (CHUNKED[:-2] + b"transfer-encoding: chunked\r\n\r\n" + HELLO, 400),
    "chunks in HTTP/1.0": (CHUNKED.replace(b"1.1", b"1.0") + HELLO, 400),
    "a chunk of no size": (CHUNKED + b"\r\nhello\r\n", 400),
    "a chunk of a negative size": (CHUNKED + b"-5\r\nhello\r\n", 400),
    "a chunk of a size in C": (CHUNKED + b"0x5\r\nhello\r\n", 400),
    "a chunk of a huge size": (CHUNKED + b"fffffffffffffffff\r\n", 400),
    "a chunk that is too long": (CHUNKED + b"4\r\nhello\r\n0\r\n\r\n", 400),
    "a chunk with a bare LF": (CHUNKED + b"5\nhello\r\n0\r\n\r\n", 400),
    "a second chunk that is wrong": (CHUNKED + b"5\r\nhello\r\nx\r\n", 400),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "two hosts": (b"GET / HTTP/1.1\r\nhost: x\r\nhost: y\r\n\r\n", 400),
    "HTTP/2's preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0", 400),
    "HTTP/2": (b"GET / HTTP/2.0\r\nhost: x\r\n\r\n", 505),
    "HTTP/0.9": (b"GET /\r\n\r\n", 505),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    "a proxy's request": (b"CONNECT a:443 HTTP/1.1\r\nhost: a\r\n\r\n", 501),
    "a method in small letters": (b"get / HTTP/1.1\r\nhost: x\r\n\r\n", 400),
}


@pytest.mark.parametrize("name", WRONG)
async def test_what_can_be_read_in_two_ways_is_refused_and_nothing_behind_it_is_read(name):
    request, status = WRONG[name]
    async with raw() as client:
        out, closed = await client.ask(request + GET)
        head, _, body = out.partition(b"\r\n\r\n")
        assert (int(head[9:12]), closed) == (status, True)
        assert b"application/problem+json" in head
        assert b"connection: close" in head
        assert b'"status":%d' % status in body
        assert b"/a" not in out  # nor was the request behind it


async def test_expect_continue():
    request = post(headers=b"expect: 100-continue\r\n")
    async with raw() as client:
        assert await client.codes(request[:-5], b"hello", GET) == [100, 200, 200]
        assert await client.codes(request + GET) == [100, 200, 200]
        assert await client.codes(request.replace(b"1.1", b"1.0")) == [200, "closed"]  # HTTP/1.0 has no such thing
    async with raw(early) as client:
        # The body was not asked for: whether what comes is the body, or a request, nobody knows.
        assert await client.codes(request[:-5], GET) == [415, "closed"]


async def test_old_clients_are_answered_and_closed():
    async with raw() as client:
        assert await client.codes(post(version=b"1.0")) == [200, "closed"]
        assert await client.codes(post(version=b"1.0", headers=b"connection: keep-alive\r\n")) == [200, "closed"]
        assert await client.codes(b"GET / HTTP/1.0\r\n\r\n") == [200, "closed"]


async def test_empty_lines_before_a_request_and_an_absolute_url_are_read():
    async with raw() as client:
        assert bodies((await client.ask(b"\r\n\r\n" + GET + b"\r\n" + GET))[0]) == [b"GET /a []"] * 2
        assert bodies((await client.ask(b"GET http://y/a HTTP/1.1\r\nhost: x\r\n\r\n"))[0]) == [b"GET /a []"]


async def test_an_answer_before_the_body_leaves_the_connection_whole():
    async with raw(early) as client:
        assert await client.codes(post(GET * 10) + GET) == [415, 415]
        assert await client.codes(post(GET * 10)[:-9], (GET * 10)[-9:] + GET) == [415, 415]


REQUESTS = [post(), GET, CHUNKED + HELLO, CHUNKED + b"4;a=b\r\n\r\n\r\n\r\n0\r\nx: y\r\n\r\n", post(GET, H2C), post(b"")]


def test_however_the_bytes_are_cut_the_answers_are_the_same():
    """As h11, which is slow and has no other limits, reads them."""

    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.sampled_from(range(len(REQUESTS))), min_size=1, max_size=6), st.lists(st.integers(1, 300), max_size=8))
    def holds(which, cuts):
        sent = b"".join(REQUESTS[i] for i in which)
        places = sorted({cut for cut in cuts if cut < len(sent)})
        pieces = [sent[start:end] for start, end in zip([0, *places], [*places, len(sent)], strict=True)]
        answers, _ = loop.run(client.ask(*pieces, end=True))
        assert bodies(answers) == [expected(event) for event in map(read, (REQUESTS[i] for i in which))]

    with asyncio.Runner() as loop:
        serving = raw()
        client = loop.run(serving.__aenter__())  # one server for all of them, which takes longer than they do
        try:
            holds()
        finally:
            loop.run(serving.__aexit__(None, None, None))


def read(request):
    server = h11.Connection(h11.SERVER)
    server.receive_data(request)
    head, body = server.next_event(), b""
    while isinstance(event := server.next_event(), h11.Data):
        body += bytes(event.data)
    return head, body


def expected(event):
    head, body = event
    return b"%s %s [%s]" % (head.method, head.target, body)
