"""What is around the routes: methods, prefixes, codings, pages of browsers, scrapes, and where the service listens."""

import asyncio
import contextlib
import gzip
import json
import socket
import stat

import pytest
from conftest import free_port

from service.api.edge import METHODS
from service.doctor.port import check_port
from service.serving.listen import ListenError, listen, name, unlisten
from service.settings import Settings, SettingsError, load_settings
from service.telemetry.scrapes import Scrapes

pytestmark = pytest.mark.anyio
REQUEST = {"user": {"id": "u1"}, "candidates": ["a1", "a2"]}
BODY = json.dumps(REQUEST).encode()
TYPE = {"content-type": "application/json"}
ZIPPED = {**TYPE, "content-encoding": "gzip"}
SHOP = {"origin": "https://shop.example"}
PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
EVENTS = b'{"events": [{}]}'


class TestMethods:
    @pytest.mark.parametrize("path", [path for path, methods in METHODS.items() if "GET" in methods])
    async def test_head_is_get(self, client, path):
        got, head = await client.get(path), await client.head(path)
        assert (head.status_code, head.headers["content-type"]) == (got.status_code, got.headers["content-type"])

    async def test_head_of_a_service_that_is_not_ready(self, run, tmp_path):
        async with run(ready=False, models=tmp_path) as client:
            assert (await client.head("/readyz")).status_code == 503

    @pytest.mark.parametrize("path", METHODS)
    async def test_options_and_wrong_methods_say_what_there_is(self, client, path):
        options = await client.options(path)
        assert (options.status_code, options.headers["allow"], options.content) == (204, METHODS[path], b"")
        wrong = await client.delete(path)
        assert (wrong.status_code, wrong.headers["allow"]) == (405, METHODS[path])
        assert wrong.json()["code"] == "wrong_method"

    async def test_options_of_what_is_not_there(self, client):
        assert (await client.options("/nope")).status_code == 404
        assert (await client.head("/rank")).status_code == 405


class TestTypes:
    @pytest.mark.parametrize("path", ["/rank", "/v1/events"])
    @pytest.mark.parametrize(
        "headers",
        [
            {},
            {"content-type": ""},
            {"content-type": "text/plain;charset=UTF-8"},
            {"content-type": "application/x-www-form-urlencoded"},
            {"content-type": "multipart/form-data; boundary=x"},
            [("content-type", "application/json"), ("content-type", "text/plain")],
        ],
    )
    async def test_what_a_page_of_another_origin_could_send_is_refused(self, client, path, headers):
        answer = await client.post(path, content=BODY, headers=[*dict(headers).items()] if isinstance(headers, dict) else headers)
        assert (answer.status_code, answer.json()["code"], answer.headers["accept"]) == (415, "not_json_type", "application/json")


class TestCodings:
    @pytest.mark.parametrize("coding", ["gzip", "GZIP", "x-gzip"])
    async def test_gzip(self, client, coding):
        plain = (await client.post("/rank", content=BODY, headers=TYPE)).json()["ads"]
        zipped = await client.post("/rank", content=gzip.compress(BODY), headers={**TYPE, "content-encoding": coding})
        assert zipped.json()["ads"] == plain
        assert (await client.post("/rank", content=BODY, headers={**TYPE, "content-encoding": "identity"})).json()["ads"] == plain

    async def test_several_members_are_one_body(self, client):
        body = gzip.compress(BODY[:10]) + gzip.compress(b"") + gzip.compress(BODY[10:])
        assert (await client.post("/rank", content=body, headers=ZIPPED)).status_code == 200

    async def test_events_too(self, client):
        body = gzip.compress(b'{"events": [{}]}')
        assert (await client.post("/v1/events", content=body, headers=ZIPPED)).status_code == 202

    @pytest.mark.parametrize(
        "body", [BODY, b"", gzip.compress(BODY, mtime=0)[:-3], gzip.compress(BODY, mtime=0)[:5], gzip.compress(BODY, mtime=0) + b"more"]
    )
    async def test_what_is_no_gzip(self, client, body):
        answer = await client.post("/rank", content=body, headers=ZIPPED)
        assert (answer.status_code, answer.json()["code"]) == (400, "damaged_body")

    async def test_a_checksum_that_is_wrong(self, client):
        body = bytearray(gzip.compress(BODY))
        body[-6] ^= 1
        assert (await client.post("/rank", content=bytes(body), headers=ZIPPED)).json()["code"] == "damaged_body"

    async def test_very_many_members(self, client):
        assert (await client.post("/rank", content=gzip.compress(b"") * 1_000, headers=ZIPPED)).json()["code"] == "damaged_body"

    async def test_the_limit_is_of_what_was_zipped(self, run, ads):
        async with run(ads, max_body_bytes=10_000) as client:
            bomb = await client.post("/rank", content=gzip.compress(b" " * 5_000_000), headers=ZIPPED)
            assert (bomb.status_code, bomb.json()["code"]) == (413, "too_large")
            parts = await client.post("/rank", content=gzip.compress(b" " * 6_000) * 2, headers=ZIPPED)
            assert parts.status_code == 413
            padded = BODY + b" " * (10_000 - len(BODY))
            assert (await client.post("/rank", content=gzip.compress(padded), headers=ZIPPED)).status_code == 200

    @pytest.mark.parametrize("coding", ["br", "deflate", "zstd", "gzip, gzip", "aes128gcm"])
    async def test_other_codings(self, client, coding):
        answer = await client.post("/rank", content=BODY, headers={**TYPE, "content-encoding": coding})
        assert (answer.status_code, answer.json()["code"]) == (415, "unknown_coding")
        assert answer.headers["accept-encoding"] == "gzip, identity"


