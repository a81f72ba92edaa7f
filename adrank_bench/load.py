"""A load generator: one thread, raw sockets and epoll, since it shares its processors with the service that it measures.

Closed loop: each connection sends its next request when it has the answer to the last. Open loop: requests have intended times at
a constant rate, whatever the answers do, and a latency counts from the intended time; a request whose time comes while every
connection is busy waits, and its wait counts. Knows HTTP/1.1 and nothing of what is asked.
"""

import gc
import select
import socket
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import numpy as np

from features.errors import AdrankError

from .measured import LoadPlan, Measured

CONNECT_SECONDS = 5.0
DRAIN_SECONDS = 10.0
"""How long answers are waited for after the last request of an open loop was due."""
TICK_SECONDS = 1.0
RECEIVED = 65_536
TAIL = 2_048
DEGRADED = b'"degraded":[{'

clock = time.perf_counter


class LoadError(AdrankError, RuntimeError):
    """The service cannot be measured; the message says why."""


@dataclass(frozen=True)
class Target:
    """Where requests go."""

    host: str
    port: int
    path: str = "/rank"
    token: str = field(default="", repr=False)

    @classmethod
    def of(cls, url: str, token: str = "") -> "Target":
        """The service at `http://host:port`, asked with that bearer token.

        Raises:
            LoadError: that is no such URL.
        """
        try:
            parts = urlsplit(url)
            if parts.scheme == "http" and parts.hostname:
                return cls(parts.hostname, parts.port or 80, parts.path.rstrip("/") + "/rank", token)
        except ValueError:  # a port that is none
            pass
        raise LoadError(f"{url!r} is not the address of a service: expected one such as http://127.0.0.1:8000")

    def request(self, body: bytes) -> bytes:
        """A whole request with that JSON body."""
        head = f"POST {self.path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nContent-Type: application/json\r\n"
        head += f"Authorization: Bearer {self.token}\r\n" if self.token else ""
        return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    def connect(self) -> socket.socket:
        """A connection, without delays of its own.

        Raises:
            LoadError: it is refused, or not answered within `CONNECT_SECONDS`.
        """
        try:
            sock = socket.create_connection((self.host, self.port), CONNECT_SECONDS)
        except OSError as error:
            reason = error.strerror or error
            raise LoadError(f"no service can be reached at {self.host} port {self.port}: {reason}; start it, or name another") from error
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)
        return sock


@dataclass(slots=True, eq=False)
class _Connection:
    sock: socket.socket
    intended: float | None = None
    """When the request that it carries was to be sent; None while it carries none."""
    unsent: bytes = b""
    data: bytes = b""
    """What is there of the answer."""
    wanted: int = 0
    """Bytes of the whole answer; 0 until its head is there."""


