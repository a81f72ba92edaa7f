"""`adrank serve`: one process, or several and a parent that hands each connection to the one that has the fewest.

The parent accepts and the workers answer: where all of them accept, the kernel gives each connection to whoever wakes first.
"""

import asyncio
import contextlib
import fcntl
import itertools
import logging
import multiprocessing
import os
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnProcess
from pathlib import Path

import uvicorn
from uvicorn.config import STARTUP_FAILURE

from features import files

from ..settings import Settings, SettingsError, load_settings, processors
from ..startup_checks import check_start, tokens_loose
from ..telemetry import FIRST, logs
from .connection import Connection
from .listen import BACKLOG, listen, name, reason, unlisten
from .server import Member, WorkerServer

RESTART_SECONDS = 2.0
"""From one start of a worker to the next in its place at the earliest: one that always dies must not keep the machine busy."""
BALANCE_SECONDS = 0.5
"""Between two looks at whether a worker has more connections than its share."""
FULL_SECONDS = 0.05
SILENT_SECONDS = 2.0
"""A worker that was not heard of for so long stands still: it gets no new connections while another moves."""
METRICS = "PROMETHEUS_MULTIPROC_DIR"
COUNTED = {"counter": 2**20, "histogram": 2**20, **dict.fromkeys(("gauge_livemax", "gauge_livemin", "gauge_livesum"), 2**16)}
"""Bytes of each file that a worker counts in: prometheus_client takes what is there, and doubles it without its blocks."""
SPAWN = multiprocessing.get_context("spawn")

log = logging.getLogger(__name__)
crowded = logging.getLogger(f"{__name__}.crowded")
crowded.addFilter(logs.RateLimitFilter(10, 1.0))


def serve(settings: Settings) -> None:
    """Run the server until it is told to stop; requests that are on their way are answered first.

    Raises:
        SettingsError: it cannot be served with these settings on this machine.
        ListenError: the port is not to be had.
        SystemExit: no worker could be started.
    """
    check_start(settings)
    for inherited in (METRICS, METRICS.lower()):  # of whoever started this: its counts are none of ours
        os.environ.pop(inherited, None)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup leaves it
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))  # of a terminal that was closed
    listeners = listen(settings)
    try:
        _serve(settings, listeners)
    finally:
        unlisten(settings)


def _serve(settings: Settings, listeners: list[socket.socket]) -> None:
    os.environ.update(settings.environment())
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy, not imported yet, would start a thread for each processor of the host
    config = _config(settings)
    log.info("listening on %s", ", ".join(map(name, listeners)))
    _tell_threads(settings)
    if loose := tokens_loose(settings):
        log.warning("%s", loose)
    if settings.workers == 1:
        server = WorkerServer(config, settings)
        with contextlib.suppress(KeyboardInterrupt):
            server.run(listeners)
        if not server.started:
            raise SystemExit(STARTUP_FAILURE)
        return
    with metrics_folder() as folder:
        try:
            for slot, (kind, size) in itertools.product(range(settings.workers), COUNTED.items()):
                files.allocate(folder / f"{kind}_{slot}.db", size)
        except OSError as error:
            total = settings.workers * sum(COUNTED.values()) / 2**20
            why = f"there is no room for the {total:.0f} MiB that {settings.workers} workers count in, in {folder.parent}: {reason(error)}"
            raise SettingsError(f"{why}; make room there, set TMPDIR to another folder, or use --workers 1") from error
        os.environ[METRICS] = str(folder)  # the workers, which are fresh processes, import prometheus_client after this
        if not asyncio.run(Parent(settings, listeners, folder).run()):
            raise SystemExit(STARTUP_FAILURE)


@contextlib.contextmanager
def metrics_folder() -> Iterator[Path]:
    """A folder for what the workers count, gone at the end: in systemd's RuntimeDirectory where there is one, else where TMPDIR says.

    It is locked as systemd-tmpfiles asks for, which then leaves it alone however old its files seem: they are written through memory.
    """
    runtime = os.environ.get("RUNTIME_DIRECTORY", "").partition(":")[0] or None
    with tempfile.TemporaryDirectory(prefix="adrank-metrics-", dir=runtime, ignore_cleanup_errors=True) as folder:
        held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(held, fcntl.LOCK_SH)
            Path(folder, FIRST).touch()
            yield Path(folder)
        finally:
            os.close(held)


