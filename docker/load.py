"""Requests at a constant rate while a service is restarted, and one that is in flight when it is told to end."""

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import Any
from urllib.parse import urlsplit

THREADS = 8
FAILING_SECONDS = 0.5


class SteadyLoad:
    """Requests from threads, each over a connection of its own, as they come through a balancer that keeps none."""

    def __init__(self, url: str, document: Mapping[str, Any], rate: float = 40.0) -> None:
        self.rate, self.sent, self.longest_gap = rate, 0, 0.0
        self.failures: Counter[str] = Counter()
        self._address, self._body = urlsplit(url).netloc, json.dumps(document)
        self._lock, self._ending = threading.Lock(), threading.Event()
        self._good = time.monotonic()
        self._threads = [threading.Thread(target=self._go_on, daemon=True) for _ in range(THREADS)]

    def __enter__(self) -> "SteadyLoad":
        self._good = time.monotonic()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join(30)

    @property
    def failing(self) -> bool:
        """Whether nothing has been answered for a while."""
        return time.monotonic() - self._good > FAILING_SECONDS

    def _go_on(self) -> None:
        due = time.monotonic()
        while not self._ending.is_set():
            outcome = self._ask()
            with self._lock:
                self.sent += 1
                if outcome == "200":
                    now = time.monotonic()
                    self.longest_gap, self._good = max(self.longest_gap, now - self._good), now
                else:
                    self.failures[outcome] += 1
            due = max(due + THREADS / self.rate, time.monotonic() - 1)
            self._ending.wait(max(0.0, due - time.monotonic()))

    def _ask(self) -> str:
        connection = HTTPConnection(self._address, timeout=10)
        try:
            connection.request("POST", "/rank", self._body, {"Content-Type": "application/json", "Connection": "close"})
            reply = connection.getresponse()
            reply.read()
            return str(reply.status)
        except TimeoutError:
            return "no answer in 10 s"
        except (OSError, HTTPException):
            return "no connection"
        finally:
            connection.close()


@contextlib.contextmanager
def slow_request(url: str, document: Mapping[str, Any]) -> Iterator[Callable[[], int]]:
    """A request of which half has been sent; calling what this yields sends the rest, and tells the answer's status."""
    body = json.dumps(document).encode()
    connection = HTTPConnection(urlsplit(url).netloc, timeout=30)
    try:
        connection.putrequest("POST", "/rank")
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body[: len(body) // 2])
        time.sleep(0.5)  # until it has been read, and is in flight

        def finish() -> int:
            connection.send(body[len(body) // 2 :])
            reply: HTTPResponse = connection.getresponse()
            reply.read()
            return reply.status

        yield finish
    finally:
        connection.close()
