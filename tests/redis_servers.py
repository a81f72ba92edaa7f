"""Redis as users run it, on loopback: a primary with replicas and sentinels, a cluster, certificates."""

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import redis
from conftest import BINARIES, Server, free_port
from redis.crc import REDIS_CLUSTER_HASH_SLOTS as SLOTS
from redis.crc import key_slot

DOWN_AFTER_MS = 1_000
NODE_TIMEOUT_MS = 1_000
SECONDS = 90


def eventually(what: Callable[[], object], seconds: float = SECONDS) -> object:
    """What it comes to, as soon as that is true."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with contextlib.suppress(redis.RedisError, OSError):
            if found := what():
                return found
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds} s: {what}")


def client_of(url: str) -> Any:
    """A client of another make, that knows nothing of ours: for what is behind any form of URL."""
    scheme, _, rest = url.partition("://")
    hosts, _, name = rest.rpartition("@")[2].partition("/")
    places = [(host, int(port)) for host, _, port in (place.rpartition(":") for place in hosts.split(","))]
    if scheme == "redis+cluster":
        return redis.RedisCluster(startup_nodes=[redis.cluster.ClusterNode(*place) for place in places])
    if scheme == "redis+sentinel":
        # `redis.Sentinel` asks for the whole state, which names the old primary until the last replica follows the new one.
        with redis.Redis(*places[0]) as sentinel:
            host, port = sentinel.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", name)
        return redis.Redis(host.decode(), int(port))
    return redis.Redis.from_url(url)


def start_sentinel(folder: Path, *settings: str, port: int, kind: str = "valkey") -> "subprocess.Popen[bytes]":
    """A sentinel, which keeps what it learns in its configuration."""
    configuration = folder / f"sentinel-{port}.conf"
    configuration.write_text("\n".join((f"port {port}", "bind 127.0.0.1", f"dir {folder}", *settings)) + "\n")
    binary = BINARIES[kind]
    assert binary
    return subprocess.Popen([binary, str(configuration), "--sentinel"], stdout=subprocess.DEVNULL)


class Sentinels:
    """A primary, replicas and three sentinels, from one binary."""

    NAME = "mymaster"

    def __init__(self, folder: Path, *options: str, replicas: int = 2, count: int = 3, kind: str = "valkey") -> None:
        common = ("--dir", str(folder), "--repl-diskless-sync-delay", "0", *options)
        self.primary = Server(kind, *common)
        self.replicas = []
        for n in range(replicas):  # a replica writes what it was sent into a file
            follow = ("--replicaof", f"127.0.0.1 {self.primary.port}", "--dbfilename", f"replica-{n}.rdb")
            self.replicas.append(Server(kind, *common, *follow))
        self.ports = [free_port() for _ in range(count)]
        self._sentinels = [start_sentinel(folder, *self._settings(), port=port, kind=kind) for port in self.ports]
        self.url = f"redis+sentinel://{','.join(f'127.0.0.1:{port}' for port in self.ports)}/{self.NAME}"
        eventually(self._formed)

    def _settings(self) -> Iterator[str]:
        yield f"sentinel monitor {self.NAME} 127.0.0.1 {self.primary.port} {len(self.ports) // 2 + 1}"
        yield f"sentinel down-after-milliseconds {self.NAME} {DOWN_AFTER_MS}"
        yield f"sentinel failover-timeout {self.NAME} 5000"

    def ask(self, port: int, *words: str) -> Any:
        with redis.Redis(port=port) as client:
            return client.execute_command(*words)

    def _formed(self) -> bool:
        for port in self.ports:
            with redis.Redis(port=port, protocol=2) as client:
                state = client.sentinel_master(self.NAME)
            if (state["num-slaves"], state["num-other-sentinels"]) != (len(self.replicas), len(self.ports) - 1):
                return False
        return all(self.ask(server.port, "ROLE")[3] == b"connected" for server in self.replicas)

    def fail_over(self) -> None:
        """Ask a sentinel for a fail-over, and wait until all know the other primary."""
        before = self.named()
        self.ask(self.ports[0], "SENTINEL", "FAILOVER", self.NAME)
        eventually(lambda: not self.named() & before)

    def named(self) -> set[tuple[bytes, bytes]]:
        """Who the sentinels say is the primary."""
        return {tuple(self.ask(port, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.NAME)) for port in self.ports}

    def stop(self) -> None:
        for process in self._sentinels:
            process.kill()
            process.wait()
        for server in (self.primary, *self.replicas):
            server.stop()


class Nodes:
    """A cluster of three primaries, and a replica of each that is named."""

    def __init__(
        self, folder: Path, *options: str, replicas_of: Sequence[int] = (), kind: str = "valkey", secured: Path | None = None
    ) -> None:
        """With `secured`, a folder of `certificates`, they take TLS too."""
        over_tls = [(*tls(secured, free_port()), "--tls-cluster", "yes") if secured else () for _ in range(3 + len(replicas_of))]
        self.nodes = [Server(kind, *self._options(folder), *each, *options) for each in over_tls]
        self.clients = [redis.Redis(port=node.port, protocol=2) for node in self.nodes]
        for n, client in enumerate(self.clients):
            client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", n + 1)
            client.execute_command("CLUSTER", "MEET", "127.0.0.1", self.nodes[0].port, self._bus(self.nodes[0]))
        for n, client in enumerate(self.clients[:3]):
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", n * SLOTS // 3, (n + 1) * SLOTS // 3 - 1)
        self.moved: dict[int, int] = {}
        self.url = f"redis+cluster://{','.join(f'127.0.0.1:{node.port}' for node in self.nodes[:2])}"
        self.ids = [client.execute_command("CLUSTER", "MYID").decode() for client in self.clients]
        eventually(lambda: all(self._info(client, "cluster_known_nodes") == str(len(self.nodes)) for client in self.clients))
        for n, client in zip(replicas_of, self.clients[3:], strict=True):
            eventually(partial(client.execute_command, "CLUSTER", "REPLICATE", self.ids[n]))
        eventually(lambda: all(self._info(client, "cluster_state") == "ok" for client in self.clients))
        eventually(lambda: all(client.execute_command("ROLE")[3] == b"connected" for client in self.clients[3:]))

    @staticmethod
    def _options(folder: Path) -> Iterator[str]:
        name = free_port()
        yield from ("--dir", str(folder), "--dbfilename", f"{name}.rdb", "--cluster-enabled", "yes")
        yield from ("--cluster-config-file", str(folder / f"nodes-{name}.conf"), "--cluster-port", str(name))
        yield from ("--cluster-node-timeout", str(NODE_TIMEOUT_MS), "--cluster-require-full-coverage", "no")
        yield from ("--repl-diskless-sync-delay", "0", "--cluster-replica-validity-factor", "0")

    @staticmethod
    def _bus(node: Server) -> int:
        return int(node._command[node._command.index("--cluster-port") + 1])

    @staticmethod
    def _info(client: redis.Redis, name: str) -> str:
        return str(client.cluster("info")[name])

    def flush(self) -> None:
        for client in self.clients[:3]:
            client.flushall()

    def first_owner(self, slot: int) -> int:
        """The number of the primary that had the slot at first."""
        return next(n for n in range(3) if slot < (n + 1) * SLOTS // 3)

    def owner(self, key: str) -> int:
        """The same of a key's slot."""
        return self.first_owner(key_slot(key.encode()))

    def where(self, key: str) -> tuple[int, int, int]:
        """A key's slot, the number of its first primary, and that of another to move it to."""
        return key_slot(key.encode()), self.owner(key), (self.owner(key) + 1) % 3

    def begin_to_move(self, slot: int, source: int, target: int) -> None:
        self.clients[target].execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", self.ids[source])
        self.clients[source].execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", self.ids[target])

    def move_keys(self, slot: int, source: int, target: int) -> None:
        while keys := self.clients[source].execute_command("CLUSTER", "GETKEYSINSLOT", slot, 10):
            port = self.nodes[target].port
            self.clients[source].execute_command("MIGRATE", "127.0.0.1", port, "", 0, 5000, "KEYS", *keys)

    def finish_moving(self, slot: int, source: int, target: int) -> None:
        """Make the target the slot's node, and see that both say so: an older word that is on its way may undo it.

        It takes an epoch above all that it knows of, so it waits until it knows of all: else a word of the source, of an epoch that
        the target has not heard of, would count more than its own.
        """
        self.moved[slot] = target
        eventually(
            lambda: self._epochs(target) == {node: self._epochs(n)[node] for n, node in enumerate(self.ids) if node in self._epochs(n)}
        )
        self._give(slot, source, target)
        eventually(lambda: self._agree(slot, source, target))

    def _give(self, slot: int, source: int, target: int) -> None:
        for n in (target, source):
            self.clients[n].execute_command("CLUSTER", "SETSLOT", slot, "NODE", self.ids[target])

    def _agree(self, slot: int, source: int, target: int) -> bool:
        if all(self._owner(n, slot) == self.nodes[target].port for n in (target, source)):
            return True
        self.clients[target].execute_command("CLUSTER", "BUMPEPOCH")  # the newest word counts, as in redis-cli --cluster fix
        self._give(slot, source, target)
        return False

    def _epochs(self, n: int) -> dict[str, int]:
        """The epoch of each primary, by its id, as a node knows it."""
        nodes = self.clients[n].execute_command("CLUSTER NODES")
        return {each["node_id"]: int(each["epoch"]) for each in nodes.values() if "master" in each["flags"]}

    def _owner(self, n: int, slot: int) -> int:
        """The port of the slot's owner, as a node sees it."""
        ranges = self.clients[n].execute_command("CLUSTER", "SLOTS")
        return next((node[1] for first, last, node, *_ in ranges if first <= slot <= last), 0)

    def move(self, slot: int, source: int, target: int) -> None:
        """Move a slot, as resharding does."""
        self.begin_to_move(slot, source, target)
        self.move_keys(slot, source, target)
        self.finish_moving(slot, source, target)

    def stop(self) -> None:
        for client in self.clients:
            client.close()
        for node in self.nodes:
            node.stop()


def tls(folder: Path, port: int) -> tuple[str, ...]:
    """Options of a server that takes TLS too, at that port, with `certificates`."""
    files = ("--tls-ca-cert-file", f"{folder}/ca.pem", "--tls-cert-file", f"{folder}/server.pem", "--tls-key-file", f"{folder}/server.key")
    return ("--tls-port", str(port), *files)


def certificates(folder: Path) -> Path:
    """An authority `ca.pem`, and `server` and `client` certificates of it for 127.0.0.1, each with its `.key`; also a `wrong.pem`."""

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    new = ("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2")
    for name in ("ca", "wrong"):
        openssl(*new, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.pem")
    for name in ("server", "client"):
        signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=CA:FALSE")
        openssl(*new, "-subj", f"/CN={name}", *signed, "-keyout", f"{name}.key", "-out", f"{name}.pem")
    return folder
