"""Several workers: who gets which connection, and what becomes of connections and requests when processes come and go."""

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
from collections import Counter
from pathlib import Path

import processes
import psutil
import pytest
from conftest import free_port, until
from processes import PATIENCE, SERVE, environment, serving, workers_of
from prometheus_client.mmap_dict import MmapedDict

from service.serving.listen import ListenError, listen
from service.serving.workers import COUNTED, SILENT_SECONDS, _tell_threads
from service.settings import Settings

pytestmark = pytest.mark.anyio


class Caller:
    """One keep-alive connection, so that a test decides when it opens and closes."""

    def __init__(self, client):
        self._at = (client.base_url.host, client.base_url.port)
        self.reader = self.writer = None
        self.asked = 0  # on this connection, and answered

    async def ask(self, path="/livez"):
        """The status of the answer; opens the connection where it is not open, closes it where the answer says so."""
        if self.writer is None:
            self.reader, self.writer = await asyncio.open_connection(*self._at)
        self.writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        head = (await self.reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        await self.reader.readexactly(length)
        self.asked += 1
        if b"connection: close" in head:
            await self.close()
        return int(head.split()[1])

    @property
    def port(self):
        return self.writer.get_extra_info("sockname")[1]

    async def close(self):
        if self.writer:
            self.writer.close()
            with contextlib.suppress(OSError):
                await self.writer.wait_closed()
        self.writer, self.asked = None, 0


def owners(client, states=(psutil.CONN_ESTABLISHED,)):
    """The worker of each open connection, by the client's port."""
    return {
        connection.raddr.port: pid
        for pid in workers_of(client)
        if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        for connection in psutil.Process(pid).net_connections("tcp")
        if connection.status in states and connection.laddr.port == client.base_url.port
    }


async def until_noticed(client, ports):
    """Waits until the workers have closed their ends of connections that were closed: until then these count."""
    await until(lambda: not (owners(client, (psutil.CONN_ESTABLISHED, psutil.CONN_CLOSE_WAIT)).keys() & ports))


def spread(client, callers):
    """How many of these callers each worker has, the fewest first."""
    having = owners(client)
    by_worker = Counter(having.get(caller.port) for caller in callers if caller.writer)
    return sorted(by_worker[pid] for pid in alive(client))


async def until_spread(client, callers, wanted):
    """Keeps asking, which must go well, until the callers' connections are spread so."""
    async with asyncio.timeout(PATIENCE):
        while spread(client, callers) != wanted:
            assert [await caller.ask() for caller in callers] == [200] * len(callers)
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def two_workers(repository, **settings):
    """Two workers that are both ready, without any connection of this test."""
    async with serving(repository, "memory://", workers=2, **settings) as client:
        client.headers["Connection"] = "close"
        await client.get("/livez")  # by the one that was kept until now
        await until_both_are_ready(client)
        client.callers = [Caller(client) for _ in range(8)]
        try:
            yield client
        finally:
            for caller in client.callers:
                await caller.close()


@pytest.fixture(scope="module")
def anyio_backend():
    return "asyncio"


@pytest.fixture(scope="module")
async def lasting(repository):
    """Two workers for the tests that leave two behind."""
    async with two_workers(repository) as client:
        yield client


@pytest.fixture
async def pair(lasting):
    """They, both ready, and without any connection."""
    await until_both_are_ready(lasting)
    lasting.callers = [Caller(lasting) for _ in range(8)]
    yield lasting
    for caller in lasting.callers:
        await caller.close()


def alive(client):
    """The workers that are there, in the order of their starting."""
    return [pid for pid in workers_of(client) if psutil.pid_exists(pid)]


async def until_both_are_ready(client):
    """Waits until new connections go to both: each worker alive gets one of two that are open at once."""
    async with asyncio.timeout(PATIENCE):
        while True:
            pair = [Caller(client), Caller(client)]
            for caller in pair:
                await caller.ask()
            having = owners(client)
            both = {having.get(caller.port) for caller in pair if caller.writer} - {None}
            for caller in pair:
                await caller.close()
            if len(both) == 2:
                return
            await asyncio.sleep(0.05)


async def test_connections_are_shared_evenly_however_they_are_opened_and_whoever_leaves(pair):
    callers = pair.callers
    assert await asyncio.gather(*(caller.ask() for caller in callers)) == [200] * 8
    assert spread(pair, callers) == [4, 4]  # opened at once
    ports = {caller.port for caller in callers}
    for caller in callers:
        await caller.close()
    await until_noticed(pair, ports)
    for caller in callers:
        await caller.ask()
    assert min(spread(pair, callers)) >= 3  # opened one by one; one that was too many may have been told to come again
    await until_spread(pair, callers, [4, 4])
    for closing in (callers[:3], callers[::2], callers[5:]):
        for caller in closing:
            await caller.close()
        for caller in closing:
            await caller.ask()
        # Some closed and opened again: within one of each other is as good as even, and what is not is evened out.
        await until_spread(pair, callers, [4, 4])
    having = owners(pair)
    left = having[callers[0].port]
    staying = [caller for caller in callers if having[caller.port] != left]
    for caller in set(callers) - set(staying):
        await caller.close()
    assert spread(pair, staying) == [0, 4]
    await until_spread(pair, staying, [2, 2])  # a worker whose callers left gets some of the others


async def test_connections_of_one_request_each_are_shared_too(pair):
    folder = counts_of(pair)

    def answered():
        return Counter(
            {
                path.name: sum(
                    value for key, value, *_ in MmapedDict.read_all_values_from_file(path) if '"/readyz"' in key and "_total" in key
                )
                for path in folder.glob("counter_*.db")
            }
        )

    async def ask(times):
        for _ in range(times):
            caller = Caller(pair)
            assert await caller.ask("/readyz") == 200
            await caller.close()

    for at_once in (1, 4):
        await asyncio.sleep(1.5)  # until what came before is written
        before = answered()
        await asyncio.gather(*(ask(100 // at_once) for _ in range(at_once)))
        await until(lambda: (answered() - before).total() >= 100)  # the workers write what they counted twice a second
        new = answered() - before
        assert len(new) == 2
        assert min(new.values()) >= 10  # even, but that a worker whom the machine holds up rightly gets fewer


async def test_a_worker_that_is_killed_is_replaced_and_gets_its_share(pair):
    for caller in pair.callers:
        await caller.ask()
    victim, ever = alive(pair)[0], len(workers_of(pair))
    os.kill(victim, signal.SIGKILL)
    async with asyncio.timeout(PATIENCE):
        while len(workers_of(pair)) == ever or spread(pair, pair.callers) != [4, 4]:
            for caller in pair.callers:
                try:
                    assert await caller.ask() == 200
                except (OSError, asyncio.IncompleteReadError):
                    await caller.close()
            await asyncio.sleep(0.02)
    assert f"worker {victim} ended with exit code -9; another takes its place" in pair.log.read_text()
    counts = {path.name: path.stat() for path in counts_of(pair).glob("*.db")}
    assert counts.keys() == {f"{kind}_{slot}.db" for kind in COUNTED for slot in (0, 1)}
    assert all(each.st_blocks * 512 >= each.st_size for each in counts.values()), "a disk that fills would end every worker"


async def ask_until_refused(client, caller, keep, asked):
    """Requests until no connection can be had any more; each that could be sent must be answered well.

    Except: a connection that the kernel makes between the server's last accept and its close is reset, as with any server.
    """
    while True:
        try:
            status = await caller.ask()
        except ConnectionRefusedError:
            return
        except ConnectionResetError:
            if caller.asked:
                raise
            return
        assert status == 200
        asked[keep] += 1
        if not keep:
            await caller.close()
        await asyncio.sleep(0.01)


async def drained(client, stop, ended):
    """Keeps asking while processes are stopped; none of it may fail."""
    asked = Counter()
    asking = [asyncio.create_task(ask_until_refused(client, caller, i < 6, asked)) for i, caller in enumerate(client.callers)]
    await until(lambda: all(asked[keep] > 10 for keep in {i < 6 for i in range(len(asking))}))
    stop()
    await ended(asking)


@pytest.mark.parametrize(
    ("workers", "number", "code"), [(1, signal.SIGTERM, -signal.SIGTERM), (2, signal.SIGTERM, 0), (2, signal.SIGHUP, 0)]
)
async def test_what_was_asked_is_answered_before_the_end(repository, workers, number, code):
    async with serving(repository, "memory://", workers=workers) as client:
        client.callers = [Caller(client) for _ in range(8)]
        told = [client.process.pid, *(workers_of(client) if number == signal.SIGHUP else ())]  # a terminal tells all
        await drained(client, lambda: [os.kill(each, number) for each in told], lambda asking: asyncio.gather(*asking))
        for caller in client.callers:
            await caller.close()
        assert client.process.wait(90) == code
        assert not alive(client)
        assert "Traceback" not in client.log.read_text()


async def test_a_worker_that_is_told_to_end_is_replaced_and_loses_nothing(repository):
    async with two_workers(repository) as client:
        worker = workers_of(client)[0]

        async def replaced(asking):
            await until(lambda: not psutil.pid_exists(worker) and len(workers_of(client)) >= 3)
            assert not any(task.done() for task in asking)
            client.process.terminate()
            await asyncio.gather(*asking)

        await drained(client, lambda: os.kill(worker, signal.SIGTERM), replaced)
        assert f"worker {worker} ended with exit code 0; another takes its place" in client.log.read_text()


async def test_a_worker_that_cannot_rank_gets_no_connections_while_another_can(repository, tmp_path):
    models = shutil.copytree(repository, tmp_path / "models")
    async with two_workers(models) as client:
        models.rename(tmp_path / "away")
        victim = workers_of(client)[0]
        os.kill(victim, signal.SIGKILL)
        await until(lambda: len(workers_of(client)) >= 3)
        for _ in range(40):
            caller = Caller(client)
            assert await caller.ask("/readyz") == 200
            await caller.close()
            await asyncio.sleep(0.05)
        (tmp_path / "away").rename(models)
        callers = client.callers
        await until_spread(client, callers, [4, 4])  # it can rank now, and gets its share
        assert f"worker {victim} ended with exit code -9; another takes its place" in client.log.read_text()


async def test_a_worker_that_stands_still_gets_no_new_connections_and_answers_its_own_later(pair):
    standing = alive(pair)[0]
    os.kill(standing, signal.SIGSTOP)
    try:
        asking = [asyncio.create_task(caller.ask()) for caller in pair.callers]
        await until(lambda: sum(task.done() for task in asking) >= 4)
        await asyncio.sleep(SILENT_SECONDS + 0.5)
        for _ in range(10):
            caller = Caller(pair)
            async with asyncio.timeout(90):
                assert await caller.ask() == 200
            await caller.close()
    finally:
        os.kill(standing, signal.SIGCONT)
    assert await asyncio.gather(*asking) == [200] * 8


async def test_connections_that_no_file_descriptor_was_left_for_are_not_counted_as_open(pair):
    limits = {pid: psutil.Process(pid).rlimit(psutil.RLIMIT_NOFILE) for pid in alive(pair)}
    for pid in limits:
        psutil.Process(pid).rlimit(psutil.RLIMIT_NOFILE, (psutil.Process(pid).num_fds() + 2, limits[pid][1]))
    refused = [Caller(pair) for _ in range(30)]
    await asyncio.gather(*(caller.ask() for caller in refused), return_exceptions=True)
    for caller in refused:
        await caller.close()
    for pid, limit in limits.items():
        psutil.Process(pid).rlimit(psutil.RLIMIT_NOFILE, limit)
    await until_both_are_ready(pair)
    await until_spread(pair, pair.callers, [4, 4])
    assert "Traceback" not in pair.log.read_text()


def counts_of(client):
    """The folder that the workers count in."""
    variables = dict(line.partition("=")[::2] for line in Path(f"/proc/{workers_of(client)[-1]}/environ").read_text().split("\0"))
    return Path(variables["PROMETHEUS_MULTIPROC_DIR"])


async def test_metrics_whose_files_were_removed_are_told_as_lost(repository):
    async with two_workers(repository) as client:
        folder = counts_of(client)
        for gone in (lambda: [path.unlink() for path in folder.glob("*.db")], lambda: shutil.rmtree(folder)):
            gone()
            answer = await client.get("/metrics")
            assert (answer.status_code, answer.json()["code"]) == (503, "metrics_gone")
            assert str(folder) not in answer.text
        assert "restart the service" in client.log.read_text()
        os.kill(workers_of(client)[0], signal.SIGKILL)
        async with asyncio.timeout(PATIENCE):
            while len(workers_of(client)) < 3:  # one that takes a dead one's place can start all the same
                await asyncio.sleep(0.05)
        assert {(await client.get("/metrics", headers={"connection": "close"})).status_code for _ in range(4)} == {503}


async def test_a_folder_of_counts_that_is_inherited_is_not_used(repository, tmp_path, monkeypatch):
    folders = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path), "prometheus_multiproc_dir": str(tmp_path / "never-made")}
    monkeypatch.setattr(processes, "environment", lambda **settings: environment(**settings) | folders)
    async with serving(repository, "memory://") as client:
        assert (await client.get("/metrics")).status_code == 200
    assert not list(tmp_path.iterdir())


async def test_ctrl_c_ends_all_processes_without_a_traceback(repository):
    async with two_workers(repository) as client:
        await client.callers[0].ask()
        for pid in (client.process.pid, *workers_of(client)):  # as a terminal does
            os.kill(pid, signal.SIGINT)
        assert client.process.wait(90) == 0
        assert not any(psutil.pid_exists(pid) for pid in workers_of(client))
        assert "Traceback" not in client.log.read_text()


async def test_ctrl_c_while_workers_start_ends_all_without_a_traceback(repository):
    settings = environment(models=repository, redis="memory://", port=free_port(), workers=2)
    process = subprocess.Popen(SERVE, env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    await until(lambda: len([child for child in psutil.Process(process.pid).children() if "spawn_main" in "".join(child.cmdline())]) >= 2)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = await asyncio.to_thread(process.communicate, timeout=15)
    assert process.returncode == 0, said
    assert b"Traceback" not in said


async def test_workers_end_when_their_parent_is_killed(repository):
    async with two_workers(repository) as client:
        await client.callers[0].ask()
        client.process.kill()
        await until(lambda: not any(psutil.pid_exists(pid) for pid in workers_of(client)))
        assert "Traceback" not in client.log.read_text()


async def test_a_worker_that_cannot_start_ends_the_service_and_says_why(tmp_path):
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('this one is broken')")
    settings = environment(models=tmp_path, redis="memory://", port=free_port(), workers=2)
    settings["PYTHONPATH"] = f"{tmp_path}:{settings['PYTHONPATH']}"
    done = await asyncio.to_thread(subprocess.run, SERVE, env=settings, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 3
    assert "this one is broken" in done.stderr
    assert "ended with exit code 1 before any was ready; its log above says why" in done.stderr


async def test_a_process_has_no_threads_but_its_own_and_says_what_it_was_sized_to(repository):
    async with serving(repository, "memory://", threads=1) as client:
        await client.rank()
        # The loop, asyncio's for blocking work, one that onnxruntime starts when it is imported, and two that load versions.
        assert psutil.Process(client.process.pid).num_threads() <= 5
        count = len(os.sched_getaffinity(0))
        assert re.search(rf"[1-{count}] processor\(s\) by (affinity|quota); 1 x 1 requests scored at once", client.log.read_text())
        assert "more is scored at once" not in client.log.read_text()


def test_more_workers_than_processors_are_warned_of(caplog):
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(mine)})
    try:
        with caplog.at_level("INFO"):
            _tell_threads(Settings(workers=2))
    finally:
        os.sched_setaffinity(0, mine)
    assert "1 processor(s) by affinity; 2 x 1 requests" in caplog.text
    assert "answers wait for each other; lower --workers to 1" in caplog.text


async def test_it_listens_on_ipv6(repository):
    with contextlib.closing(socket.socket(socket.AF_INET6)) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("this machine has no IPv6")
    async with serving(repository, "memory://", host="::1", workers=2) as client:
        assert (await client.get("/livez")).status_code == 200
        assert f"listening on http://[::1]:{client.base_url.port}" in client.log.read_text()


async def test_all_addresses_of_a_name_are_listened_on():
    addresses = {info[4][0] for info in socket.getaddrinfo("localhost", 1, type=socket.SOCK_STREAM)}
    listeners = listen(Settings(host="localhost", port=free_port()))
    try:
        assert {listener.getsockname()[0] for listener in listeners} <= addresses
        assert "127.0.0.1" in {listener.getsockname()[0] for listener in listeners}
        assert all(listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for listener in listeners)
    finally:
        for listener in listeners:
            listener.close()


@pytest.mark.parametrize("host", ["192.0.2.1", "nowhere.invalid"])
async def test_an_address_that_is_not_ours_is_refused_with_a_sentence(host):
    with pytest.raises(ListenError, match=rf"^cannot listen on {host} port 8000: .+; choose another with --host and --port"):
        listen(Settings(host=host, port=8000))
