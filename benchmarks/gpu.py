"""Scoring and training on a GPU, against what the device could do and beside the CPU.

Scoring: the service's tiles against the row-wise graph, torch and torch.compile. Training: steps of `fit_network`.

python -m benchmarks.gpu --json data/bench/gpu.json
python -m benchmarks.gpu --device cpu --requests 1 --requests 4 --candidates 50 --rounds 3     without a GPU: that it runs, no figures
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from adrank_bench.bench import write
from features.bundle import CUDA_MODEL
from features.encode import Feeds
from features.vocabulary import Numbers
from service.ranking.scorer import CUDA_OPTIONS, PROVIDERS, TiledScorer
from training.export.export import ServedNetwork
from training.progress import progress_bar

from .benchmark_models import BENCHMARK_MODELS, FOLDER, Built, build, make
from .rowwise import repeated
from .scoring import requests as random_requests
from .training import BATCH, DrawnRows, in_turns, ours

REQUESTS = (1, 2, 4, 8, 16, 32, 64)
CANDIDATES = (50, 200, 500)
COPIED_BYTES, MULTIPLIED = 2**28, 4096
TRAINING_ROUNDS = 5
TRAINED = {"deepfm": 0, "din": 50, "dcn_v2": 0}
"""Networks that are trained, and the longest history of their rows."""

Together = Callable[[Sequence[Feeds]], Sequence[Numbers]]


@dataclass(frozen=True)
class Device:
    """What was measured of a device: bytes a second that a copy reads and writes, float32 operations a second of a product."""

    name: str
    bytes_a_second: float
    flops: float


@dataclass(frozen=True)
class GpuTiming:
    """Requests scored together by one contender. `floor_ms` is the device's least for the arithmetic and the memory they need."""

    benchmark_model: str
    contender: str
    requests: int
    candidates: int
    p50_ms: float
    p99_ms: float
    candidates_a_second: float
    floor_ms: float
    difference: float
    """Largest difference of a probability from torch on the CPU."""


def tiles(built: Built, device: str) -> Together:
    """As the service scores on the device."""
    scorer = TiledScorer(built.bundle / CUDA_MODEL, device, built.benchmark_model.population.schema.history_length)
    return lambda together: [scores[0] for scores in scorer.submit(together).result()]


def rowwise(built: Built, device: str) -> Together:
    """The row-wise graph in ONNX Runtime, all candidates of all requests below each other."""
    options = CUDA_OPTIONS if device == "cuda" else {}
    session = onnxruntime.InferenceSession(built.rowwise, providers=[(PROVIDERS[device], options)])

    def score(together: Sequence[Feeds]) -> Sequence[Numbers]:
        rows = [repeated(feeds) for feeds in together]
        scores = session.run(None, {name: np.concatenate([feeds[name] for feeds in rows]) for name in rows[0]})[0]
        return np.split(scores, len(together))

    return score


def in_torch(served: ServedNetwork, device: str, compiled: bool) -> Together:
    """The network itself, requests of one size stacked."""
    network = torch.compile(served.to(device), dynamic=False) if compiled else served.to(device)

    def score(together: Sequence[Feeds]) -> Sequence[Numbers]:
        stacked = {name: torch.from_numpy(np.concatenate([feeds[name] for feeds in together])) for name in together[0]}
        with torch.no_grad(), torch.device(device):
            return list(network({name: tensor.to(device) for name, tensor in stacked.items()})[0].cpu().numpy())

    return score


def contenders(built: Built, device: str) -> dict[str, Together]:
    """All of them, ready to score."""
    return {
        "tiles": tiles(built, device),
        "row-wise": rowwise(built, device),
        "torch": in_torch(make(built.benchmark_model), device, compiled=False),
        "torch.compile": in_torch(make(built.benchmark_model), device, compiled=True),
    }


