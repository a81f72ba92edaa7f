"""TLS with a password, as users run it: a service and a joiner beside a server that takes nothing else; then what can be wrong."""

import asyncio
import re
import shutil
import time

import pytest
import redis
from conftest import Server, free_port
from joining import Joining, rows
from processes import fill
from redis_servers import Nodes, certificates, eventually, start_sentinel, tls

from features.state import StoreError, UserState
from service.settings import load_settings
from service.store.redis import RedisStore, user_key
from service.store.streams import RedisStreams

pytestmark = [pytest.mark.anyio, pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes the certificates")]
PASSWORD = "open-sesame"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def secure(folder):
    """A server that takes TLS and certificates of its authority only. Its plain port is for this test's own start of it."""
    port = free_port()
    server = Server("redis-server", *tls(folder, port), "--requirepass", PASSWORD)
    server.tls = f"127.0.0.1:{port}/1?ca={folder}/ca.pem"
    server.client = f"&cert={folder}/client.pem&key={folder}/client.key"
    yield server
    server.stop()


@pytest.fixture
def url(secure):
    return f"rediss://:{PASSWORD}@{secure.tls}{secure.client}"


async def error_of(url, ask=RedisStore.ping):
    """What a store says of a server that it cannot use."""
    store = RedisStore(url, timeout=5, ttl=100, on_damaged=lambda: None)
    try:
        with pytest.raises(StoreError) as caught:
            await ask(store)
    finally:
        await store.close()
    assert caught.value.reason in ("store_unreachable", "store_denied")
    return str(caught.value)


async def test_a_ranking_its_click_and_the_log(run, repository, url, tmp_path, caplog):
    await fill(url)
    joining = Joining(url, tmp_path / "log", repository, time.time())
    async with run(redis=url, store_timeout_ms=5000) as client:
        answer = await client.rank("u1", ["a1", "a2"], request_id="r1", options={"top_k": 2})
        assert answer["degraded"] == []
        clicked = {"type": "click", "event_id": "e1", "ts": time.time(), "user_id": "u1", "ad_id": "a1", "request_id": "r1"}
        sent = await client.post("/v1/events", json={"events": [clicked]})
        assert sent.status_code == 202, sent.text
        await client.until_metric('adrank_served_log_total{result="written"}', 1)
        ready = (await client.get("/readyz")).json()
    await joining.once(everything=True)
    assert rows(tmp_path / "log")["label"].sum() == 1
    assert ready["store"] == {"kind": "rediss", "status": "up"}
    assert PASSWORD not in f"{ready} {caplog.text}"


async def test_an_authority_that_is_not_the_servers(secure, folder, url):
    for wrong in (url.replace("ca.pem", "wrong.pem"), url.partition("?")[0]):
        assert "certificate verify failed" in await error_of(wrong)
    broken = folder / "broken.pem"
    broken.write_text("no certificate")
    assert "the certificates of the store's URL cannot be used" in await error_of(url.replace("ca.pem", "broken.pem"))


async def test_a_name_that_is_not_the_certificates(url):
    assert "certificate is not valid for 'localhost'" in (await error_of(url.replace("127.0.0.1", "localhost")))
    store = RedisStore(url.replace("127.0.0.1", "localhost") + "&ssl_check_hostname=no", timeout=5, ttl=100, on_damaged=lambda: None)
    await store.ping()
    await store.close()


async def test_no_certificate_of_our_own_or_no_tls_at_all(secure, url):
    for wrong in (url.removesuffix(secure.client), f"redis://:{PASSWORD}@{secure.tls.partition('?')[0]}"):
        sentence = await error_of(wrong)
        assert re.search("certificate required|reset by peer|Connection closed", sentence), sentence
        assert PASSWORD not in sentence


async def test_a_wrong_password_degrades_and_is_never_told(repository, secure, url, run):
    wrong = url.replace(PASSWORD, "let-me-in")
    sentence = await error_of(wrong)
    assert "WRONGPASS" in sentence
    assert "NOAUTH" in await error_of(url.replace(f":{PASSWORD}@", ""))
    streams = RedisStreams(wrong)
    with pytest.raises(StoreError, match="WRONGPASS") as caught:
        await streams.begin("adrank:events")
    await streams.close()
    async with run(redis=wrong, ready=False) as client:
        async with asyncio.timeout(90):
            while (ready := (await client.get("/readyz")).json())["catalogue"]["reason"] is None:
                await asyncio.sleep(0.02)
        assert ready["store"]["status"] == "down"
        metrics = (await client.get("/metrics")).text
        events = await client.post(
            "/v1/events", json={"events": [{"type": "click", "event_id": "e", "ts": 1, "user_id": "u", "ad_id": "a"}]}
        )
    for text in (sentence, str(caught.value), str(ready), metrics, events.text):
        assert "let-me-in" not in text


async def test_certificates_may_be_renewed_while_it_runs(folder, secure, url, tmp_path):
    """A connection that is opened after the files have changed uses what is in them then."""
    for name in ("ca.pem", "client.pem", "client.key"):
        shutil.copy(folder / name, tmp_path / name)
    store = RedisStore(url.replace(str(folder), str(tmp_path)), timeout=5, ttl=100, on_damaged=lambda: None)
    shutil.copy(folder / "wrong.pem", tmp_path / "ca.pem")
    with pytest.raises(StoreError, match="verify failed"):
        await store.ping()
    shutil.copy(folder / "ca.pem", tmp_path / "ca.pem")
    async with asyncio.timeout(90):
        while True:
            try:
                await store.ping()
                break
            except StoreError:
                await asyncio.sleep(0.05)
    await store.close()


def test_a_file_that_is_not_there_stops_the_start(monkeypatch):
    monkeypatch.setenv("ADRANK_REDIS", f"rediss://:{PASSWORD}@h?ca=/nowhere.pem")
    with pytest.raises(ValueError, match=r"^setting ADRANK_REDIS: the file of the option ca is not there: /nowhere"):
        load_settings()


async def test_the_primary_that_sentinels_name_over_tls_before_and_after_a_fail_over(folder, tmp_path):
    ports, sentinel = [free_port(), free_port()], free_port()
    secured = ("--tls-replication", "yes", "--repl-diskless-sync-delay", "0", "--dir", str(tmp_path))
    first = Server("redis-server", *tls(folder, ports[0]), *secured)
    second = Server("redis-server", *tls(folder, ports[1]), *secured, "--replicaof", f"127.0.0.1 {ports[0]}")
    words = [word.removeprefix("--") for word in tls(folder, free_port())]
    settings = [
        *map(" ".join, zip(words[::2], words[1::2], strict=True)),
        "tls-replication yes",
        f"sentinel monitor m 127.0.0.1 {ports[0]} 1",
    ]
    process = start_sentinel(tmp_path, *settings, port=sentinel, kind="redis-server")
    files = f"ca={folder}/ca.pem&cert={folder}/client.pem&key={folder}/client.key"
    store = RedisStore(f"rediss+sentinel://127.0.0.1:{words[1]}/m?{files}", timeout=5, ttl=100, on_damaged=lambda: None)
    try:
        with redis.Redis(port=sentinel, protocol=2) as asked:
            await asyncio.to_thread(eventually, lambda: asked.sentinel_master("m")["num-slaves"] == 1)
            assert await store.append_served([b"before"]) == 1
            await asyncio.to_thread(eventually, lambda: asked.execute_command("SENTINEL", "FAILOVER", "m"))
            named = lambda: asked.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "m")  # noqa: E731
            await asyncio.to_thread(eventually, lambda: int(named()[1]) == ports[1])
        async with asyncio.timeout(90):
            while True:
                try:
                    assert await store.append_served([b"after"]) == 2
                    break
                except StoreError:
                    await asyncio.sleep(0.02)
    finally:
        await store.close()
        process.kill()
        process.wait()
        first.stop()
        second.stop()


async def test_a_cluster_over_tls(folder, tmp_path):
    nodes = Nodes(tmp_path, kind="redis-server", secured=folder)
    try:
        port = nodes.clients[0].config_get("tls-port")["tls-port"]
        files = f"ca={folder}/ca.pem&cert={folder}/client.pem&key={folder}/client.key"
        store = RedisStore(f"rediss+cluster://127.0.0.1:{port}?{files}", timeout=5, ttl=100, on_damaged=lambda: None)
        users = [f"u{i}" for i in range(20)]
        await store.ping()
        slot, source, target = nodes.where(user_key("u1"))
        nodes.move(slot, source, target)
        await store.put_users((user, UserState({"who": user})) for user in users)
        assert [(await store.get_user(user)).features["who"] for user in users] == users
        await store.close()
    finally:
        nodes.stop()