@dataclass(eq=False)
class LoadRun:
    """One measurement at work."""

    target: Target
    requests: Sequence[bytes]
    plan: LoadPlan
    begin: float = field(default_factory=clock)
    due: int = 0
    """Requests of the open loop whose time has come."""
    idle: bool = True
    """Whether a connection was free when the generator last looked."""
    sent: int = 0
    answered: int = 0
    degraded: int = 0
    broken: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    latencies: "array[float]" = field(default_factory=lambda: array("d"))
    delays: "array[float]" = field(default_factory=lambda: array("d"))
    connections: dict[int, _Connection] = field(default_factory=dict)
    free: deque[_Connection] = field(default_factory=deque)
    poller: select.epoll = field(default_factory=select.epoll)

    def __post_init__(self) -> None:
        self.window_from = self.begin + self.plan.warm_up
        self.end = self.window_from + self.plan.seconds
        rate = self.plan.rate
        self.total = None if rate is None else round(rate * (self.plan.warm_up + self.plan.seconds))

    def open(self) -> None:
        """A new connection, ready for a request."""
        connection = _Connection(self.target.connect())
        self.connections[connection.sock.fileno()] = connection
        self.poller.register(connection.sock, select.EPOLLIN)
        self.free.append(connection)

    def close(self, connection: _Connection) -> None:
        """Let go of a connection."""
        self.poller.unregister(connection.sock)
        del self.connections[connection.sock.fileno()]
        connection.sock.close()

    def loop(self, tick: Callable[[float], None]) -> None:
        """Send and receive until the end; `tick` is told each second how many have passed."""
        next_tick = self.begin + TICK_SECONDS
        while True:
            now = clock()
            wait = self.send_due(now)
            if wait is None:
                return
            if now >= next_tick:
                tick(now - self.begin)
                next_tick += TICK_SECONDS
            if wait < 0.05:  # epoll's own timeout is in whole milliseconds
                select.select((self.poller,), (), (), max(wait, 0.0))
                wait = 0.0
            for handle, event in self.poller.poll(wait):
                connection = self.connections[handle]
                if event & select.EPOLLOUT:
                    self.send(connection, connection.unsent)
                if event & ~select.EPOLLOUT:
                    self.receive(connection)

    def send_due(self, now: float) -> float | None:
        """Send the requests whose time has come, as far as connections are free; how long to wait then, None at the end."""
        rate, free = self.plan.rate, self.free
        if rate is None or self.total is None:
            while free and now < self.end:
                self.begin_request(free.popleft(), now)
            return self.wait_for_the_last(now) if now >= self.end else min(0.1, self.end - now)
        while self.due < self.total and (intended := self.begin + self.due / rate) <= now:
            if intended >= self.window_from:
                self.delays.append(now - intended if self.idle else 0.0)
            self.due += 1
        while free and self.sent < self.due:
            self.begin_request(free.popleft(), self.begin + self.sent / rate)
        self.idle = bool(free)
        if free and self.due < self.total:
            return max(0.0, self.begin + self.due / rate - clock())
        return self.wait_for_the_last(now) if self.sent == self.total or now > self.end else 0.1

    def wait_for_the_last(self, now: float) -> float | None:
        """How long to wait for answers that are still to come; None when they are here, or have taken too long."""
        done = len(self.free) == len(self.connections) and self.total in (None, self.sent)
        return None if done or now > self.end + DRAIN_SECONDS else 0.1

    def begin_request(self, connection: _Connection, intended: float) -> None:
        """Send the next request over a connection that is free."""
        connection.intended = intended
        request = self.requests[self.sent % len(self.requests)]
        self.sent += 1
        self.send(connection, request)

    def send(self, connection: _Connection, data: bytes) -> None:
        """Send, the rest as soon as the socket takes it."""
        try:
            count = connection.sock.send(data)
        except BlockingIOError:
            count = 0
        except OSError:  # closed: seen again, and dealt with, when it is read
            return
        if count < len(data):
            self.poller.modify(connection.sock, select.EPOLLIN | select.EPOLLOUT)
        elif connection.unsent:
            self.poller.modify(connection.sock, select.EPOLLIN)
        connection.unsent = data[count:]

    def receive(self, connection: _Connection) -> None:
        """Read what is there; count the answer once it is whole."""
        try:
            data = connection.sock.recv(RECEIVED)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.lost(connection)
            return
        data = connection.data + data if connection.data else data
        if not connection.wanted:
            connection.wanted = _size(data)
        if len(data) < connection.wanted or not connection.wanted:
            connection.data = data
            return
        self.count(connection, data)
        connection.data, connection.wanted, connection.intended = b"", 0, None
        if b"connection: close" in data[: data.find(b"\r\n\r\n")].lower():
            self.close(connection)
            self.open()
            return
        self.free.append(connection)

    def count(self, connection: _Connection, data: bytes) -> None:
        """An answer that is whole."""
        now = clock()
        intended = connection.intended
        self.answered += 1
        # A closed loop's window is of answers, so that slow ones are not missed at its edges; an open one's is of what was due in it.
        counted = self.end if self.total is None else now
        if intended is None or not self.window_from <= (now if self.total is None else intended) <= counted:
            return
        if data.startswith(b"200", 9):
            self.statuses["200"] += 1
            self.latencies.append(now - intended)
            self.degraded += data.find(DEGRADED, max(0, len(data) - TAIL)) >= 0
        else:
            self.statuses[data[9:12].decode("latin-1")] += 1

    def lost(self, connection: _Connection) -> None:
        """The service has closed a connection: open another."""
        if connection.intended is None:
            self.free.remove(connection)
        elif connection.intended >= self.window_from:
            self.broken += 1
        self.close(connection)
        self.open()

    def measure(self, tick: Callable[[float], None]) -> Measured:
        """All of it; see `measure`."""
        interrupted = False
        gc.disable()  # a collection would be a delay of the generator's own
        began = time.process_time()
        try:
            for _ in range(self.plan.connections):
                self.open()
            self.loop(tick)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            spent = time.process_time() - began
            gc.enable()
            result = self.result(spent, interrupted)
            for connection in list(self.connections.values()):
                self.close(connection)
            self.poller.close()
        return result

    def result(self, cpu: float, interrupted: bool) -> Measured:
        """What was measured; of an open loop, also how long those without an answer have waited by now."""
        now, unanswered = clock(), []
        if self.total is not None:
            due = self.total if not interrupted else min(self.total, int((now - self.begin) * (self.plan.rate or 0)))
            waiting = [c.intended for c in self.connections.values() if c.intended is not None]
            waiting += [self.begin + i / (self.plan.rate or 1) for i in range(self.sent, due)]
            unanswered = [now - intended for intended in waiting if intended >= self.window_from]
        window = max(0.0, min(now, self.end) - self.window_from) if interrupted else self.plan.seconds
        latencies = np.array([*self.latencies, *unanswered])
        delays = np.array(self.delays)
        counts = (self.statuses, self.degraded, self.broken, len(unanswered), self.answered)
        return Measured(self.plan, latencies, *counts, window, delays, cpu / max(1, self.answered), interrupted)


