"""A rollout as Kubernetes does it, with processes: pods that are `adrank serve`, endpoints that a proxy reads, and a kubelet.

The proxy is Envoy. One of its listeners speaks HTTP and keeps connections to the pods, as an ingress does; the other hands on bytes,
so that a client's connection stays with its pod when that has left the endpoints, as with kube-proxy. It tries nothing twice.
"""

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread, Timer
from typing import Any

import bundles
import pytest
from conftest import free_port
from processes import ROOT, SERVE, environment
from redis_servers import eventually

from adrank_bench.load import LoadRun, Target, clock
from adrank_bench.measured import LoadPlan, Measured

LAG_SECONDS = 1.0
"""How long a proxy goes on with the old endpoints: a change of them is written, sent to every node, and read there."""
AWAY_SECONDS = 0.02
TOOLS = ROOT / "build" / "k8s-tools" / "bin"
MODEL = b'"model":{"name":"'


def tool(name: str, remedy: str) -> str:
    """A program of the environment, of the tools that `make` installs, or of the machine. Without it the test is skipped, or fails where
    tools are required."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), str(TOOLS), os.environ.get("PATH", "")]))
    if found is None:
        (pytest.fail if os.environ.get("REQUIRE_TOOLS") else pytest.skip)(f"{name} is not installed: {remedy}")
    return found


class Pod:
    """A ranker with a model of its own, by whose name its answers are known."""

    def __init__(self, folder: Path, redis: str, number: int, **settings: Any) -> None:
        self.name, self.port, models = f"pod-{number}", free_port(), folder / f"models-{number}"
        bundles.publish(models, self.name)
        self.log = folder / f"{self.name}.log"
        variables = environment(models=models, redis=redis, port=self.port, **settings)
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(SERVE, env=variables, stderr=out, stdout=out)

    def ready(self) -> bool:
        """What the readiness probe finds."""
        assert self.process.poll() is None, self.log.read_text()
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self.port}/readyz", timeout=1) as answer:
            return bool(answer.status == 200)
        return False


class Proxy:
    """An Envoy; `http` and `tcp` are the ports of its two listeners."""

    def __init__(self, folder: Path) -> None:
        self.http, self.tcp, self._endpoints = free_port(), free_port(), folder / "endpoints" / "pods.json"
        self._endpoints.parent.mkdir()
        self.use([])
        configuration = folder / "envoy.json"
        configuration.write_text(json.dumps(self._configuration()))
        words = [
            tool("envoy", "make rollout-test"),
            "-c",
            str(configuration),
            "--concurrency",
            "1",
            "--disable-hot-restart",
            "-l",
            "warning",
        ]
        with (folder / "envoy.log").open("wb") as log:
            self.process = subprocess.Popen(words, stdout=log, stderr=log)

    def use(self, pods: Sequence[Pod]) -> None:
        """Change the endpoints; Envoy sees it at once, the file being renamed into place."""
        found = [{"endpoint": {"address": _address(pod.port)}} for pod in pods]
        assignment = {"@type": _type("endpoint.v3.ClusterLoadAssignment"), "cluster_name": "pods", "endpoints": [{"lb_endpoints": found}]}
        staged = self._endpoints.with_suffix(".new")
        staged.write_text(json.dumps({"version_info": str(time.monotonic_ns()), "resources": [assignment]}))
        staged.rename(self._endpoints)

    def _configuration(self) -> dict[str, Any]:
        watched = {"path_config_source": {"path": str(self._endpoints), "watched_directory": {"path": str(self._endpoints.parent)}}}
        cluster = {"name": "pods", "type": "EDS", "eds_cluster_config": {"service_name": "pods", "eds_config": watched}}
        route = {"match": {"prefix": "/"}, "route": {"cluster": "pods", "timeout": "10s"}}
        http = {
            "@type": _type("filters.network.http_connection_manager.v3.HttpConnectionManager", "extensions"),
            "stat_prefix": "http",
            "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
            "http_filters": [
                {"name": "router", "typed_config": {"@type": _type("filters.http.router.v3.Router", "extensions")}},
            ],
        }
        tcp = {"@type": _type("filters.network.tcp_proxy.v3.TcpProxy", "extensions"), "stat_prefix": "tcp", "cluster": "pods"}
        listeners = [
            {
                "name": name,
                "address": _address(port),
                "filter_chains": [{"filters": [{"name": name, "typed_config": filter_}]}],
            }
            for name, port, filter_ in (("http", self.http, http), ("tcp", self.tcp, tcp))
        ]
        return {
            "node": {"id": "proxy", "cluster": "proxy"},
            "static_resources": {"listeners": listeners, "clusters": [cluster]},
        }


def _address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def _type(name: str, kind: str = "config") -> str:
    return f"type.googleapis.com/envoy.{kind}.{name}"


@dataclass(eq=False)
class Clients(LoadRun):
    """An open loop that goes on until it is told to stop, and counts answers of status 200 by the version that gave them."""

    by: Counter[str] = field(default_factory=Counter)
    stopped: bool = False

    def count(self, connection: Any, data: bytes) -> None:
        """An answer that is whole."""
        if data.startswith(b"200", 9):
            at = data.find(MODEL) + len(MODEL)
            self.by[data[at : data.find(b'"', at)].decode()] += 1
        super().count(connection, data)

    def send_due(self, now: float) -> float | None:
        """As in any open loop, until told to stop: what was due by then is still sent and answered."""
        if self.stopped and now < self.end:
            self.total, self.end = self.due, now
        return super().send_due(now)


@contextlib.contextmanager
def load(target: Target, rate: float, connections: int) -> Iterator[tuple[Clients, list[Measured]]]:
    """Clients at work in a thread; what they measured is in the list at the end."""
    body = json.dumps({"user": {"id": "u1"}, "candidates": [f"a{i}" for i in range(30)]}).encode()
    clients, measured = Clients(target, [target.request(body)], LoadPlan(rate, 300.0, 0.0, connections)), list[Measured]()
    thread = Thread(target=lambda: measured.append(clients.measure(lambda _: None)))
    thread.start()
    try:
        yield clients, measured
    finally:
        clients.stopped = True
        thread.join(30)


class Carrier(asyncio.Protocol):
    """An end of a connection; what comes is sent on at the other end, after a while, and so is its close."""

    def __init__(self, ends: set["Carrier"], other: "Carrier | None" = None, port: int = 0) -> None:
        self.ends, self.other, self.port, self.early = ends, other, port, list[bytes]()
        self.transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.ends.add(self)
        loop = asyncio.get_running_loop()
        if self.other is None:
            self.other = other = Carrier(self.ends, self)
            self.connecting = loop.create_task(loop.create_connection(lambda: other, "127.0.0.1", self.port))
        transport.writelines(self.early)

    def data_received(self, data: bytes) -> None:
        assert self.other
        asyncio.get_running_loop().call_later(AWAY_SECONDS, self.other.send, data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.ends.discard(self)
        if self.other and self.other.transport is not None:
            asyncio.get_running_loop().call_later(AWAY_SECONDS, self.other.transport.close)

    def send(self, data: bytes) -> None:
        self.transport.write(data) if self.transport is not None else self.early.append(data)


@contextlib.contextmanager
def far(port: int) -> Iterator[int]:
    """A port beside that one, from which it is `AWAY_SECONDS` to there and as long back."""
    loop, here, ends = asyncio.new_event_loop(), free_port(), set[Carrier]()

    def accept() -> Carrier:
        return Carrier(ends, port=port)

    async def serve() -> None:
        server = await loop.create_server(accept, "127.0.0.1", here)
        started.set()
        await stop.wait()
        server.close()
        for end in list(ends):
            end.transport.abort()
        await asyncio.sleep(2 * AWAY_SECONDS)

    stop, started = asyncio.Event(), Event()
    thread = Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        assert started.wait(90)
        yield here
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()


@dataclass
class Cluster:
    """The pods of a Deployment with maxSurge 1 and maxUnavailable 0, and how its pods are ended."""

    folder: Path
    redis: str
    proxy: Proxy
    pre_stop: float
    kill: bool = False
    """End pods by SIGKILL, as if they had no grace."""
    settings: dict[str, Any] = field(default_factory=dict)
    pods: list[Pod] = field(default_factory=list)
    started: list[Pod] = field(default_factory=list)

    def add(self, count: int) -> None:
        """Start pods, wait until they are ready, and let the proxy know."""
        new = [Pod(self.folder, self.redis, len(self.started) + i + 1, **self.settings) for i in range(count)]
        self.started += new
        for pod in new:
            eventually(pod.ready, 60)
        self.pods += new
        self.proxy.use(self.pods)

    def remove(self, pod: Pod) -> None:
        """Delete a pod: the endpoints change, after a while, and beside that the kubelet waits as preStop says, then sends SIGTERM."""
        self.pods.remove(pod)
        began = clock()
        endpoints = Timer(LAG_SECONDS, lambda: self.proxy.use(self.pods))
        endpoints.start()
        time.sleep(self.pre_stop)
        (pod.process.kill if self.kill else pod.process.terminate)()
        endpoints.join()
        pod.process.wait(30)
        self.ended = clock() - began

    def roll(self) -> None:
        """Replace each pod, one after the other."""
        for pod in list(self.pods):
            self.add(1)
            time.sleep(LAG_SECONDS)
            self.remove(pod)


@contextlib.contextmanager
def cluster(folder: Path, redis: str, **options: Any) -> Iterator[Cluster]:
    """Two pods behind a proxy."""
    proxy = Proxy(folder)
    made = Cluster(folder, redis, proxy, **options)
    try:
        made.add(2)
        yield made
    finally:
        for process in [proxy.process, *(pod.process for pod in made.started)]:
            process.kill()
            process.wait(90)
