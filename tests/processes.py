"""Real servers in processes of their own, for the tests that need them."""

import asyncio
import contextlib
import ctypes
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import bundles
import httpx
from conftest import Client, free_port, until_ready

from features.state import Ad, UserState
from service.store.redis import RedisStore

ROOT = Path(__file__).parent.parent
PR_CAPBSET_DROP = 24  # of prctl.h
PATIENCE = 90
"""Seconds that what must happen may take before a test gives up: neighbours may hold a machine up for long."""
FOREIGN = ("ADRANK_", "PROMETHEUS_", "OMP_")
"""What variables begin with that a server inherits in no test."""
SERVE = (sys.executable, "-m", "adrank", "serve")


def environment(**settings: Any) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    settings = {**bundles.settled(settings.get("models")), **settings}
    return clean | {"PYTHONPATH": str(ROOT)} | {f"ADRANK_{name.upper()}": str(value) for name, value in settings.items()}


@contextlib.asynccontextmanager
async def serving(models: Path, redis: str, **settings: Any) -> AsyncIterator[Client]:
    """The server, and a client of it, once it is ready; its log goes to a file."""
    port, host = free_port(), settings.get("host", "127.0.0.1")
    log = models.parent / f"log-{port}"
    with log.open("wb") as out:
        process = subprocess.Popen(SERVE, env=environment(models=models, redis=redis, port=port, **settings), stderr=out, stdout=out)
    try:
        async with Client(base_url=f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}", timeout=20) as client:
            client.process, client.log = process, log
            async with asyncio.timeout(PATIENCE):
                while process.poll() is None:
                    with contextlib.suppress(httpx.TransportError):
                        await client.get("/livez")
                        break
                    await asyncio.sleep(0.05)
            assert process.poll() is None, log.read_text()
            await until_ready(client)
            yield client
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        process.wait(90)


async def fill(url: str) -> None:
    store = RedisStore(url, timeout=2, ttl=1000, on_damaged=lambda: None)
    await store.put_users((f"u{i}", UserState({"age": ("25", "35")[i % 2], "income": float(i)}, [f"a{i % 30}"], [1])) for i in range(60))
    await store.put_ads(Ad(ad_id, features) for ad_id, features in bundles.ADS.items())
    await store.close()


def workers_of(client: Client) -> list[int]:
    """Ids of the worker processes that ever started, in the order of their starting."""
    return [int(pid) for pid in re.findall(r"Started server process \[(\d+)\]", client.log.read_text())]


@contextlib.contextmanager
def ended(process: "subprocess.Popen[Any]") -> Iterator["subprocess.Popen[Any]"]:
    """The process, which is told to end in the end, and killed if it does not: `with Popen` would wait for ever, and hide what failed."""
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.communicate(timeout=PATIENCE)
        finally:
            process.kill()


def without_privileges() -> None:
    """Take away root's right to read and write everything: for `preexec_fn`, so that tests find what any other user would."""
    for capability in range(64):
        ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)


def adrank(*words: object, unset: Sequence[str] = (), **variables: str) -> "subprocess.CompletedProcess[str]":
    """What `adrank` answers to who may not do what files do not allow, with these variables and without those."""
    given = {name: value for name, value in environment().items() if name not in unset} | variables
    command = [sys.executable, "-m", "adrank", *map(str, words)]
    return subprocess.run(command, env=given, capture_output=True, text=True, check=False, preexec_fn=without_privileges, timeout=60)
