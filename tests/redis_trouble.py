"""Fail-overs and resharding beside a real service under load, on loopback: how long they take, what fails, what is lost.

    make redis-test ARGS='--rounds 5'

`down-after-milliseconds` of the sentinels and `cluster-node-timeout` are one second here; what they are elsewhere comes on top. A trouble
that rankings do not survive, or that does not end, is a failure: exit code 1.
"""

import argparse
import asyncio
import contextlib
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bundles
from processes import fill, serving
from redis.crc import REDIS_CLUSTER_HASH_SLOTS as SLOTS
from redis_load import Load, kept, load
from redis_servers import Nodes, Sentinels

from features.streams import EVENTS

USERS = [f"u{i}" for i in range(60)]
MOVED = 600
"""Slots that are moved in one round of resharding, of those of one node."""
REPLICATED = ("--min-replicas-to-write", "1", "--min-replicas-max-lag", "10")


@dataclass
class Trouble:
    """What came of one round."""

    seconds: float
    ranked: int
    degraded: int
    failed: int
    refused: int
    acknowledged: int
    lost: int
    reasons: Counter[str]


async def measure(servers: Any, models: Path, cause: Callable[[Any], Awaitable[None]], again: Callable[[Any], str]) -> Trouble:
    """Cause a trouble under load, wait until it is over, and count. `again` says where to look for the events afterwards."""
    await fill(servers.url)
    async with serving(models, servers.url) as client, load(client, USERS) as made:
        await made.until(events=200)
        began = time.monotonic()
        await cause(servers)
        seconds = await made.recovered(began)
        await asyncio.sleep(0.5)
    assert "Traceback" not in client.log.read_text(), client.log
    return _counted(made, seconds, await asyncio.to_thread(kept, again(servers)))


def _counted(made: Load, seconds: float, found: set[str]) -> Trouble:
    failed = sum(each.status != 200 for each in made.ranked) + sum(status != 503 for _, status, _ in made.refused)
    lost = len(made.acknowledged.keys() - found)
    reasons = Counter(reason for each in made.degraded() for reason in set(each.degraded))
    return Trouble(seconds, len(made.ranked), len(made.degraded()), failed, len(made.refused), len(made.acknowledged), lost, reasons)


async def killed(sentinels: Sentinels) -> None:
    sentinels.primary.signal(signal.SIGKILL)


async def frozen(sentinels: Sentinels) -> None:
    sentinels.primary.pause()


async def in_peace(sentinels: Sentinels) -> None:
    await asyncio.to_thread(sentinels.fail_over)


async def paused(sentinels: Sentinels) -> None:
    def fail_over() -> None:
        sentinels.ask(sentinels.primary.port, "CLIENT", "PAUSE", "5000", "WRITE")
        sentinels.fail_over()

    await asyncio.to_thread(fail_over)


async def node_killed(nodes: Nodes) -> None:
    nodes.nodes[nodes.owner(EVENTS)].signal(signal.SIGKILL)


async def resharded(nodes: Nodes) -> None:
    def move() -> None:
        for slot in range(MOVED):
            nodes.move(SLOTS // 3 + slot, 1, 2)

    await asyncio.to_thread(move)


def url_of(servers: Any) -> str:
    return str(servers.url)


def another(nodes: Nodes) -> str:
    return f"redis+cluster://127.0.0.1:{nodes.nodes[(nodes.owner(EVENTS) + 1) % 3].port}"


TROUBLES: dict[str, tuple[Callable[[Path], Any], Callable[[Any], Awaitable[None]], Callable[[Any], str]]] = {
    "Sentinel: primary killed": (Sentinels, killed, url_of),
    "Sentinel: primary killed, min-replicas-to-write 1": (lambda folder: Sentinels(folder, *REPLICATED), killed, url_of),
    "Sentinel: primary frozen": (Sentinels, frozen, url_of),
    "Sentinel: fail-over asked for": (Sentinels, in_peace, url_of),
    "Sentinel: the same after CLIENT PAUSE 5000 WRITE": (Sentinels, paused, url_of),
    "Cluster: node killed, with a replica": (lambda folder: Nodes(folder, replicas_of=(0, 1, 2)), node_killed, another),
    f"Cluster: {MOVED} slots moved": (Nodes, resharded, url_of),
}


async def one(name: str) -> Trouble:
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        models = Path(folder) / "models"
        models.mkdir()
        bundles.publish(models, "din")
        make, cause, again = TROUBLES[name]
        servers = make(Path(folder))
        stack.callback(servers.stop)
        return await measure(servers, models, cause, again)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--only", default="", help="a part of the names of troubles")
    chosen = options.parse_args()
    failed = False
    print(f"{'':50} {'seconds to recover':22} rankings degraded failed | events acknowledged refused lost")
    for name in (name for name in TROUBLES if chosen.only in name):
        rounds = [asyncio.run(one(name)) for _ in range(chosen.rounds)]
        times = [each.seconds for each in rounds]
        sums = [
            sum(getattr(each, field) for each in rounds) for field in ("ranked", "degraded", "failed", "acknowledged", "refused", "lost")
        ]
        why = ", ".join(f"{reason} {count}" for reason, count in sum((each.reasons for each in rounds), Counter()).items())
        spread = f"{statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f})"
        print(f"{name:50} {spread:22} {sums[0]:8} {sums[1]:8} {sums[2]:6} | {sums[3]:19} {sums[4]:7} {sums[5]:4}  {why}", flush=True)
        failed |= sums[2] > 0
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