def _tell_threads(settings: Settings) -> None:
    usable, limit = processors()
    scoring = f"{settings.workers} x {settings.scoring_threads} requests scored at once, {settings.intra_op_threads} thread(s) each"
    log.info("%d processor(s) by %s; %s", usable, limit, scoring)
    if settings.device == "cpu" and settings.workers * settings.scoring_threads * settings.intra_op_threads > usable:
        log.warning("more is scored at once than there are processors: answers wait for each other; lower --workers to %d", usable)


def _config(settings: Settings) -> uvicorn.Config:
    logs.start(settings)
    return uvicorn.Config(
        "service.app:create_from_environment",
        factory=True,
        http=Connection,
        ws="none",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        log_config=None,
        backlog=BACKLOG,
        timeout_keep_alive=settings.keep_alive_seconds,
        timeout_graceful_shutdown=settings.drain_seconds,
    )


def work(pair: socket.socket, slot: int) -> None:
    """What a worker process does; its settings are in the environment. Its counts go on where the last worker of its slot ended."""
    from ..telemetry.metrics import count_in_slot  # noqa: PLC0415  # the parent has no need of it

    count_in_slot(slot)
    settings = load_settings()
    Member(_config(settings), settings, pair).run()


@dataclass(eq=False)
class Worker:
    """A worker process as its parent sees it. `connections` were handed to it and not reported closed, the last one at `turn`.

    It is `ready` when it answers at all, and `able` when it said last that it can rank. It was last heard of at `heard`.
    """

    process: SpawnProcess
    pair: socket.socket
    slot: int
    started: float = field(default_factory=time.monotonic)
    heard: float = 0.0
    ready: bool = False
    able: bool = False
    leaving: bool = False
    connections: int = 0
    turn: int = 0
    surplus: int = 0

    def tell(self, message: bytes, handles: list[int]) -> bool:
        """Whether the worker was told: not if it has hundreds of messages to read, or is gone."""
        try:
            socket.send_fds(self.pair, [message], handles)
        except OSError:
            return False
        return True

    def leave(self) -> None:
        """Say that no more connections will come: it ends when it has answered what it has."""
        self.ready, self.leaving = False, True
        with contextlib.suppress(OSError):
            self.pair.shutdown(socket.SHUT_WR)


