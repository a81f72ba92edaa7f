"""The exported graph and its int8 form against the row-wise ones: one thread of ONNX Runtime, CPU time, interleaved rounds.

python -m benchmarks.scoring --rounds 30 --json data/bench/scoring.json
python -m benchmarks.scoring --model din-100 --variant plain=model.cuda.onnx
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from adrank_bench.bench import write
from features.encode import Feeds
from service.ranking.scorer import Scorer
from training.export.export import random_feeds
from training.progress import progress_bar

from .benchmark_models import BENCHMARK_MODELS, FOLDER, BenchmarkModel, Built, build, din_100
from .rowwise import repeated

OURS, INT8, ROWWISE, TEXTBOOK = "exported", "int8", "row-wise", "textbook"
COMPARED = (50, 200, 500)
CANDIDATES = (50, 100, 200, 500, 1_000, 2_000, 5_000)
HISTORIES = (0, 25, 50, 100, 200, 500, 1_000)
SCORED: Mapping[str, Callable[[], BenchmarkModel]] = {**BENCHMARK_MODELS, "din-sdim": lambda: din_100(long="sdim")}
REQUESTS = 6
ROUND_SECONDS = 0.05
"""CPU time of one graph's turn in a round: long enough for the clock, short enough that both see the same machine."""

Score = Callable[[Feeds], np.ndarray[Any, np.dtype[np.float32]]]


@dataclass(frozen=True)
class Timing:
    """What a graph took at one size: medians over the rounds, in microseconds of CPU, and how many times longer others took.

    Of the ratios the median over the rounds, and the 10th and 90th percentile.
    """

    benchmark_model: str
    graph: str
    candidates: int
    behaviours: int
    request_us: float
    candidate_us: float
    textbook: Sequence[float] = ()
    rowwise: Sequence[float] = ()
    difference: float | None = None
    """Largest difference of a probability from the textbook graph's."""


def scores_of(graph: Path) -> Score:
    """A graph of the request layout, as the service runs it."""
    scorer = Scorer(graph, "cpu", 1)
    return scorer.score