def _size(data: bytes) -> int:
    """Bytes of a whole answer, 0 while its head is not there."""
    end = data.find(b"\r\n\r\n")
    if end < 0:
        return 0
    head = data[: end + 2].lower()
    start = head.find(b"\r\ncontent-length:")
    if start < 0 or not head.startswith(b"http/1."):
        raise LoadError("the service does not answer as adrank does: its answer is not HTTP/1 with a Content-Length")
    return end + 4 + int(head[start + 17 : head.find(b"\r\n", start + 2)])


def measure(target: Target, requests: Sequence[bytes], plan: LoadPlan, tick: Callable[[float], None] = lambda _: None) -> Measured:
    """Send the requests in turn, over and over, as planned. Ctrl-C ends it early, with what was measured until then.

    Raises:
        LoadError: the service cannot be reached, not any more, or does not speak HTTP as adrank does.
    """
    return LoadRun(target, requests, plan).measure(tick)


def ask(target: Target, request: bytes, seconds: float = 10.0) -> tuple[int, bytes]:
    """Status and body of one request.

    Raises:
        LoadError: there is no answer, or it is not adrank's kind.
    """
    data, sock = b"", target.connect()
    with sock:
        sock.settimeout(seconds)
        try:
            sock.sendall(request)
            while not (wanted := _size(data)) or len(data) < wanted:
                if not (more := sock.recv(RECEIVED)):
                    raise LoadError(f"the service at {target.host} port {target.port} closed the connection without an answer")
                data += more
        except OSError as error:
            raise LoadError(f"the service at {target.host} port {target.port} does not answer: {error}") from error
    return int(data[9:12]), data[data.find(b"\r\n\r\n") + 4 :]
