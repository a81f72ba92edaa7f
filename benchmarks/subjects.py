"""The servers that are measured, as processes of their own: start, wait until all workers are up, ask what they cost, stop."""

import contextlib
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from adrank_bench.load import LoadError, Target

from .benchmark_models import ROOT, Built

HOST = "127.0.0.1"
LOG_SHARE = "ADRANK_LOG_SHARE"
START_SECONDS = 120
STOP_SECONDS = 30
READY = {"mlserver": "/v2/models/ranker/ready"}
"""Where a server says that it is ready, if not at `/readyz`."""
QUIET_SECONDS, QUIET_CPU = 0.5, 0.05
"""All workers are up when together they used less than this CPU time in that time."""


@dataclass(frozen=True)
class Subject:
    """A server that is up."""

    name: str
    target: Target
    process: psutil.Process
    started: float
    """Seconds until it was ready."""

    def tree(self) -> list[psutil.Process]:
        """The server and all processes that it started."""
        return [self.process, *self.process.children(recursive=True)]

    def cpu(self) -> float:
        """CPU seconds that it has used."""
        return sum(sum(process.cpu_times()[:2]) for process in self.tree())

    def memory(self) -> int:
        """Resident bytes of its largest process."""
        return max(int(process.memory_info().rss) for process in self.tree())

    def together(self) -> int:
        """Resident bytes of all its processes, what several share counted once."""
        return sum(int(process.memory_full_info().pss) for process in self.tree())

    def connections(self) -> list[int]:
        """Open connections of each process that has some."""
        counts = []
        for process in self.tree():
            taken = [found for found in process.net_connections("tcp") if found.laddr.port == self.target.port]
            established = sum(found.status == psutil.CONN_ESTABLISHED for found in taken)
            counts += [established] if established else []
        return counts


def adrank(built: Built, redis: str, port: int, workers: int, precision: str = "float32") -> list[str]:
    """The command that serves a benchmark model with adrank."""
    words = ["-m", "adrank", "serve", "--models", str(built.models), "--redis", redis, "--precision", precision]
    return [sys.executable, *words, "--port", str(port), "--workers", str(workers)]


def peer(name: str, graph: Path, bundle: Path, redis: str, port: int, workers: int, python: str = sys.executable) -> list[str]:
    """The command that serves a graph of one row a candidate with a peer, run by the Python of its environment."""
    words = ["-m", f"benchmarks.peers.{name}", "--bundle", str(bundle), "--rowwise", str(graph), "--redis", redis]
    return [python, *words, "--port", str(port), "--workers", str(workers)]


@contextmanager
def serving(name: str, command: Sequence[str], port: int, log: Path, root: Path = ROOT) -> Iterator[Subject]:
    """Run a server until the block ends, each of its workers scoring one request at a time.

    What it serves is not logged: what it is measured beside has no such log, and nobody would take the records. `ADRANK_LOG_SHARE` in
    the environment says otherwise. `root` is the checkout that it is of.

    Raises:
        LoadError: it was not ready in time.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ADRANK_", "PROMETHEUS_"))}
    environment |= {"OMP_NUM_THREADS": "1", "ADRANK_THREADS": "1", LOG_SHARE: os.environ.get(LOG_SHARE, "0")}
    began = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=root, env=environment, stdout=out, stderr=out)
    try:
        _wait(f"http://{HOST}:{port}{READY.get(name, '/readyz')}", process, log)
        subject = Subject(name, Target(HOST, port), psutil.Process(process.pid), time.monotonic() - began)
        _settle(subject)
        yield subject
    finally:
        _stop(process)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """End a server, and what it leaves behind."""
    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
        started = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        for left in (*started, process):
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()


def _wait(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2):
            return
        time.sleep(0.05)
    lines = log.read_text("utf-8", "replace").strip().splitlines()
    raise LoadError(f"the server did not start; the last line of {log} is: {lines[-1] if lines else '(nothing)'}")


def _settle(subject: Subject) -> None:
    until, before = time.monotonic() + START_SECONDS, subject.cpu()
    while time.monotonic() < until:
        time.sleep(QUIET_SECONDS)
        now = subject.cpu()
        if now - before < QUIET_CPU:
            return
        before = now