class TestPages:
    async def test_by_default_no_page_may_send_events(self, client):
        preflight = await client.options("/v1/events", headers={**SHOP, **PREFLIGHT})
        assert not [name for name in preflight.headers if name.startswith("access-control")]
        beacon = await client.post("/v1/events", content=EVENTS, headers={**SHOP, "content-type": "text/plain"})
        assert beacon.status_code == 415

    async def test_pages_of_allowed_origins_may(self, run, ads):
        async with run(ads, allowed_origins="https://shop.example, http://localhost:3000") as client:
            preflight = await client.options("/v1/events", headers={**SHOP, **PREFLIGHT})
            assert preflight.status_code == 200
            assert preflight.headers["access-control-allow-origin"] == "https://shop.example"
            assert preflight.headers["access-control-allow-methods"] == "POST"
            assert "Content-Type" in preflight.headers["access-control-allow-headers"]
            for kind in ({"content-type": "text/plain;charset=UTF-8"}, TYPE, {}):
                beacon = await client.post("/v1/events", content=EVENTS, headers={**SHOP, **kind})
                assert beacon.status_code == 202
                assert beacon.headers["access-control-allow-origin"] == "https://shop.example"
                assert "Origin" in beacon.headers["vary"]

    async def test_they_may_read_what_is_wrong_with_theirs(self, run, ads):
        async with run(ads, allowed_origins="https://shop.example") as client:
            for body, status in ((b"no JSON", 400), (b"{}", 422)):
                answer = await client.post("/v1/events", content=body, headers={**SHOP, **TYPE})
                assert answer.status_code == status
                assert answer.headers["access-control-allow-origin"] == "https://shop.example"

    @pytest.mark.parametrize("origin", ["https://shop.example.evil", "http://shop.example", "null", "https://SHOP.example", ""])
    async def test_pages_of_others_may_not(self, run, ads, origin):
        async with run(ads, allowed_origins="https://shop.example") as client:
            preflight = await client.options("/v1/events", headers={"origin": origin, **PREFLIGHT})
            assert preflight.status_code == 400
            assert "access-control-allow-origin" not in preflight.headers
            beacon = await client.post("/v1/events", content=EVENTS, headers={"origin": origin, "content-type": "text/plain"})
            assert beacon.status_code == 415
            assert "access-control-allow-origin" not in beacon.headers

    async def test_they_may_send_events_and_nothing_else(self, run, ads):
        async with run(ads, allowed_origins="https://shop.example") as client:
            assert (await client.post("/rank", content=BODY, headers={**SHOP, "content-type": "text/plain"})).status_code == 415
            assert "access-control-allow-origin" not in (await client.get("/v1/models", headers=SHOP)).headers
            assert (await client.options("/v1/events")).headers["allow"] == METHODS["/v1/events"]

    @pytest.mark.parametrize("wrong", ["*", "shop.example", "https://shop.example/", "https://shop.example/page", "null"])
    def test_what_is_no_origin(self, wrong):
        with pytest.raises(SettingsError, match="is no origin; write it as browsers do"):
            load_settings({"allowed_origins": wrong})