class Parent:
    """Accepts connections, hands them out, and replaces workers that die."""

    def __init__(self, settings: Settings, listeners: list[socket.socket], metrics: Path) -> None:
        self._settings, self._listeners, self._metrics = settings, listeners, metrics
        self._workers: list[Worker] = []
        self._turns = itertools.count(1)
        self._ending, self._ended = asyncio.Event(), asyncio.Event()
        self._proven = self._failed = False

    async def run(self) -> bool:
        """Serve until told to stop; False where the first workers could not start."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end)
        for slot in range(self._settings.workers):
            self._start(slot)
        for listener in self._listeners:
            listener.setblocking(False)
        tasks = [asyncio.create_task(work) for work in (*map(self._accept, self._listeners), self._balance())]
        await self._ending.wait()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._drain()
        return not self._failed

    def _end(self) -> None:
        if self._ending.is_set():  # told twice: at once, then
            self._kill()
        self._ending.set()

    async def _drain(self) -> None:
        """Hand out what clients have connected by now, and let the workers answer."""
        for listener in self._listeners:
            with listener, contextlib.suppress(OSError):
                while True:
                    with listener.accept()[0] as connection:
                        self._hand_over(connection)
        for worker in self._workers:
            if worker.ready:
                worker.leave()
            elif not worker.leaving:
                worker.process.kill()
        if self._workers:
            seconds = self._settings.farewell_seconds + self._settings.drain_seconds + 5
            limit = asyncio.get_running_loop().call_later(seconds, self._kill)
            await self._ended.wait()
            limit.cancel()

    def _kill(self) -> None:
        for worker in self._workers:
            worker.process.kill()

    def _start(self, slot: int) -> None:
        if self._ending.is_set():
            return
        self._metrics.mkdir(0o700, parents=True, exist_ok=True)  # without the folder, which something may have removed, none could start
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        worker = Worker(SPAWN.Process(target=work, args=(theirs, slot)), ours, slot)
        # It inherits the mask: Ctrl-C and a hang-up reach all processes of a terminal, and only the parent is to act on them.
        resource_tracker.ensure_running()  # else the first start does so, which unblocks the signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
        worker.process.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGHUP})
        theirs.close()
        self._workers.append(worker)
        loop = asyncio.get_running_loop()
        loop.add_reader(worker.pair, self._hear, worker)
        loop.add_reader(worker.process.sentinel, self._bury, worker)

    def _hear(self, worker: Worker) -> None:
        try:
            message = worker.pair.recv(32)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        if message:
            closed, able = message.split()
            worker.ready, worker.able = not worker.leaving, able == b"1"
            self._proven, worker.heard = True, time.monotonic()
            worker.connections -= int(closed)
        else:
            asyncio.get_running_loop().remove_reader(worker.pair)
            worker.leave()

    def _bury(self, worker: Worker) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(worker.process.sentinel)
        loop.remove_reader(worker.pair)
        worker.process.join()
        worker.pair.close()
        self._workers.remove(worker)
        for path in self._metrics.glob(f"gauge_*_{worker.slot}.db"):  # what it counted stays counted, what it was is over
            with contextlib.suppress(OSError), path.open("r+b") as file:  # not removed: the next might find no room
                file.write(bytes(path.stat().st_size))
        if self._ending.is_set():
            if not self._workers:
                self._ended.set()
        elif self._proven:
            log.warning("worker %d ended with exit code %s; another takes its place", worker.process.pid, worker.process.exitcode)
            loop.call_later(max(0.0, worker.started + RESTART_SECONDS - time.monotonic()), self._start, worker.slot)
        else:
            code = worker.process.exitcode
            log.error("worker %d ended with exit code %s before any was ready; its log above says why", worker.process.pid, code)
            self._failed = True
            self._end()

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = await asyncio.get_running_loop().sock_accept(listener)
            except OSError as error:  # it left while it waited, or there are no more file descriptors
                crowded.warning("a connection could not be accepted: %s", reason(error))
                await asyncio.sleep(FULL_SECONDS)
                continue
            with connection:  # the worker gets a handle of its own
                while not self._hand_over(connection):
                    await asyncio.sleep(FULL_SECONDS)

    def _hand_over(self, connection: socket.socket) -> bool:
        ready = self._fit()
        least = min((worker.connections for worker in ready), default=0)
        # One more is as good as the least: beside one idle connection, one-request connections would all go to the other worker.
        for worker in sorted(ready, key=lambda w: (max(w.connections, least + 1), w.turn)):
            if worker.tell(b"+", [connection.fileno()]):
                worker.connections += 1
                worker.turn = next(self._turns)
                return True
        return False

    def _fit(self) -> list[Worker]:
        """Who is to have connections: those that can rank and do not stand still, else those that answer at all.

        A worker that took a dead one's place while Redis or the models are away would answer some of its siblings' requests with 503.
        """
        ready = [worker for worker in self._workers if worker.ready]
        since = time.monotonic() - SILENT_SECONDS
        able = [worker for worker in ready if worker.able]
        return [worker for worker in able if worker.heard >= since] or able or ready

    async def _balance(self) -> None:
        """Ask workers with more than their share to end some connections: their clients come back, to another.

        Without it a worker that took a dead one's place would wait for new clients, and one whose clients left for others to leave.
        """
        while True:
            await asyncio.sleep(BALANCE_SECONDS)
            fit = self._fit()
            share = -(-sum(worker.connections for worker in fit) // max(1, len(fit)))
            for worker in self._workers:
                if not worker.ready:
                    continue
                surplus = max(0, worker.connections - (share if worker in fit else 0))
                if (surplus or worker.surplus) and worker.tell(b"%d" % surplus, []):
                    worker.surplus = surplus