def scores_rowwise(graph: Path) -> Score:
    """The row-wise graph in a session with the service's options; its feeds are `repeated` ones."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return lambda feeds: session.run(None, feeds)[0][None]


def requests(built: Built, candidates: int, behaviours: int, count: int = REQUESTS) -> list[Feeds]:
    """Random requests of one user each; no behaviours are one that is padding, as the service sends it."""
    population = built.benchmark_model.population
    found = [random_feeds(population.schema, population.heights, 1, max(behaviours, 1), candidates, seed) for seed in range(count)]
    if behaviours == 0 and population.schema.history:
        for feeds in found:
            feeds["history_ids"][:] = 0
    return found


def turn(score: Score, feeds: Sequence[Feeds], seconds: float) -> float:
    """Mean CPU seconds of a run, over whole passes through the requests that take about `seconds`."""
    began, runs = time.process_time(), 0
    while (spent := time.process_time() - began) < seconds or not runs:
        for one in feeds:
            score(one)
        runs += len(feeds)
    return spent / runs


def rounds_of(graphs: Mapping[str, tuple[Score, Sequence[Feeds]]], rounds: int) -> dict[str, Any]:
    """Seconds a run `(rounds,)` by graph, the graphs taking turns, their order changing."""
    seconds: dict[str, list[float]] = {name: [] for name in graphs}
    for score, feeds in graphs.values():
        for one in feeds:
            score(one)
    order = list(graphs)
    for _ in range(rounds):
        for name in order:
            seconds[name].append(turn(*graphs[name], ROUND_SECONDS))
        order.reverse()
    return {name: np.array(taken) for name, taken in seconds.items()}


def compare(built: Built, graphs: Mapping[str, Score], peers: Mapping[str, Score], candidates: int, rounds: int) -> list[Timing]:
    """Every graph and the row-wise peers at one size."""
    behaviours = built.benchmark_model.population.schema.history_length
    ours = requests(built, candidates, behaviours)
    theirs = [repeated(feeds) for feeds in ours]
    turns = {**{name: (score, ours) for name, score in graphs.items()}, **{name: (score, theirs) for name, score in peers.items()}}
    seconds = rounds_of(turns, rounds)
    expected = [peers[TEXTBOOK](feeds) for feeds in theirs]
    timings = []
    for name, taken in seconds.items():
        off = max(float(np.abs(turns[name][0](feeds) - b).max()) for feeds, b in zip(turns[name][1], expected, strict=True))
        ratios = [np.quantile(seconds[peer] / taken, (0.5, 0.1, 0.9)).tolist() for peer in (TEXTBOOK, ROWWISE)]
        timings.append(_timing(built, name, candidates, behaviours, taken, (*ratios, off)))
    return timings


def _timing(built: Built, graph: str, candidates: int, behaviours: int, seconds: Any, compared: Sequence[Any] = ()) -> Timing:
    request = float(np.median(seconds)) * 1e6
    return Timing(built.benchmark_model.name, graph, candidates, behaviours, round(request, 1), round(request / candidates, 4), *compared)


def measure(built: Built, variants: Mapping[str, Path], rounds: int, progress: Progress) -> list[Timing]:
    """The exported graph and its variants against the row-wise ones, then alone over candidates and over history lengths."""
    graphs = {name: scores_of(path) for name, path in {OURS: built.graph, **({INT8: built.int8} if built.int8 else {}), **variants}.items()}
    peers = {TEXTBOOK: scores_rowwise(built.textbook), ROWWISE: scores_rowwise(built.rowwise)}
    full = built.benchmark_model.population.schema.history_length
    timings = []
    for candidates in progress.track(COMPARED, description=f"{built.benchmark_model.name} against row-wise"):
        timings += compare(built, graphs, peers, candidates, rounds)
    sizes = [(candidates, full) for candidates in CANDIDATES if candidates not in COMPARED]
    sizes += [(200, behaviours) for behaviours in HISTORIES if full and behaviours != full]
    for candidates, behaviours in progress.track(sizes, description=f"{built.benchmark_model.name} over sizes"):
        feeds = requests(built, candidates, behaviours)
        seconds = rounds_of({name: (score, feeds) for name, score in graphs.items()}, max(3, rounds // 3))
        timings += [_timing(built, name, candidates, behaviours, taken) for name, taken in seconds.items()]
    return timings


def show(timings: Sequence[Timing], console: Console) -> None:
    """A table of all."""
    table = Table("model", "graph", "C", "T", "µs", "µs / C", "× textbook", "× row-wise", "max diff")
    for t in timings:
        sizes = (t.benchmark_model, t.graph, str(t.candidates), str(t.behaviours), f"{t.request_us:,.0f}", f"{t.candidate_us:.2f}")
        ratios = ("{:.2f} ({:.2f}–{:.2f})".format(*ratio) if ratio else "" for ratio in (t.textbook, t.rowwise))
        table.add_row(*sizes, *ratios, "" if t.difference is None else f"{t.difference:.1e}")
    for column in table.columns:
        column.no_wrap = True
    console.print(table)


@click.command()
@click.option("--model", "names", type=click.Choice(list(SCORED)), multiple=True, help="Default: all.")
@click.option("--variant", "given", multiple=True, metavar="NAME=FILE", help="Another graph: a file of the bundle, or a path.")
@click.option("--rounds", type=click.IntRange(min=3), default=20, show_default=True)
@click.option("--dir", "folder", type=click.Path(file_okay=False, path_type=Path), default=FOLDER, show_default=True)
@click.option("--json", "target", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures here too.")
def main(names: Sequence[str], given: Sequence[str], rounds: int, folder: Path, target: Path | None) -> None:
    """Cost of scoring, exported against row-wise."""
    timings: list[Timing] = []
    with progress_bar() as progress:
        for name in names or SCORED:
            built = build(SCORED[name](), folder)
            timings += measure(built, _variants(given, built.bundle), rounds, progress)
    show(timings, Console(width=max(Console().width, 120)))
    write([asdict(timing) for timing in timings], target)


def _variants(given: Sequence[str], bundle: Path) -> dict[str, Path]:
    variants = {}
    for text in given:
        name, equals, file = text.partition("=")
        path = next((path for path in (bundle / file, Path(file)) if equals and path.is_file()), None)
        if path is None:
            raise click.BadParameter(f"{text}: expected NAME=FILE, a file of {bundle} or a path", param_hint="--variant")
        variants[name] = path
    return variants


if __name__ == "__main__":
    main()