class TestPrefix:
    async def test_every_page_answers_with_the_prefix_and_without(self, run, ads):
        async with run(ads, root_path="/ads/v2") as client:
            for prefix in ("", "/ads/v2"):
                assert (await client.post(f"{prefix}/rank", json=REQUEST)).status_code == 200
                for path in ("/livez", "/readyz", "/docs", "/openapi.json", "/metrics"):
                    assert (await client.get(prefix + path)).status_code == 200
            assert (await client.get("/openapi.json")).json()["servers"] == [{"url": "/ads/v2"}]
            for path in ("/ads/v2", "/ads/rank", "/ads/v2x/livez", "/ads/v2/ads/v2/livez"):
                assert (await client.get(path)).status_code == 404
            assert await client.metric('adrank_requests_total{model="din",outcome="ok",route="/rank"}') == 2

    @pytest.mark.parametrize("wrong", ["ads", "/ads/", "/", "//ads", "/a b", "/a?b"])
    def test_what_is_no_prefix(self, wrong):
        with pytest.raises(SettingsError, match="ADRANK_ROOT_PATH"):
            load_settings({"root_path": wrong})


class TestScrapes:
    async def test_scrapers_together_get_one_exposition_and_leave_time_for_the_rest(self):
        made = []

        def make():
            made.append(1)
            return b"%d" % len(made)

        scrapes = Scrapes(make)
        assert await asyncio.gather(*(scrapes.text() for _ in range(50))) == [b"1"] * 50
        assert await scrapes.text() == b"2"  # begun after it was asked for

    async def test_one_that_fails_is_told_and_ends_nothing(self):
        outcomes = iter([ValueError("gone"), b"again"])

        def make():
            outcome = next(outcomes)
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        scrapes = Scrapes(make)
        with pytest.raises(ValueError, match="gone"):
            await scrapes.text()
        assert await scrapes.text() == b"again"


class TestListening:
    def test_the_kernel_holds_little_of_an_answer_that_nobody_reads(self):
        (listener,) = listen(Settings(host="127.0.0.1", port=free_port()))
        with listener, socket.create_connection(listener.getsockname()), listener.accept()[0] as accepted:
            accepted.setblocking(False)
            sent = 0
            with contextlib.suppress(BlockingIOError):
                while sent < 2**24:
                    sent += accepted.send(b"x" * 2**20)
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) <= 2**18
            assert 0 < sent < 2**20  # with what the client's kernel takes; else some megabytes

    @pytest.mark.parametrize("host", ["::", ""])
    def test_every_address_means_both_families(self, host):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        listeners = listen(Settings(host=host, port=port))
        for address in ("127.0.0.1", "::1") if socket.has_dualstack_ipv6() else ("127.0.0.1",):
            socket.create_connection((address, port), 2).close()
        assert " and " in name(listeners[0]) or not socket.has_dualstack_ipv6()
        for listener in listeners:
            listener.close()

    def test_a_unix_socket_is_for_its_group_and_gone_at_the_end(self, tmp_path):
        settings = Settings(uds=tmp_path / "s", uds_mode="600")
        (listener,) = listen(settings)
        assert stat.S_IMODE(settings.uds.stat().st_mode) == 0o600
        assert name(listener) == f"unix:{settings.uds}"
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(settings.uds))
        with pytest.raises(ListenError, match="another process listens there; choose another with --uds"):
            listen(settings)
        assert check_port(settings).status == "problem"
        unlisten(settings)
        assert settings.uds.exists()  # while somebody listens
        listener.close()
        unlisten(settings)
        assert not settings.uds.exists()

    def test_one_that_was_left_behind_is_replaced_and_another_file_is_not(self, tmp_path):
        settings = Settings(uds=tmp_path / "s")
        listen(settings)[0].close()
        assert check_port(settings).status == "ok"
        listen(settings)[0].close()
        settings.uds.unlink()
        settings.uds.write_text("precious")
        with pytest.raises(ListenError, match="it is a file that is no socket"):
            listen(settings)
        assert settings.uds.read_text() == "precious"

    @pytest.mark.parametrize(("path", "why"), [("no/s", "is no folder"), ("x" * 120, "over 107 bytes")])
    def test_where_none_can_be(self, tmp_path, path, why):
        with pytest.raises(ListenError, match=why):
            listen(Settings(uds=tmp_path / path))

    def test_the_doctor_tells_of_idle_connections(self, tmp_path):
        assert "Google's load balancers need 620" in check_port(Settings(uds=tmp_path / "s")).said
        assert "620" not in check_port(Settings(uds=tmp_path / "s", keep_alive_seconds=700)).said
        assert not list(tmp_path.iterdir())