def device_speed(device: str, seconds: float = 1.0) -> Device:
    """Measured with torch: a copy within the device's memory, and a product of square matrices without tensor cores' rounding."""
    source, target = (torch.zeros(COPIED_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    a, b = (torch.rand((MULTIPLIED, MULTIPLIED), device=device) for _ in range(2))
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    copies = _fastest(lambda: target.copy_(source), device, seconds)
    return Device(name, 2 * COPIED_BYTES / copies, 2 * MULTIPLIED**3 / _fastest(lambda: a @ b, device, seconds))


def _fastest(work: Callable[[], object], device: str, seconds: float) -> float:
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until or best == float("inf"):
        began = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return best


def floor(served: ServedNetwork, feeds: Feeds, speed: Device) -> float:
    """Seconds that one request takes at least: its products at full speed, or its vectors and tensors read once, whichever is longer."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        served({name: torch.from_numpy(tensor) for name, tensor in feeds.items()})
    width = max(module.embedding_dim for module in served.modules() if isinstance(module, torch.nn.Embedding))
    vectors = sum(tensor.size for name, tensor in feeds.items() if name.endswith("_ids")) * width * 4
    touched = vectors + sum(tensor.nbytes for tensor in feeds.values())
    return float(max(counter.get_total_flops() / speed.flops, touched / speed.bytes_a_second))


def measure(
    built: Built, device: str, speed: Device, sizes: Mapping[str, Sequence[int]], rounds: int, progress: Progress
) -> list[GpuTiming]:
    """Every contender at every size, taking turns."""
    benchmark_model = built.benchmark_model
    reference = make(benchmark_model)
    together = contenders(built, device)
    full, timings = benchmark_model.population.schema.history_length, []
    grid = [(count, candidates) for candidates in sizes["candidates"] for count in sizes["requests"]]
    for count, candidates in progress.track(grid, description=f"{benchmark_model.name} on {speed.name}"):
        feeds = random_requests(built, candidates, full, count)
        expected = in_torch(reference, "cpu", compiled=False)(feeds)
        least = count * floor(reference, feeds[0], speed)
        off = {name: _difference(score(feeds), expected) for name, score in together.items()}
        seconds: dict[str, list[float]] = {name: [] for name in together}
        for _ in range(rounds):
            for name, score in together.items():
                began = time.perf_counter()
                score(feeds)
                seconds[name].append(time.perf_counter() - began)
        for name, taken in seconds.items():
            p50, p99 = np.quantile(taken, (0.5, 0.99)).tolist()
            rate = count * candidates / p50
            timings.append(GpuTiming(benchmark_model.name, name, count, candidates, p50 * 1e3, p99 * 1e3, rate, least * 1e3, off[name]))
    return timings


def training_speed(device: str, rounds: int) -> dict[str, dict[str, float]]:
    """Rows a second of a training's steps, by network: on the CPU, on the device, and there in bfloat16."""
    found = {}
    for family, history in TRAINED.items():
        data = DrawnRows.of(history)
        given: dict[str, dict[str, Any]] = {"cpu": {}, device: {"device": device}, f"{device}, amp": {"device": device, "amp": True}}
        steps = {name: ours(data, data.network(family), **each) for name, each in given.items()}
        found[family] = {name: BATCH / float(np.median(each)) for name, each in in_turns(steps, rounds, time.perf_counter).items()}
    return found


def _difference(scores: Sequence[Numbers], expected: Sequence[Numbers]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(scores, expected, strict=True))


def show(timings: Sequence[GpuTiming], trained: Mapping[str, Mapping[str, float]], speed: Device, console: Console) -> None:
    """A table of all scoring, and a line a network that was trained."""
    console.print(f"{speed.name}: copies {speed.bytes_a_second / 1e9:,.0f} GB/s, multiplies {speed.flops / 1e12:,.1f} TFLOP/s (float32)")
    table = Table("model", "contender", "requests", "C", "p50 ms", "p99 ms", "candidates/s", "× floor", "max diff")
    for t in timings:
        figures = (f"{t.p50_ms:.3f}", f"{t.p99_ms:.3f}", f"{t.candidates_a_second:,.0f}", f"{t.p50_ms / t.floor_ms:.1f}")
        table.add_row(t.benchmark_model, t.contender, str(t.requests), str(t.candidates), *figures, f"{t.difference:.1e}")
    console.print(table)
    for family, rates in trained.items():
        console.print(f"training {family}: " + ", ".join(f"{name} {rate:,.0f} rows/s" for name, rate in rates.items()))


def missing(device: str) -> str | None:
    """What keeps the device from being measured."""
    if device == "cuda" and not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if PROVIDERS[device] not in onnxruntime.get_available_providers():
        return f"this onnxruntime lacks {PROVIDERS[device]}; the README says how to install adrank[gpu]"
    return None


@click.command()
@click.option("--device", type=click.Choice(list(PROVIDERS)), default="cuda", show_default=True)
@click.option("--model", "names", type=click.Choice(list(BENCHMARK_MODELS)), multiple=True, help="Default: both.")
@click.option("--requests", "counts", type=click.IntRange(min=1), multiple=True, default=REQUESTS, show_default=True)
@click.option("--candidates", type=click.IntRange(min=1), multiple=True, default=CANDIDATES, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=200, show_default=True)
@click.option("--dir", "folder", type=click.Path(file_okay=False, path_type=Path), default=FOLDER, show_default=True)
@click.option("--json", "target", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures here too.")
def main(
    device: str,
    names: Sequence[str],
    counts: Sequence[int],
    candidates: Sequence[int],
    rounds: int,
    folder: Path,
    target: Path | None,
) -> None:
    """Cost of scoring and of training on a GPU."""
    if why := missing(device):
        print(f"nothing is measured: {why}")
        return
    speed, timings = device_speed(device), list[GpuTiming]()
    with progress_bar() as progress:
        for name in names or BENCHMARK_MODELS:
            sizes = {"requests": counts, "candidates": candidates}
            timings += measure(build(BENCHMARK_MODELS[name](), folder), device, speed, sizes, rounds, progress)
    trained = training_speed(device, min(rounds, TRAINING_ROUNDS))
    show(timings, trained, speed, Console())
    write({"device": asdict(speed), "timings": [asdict(timing) for timing in timings], "training": trained}, target)


if __name__ == "__main__":
    main()
