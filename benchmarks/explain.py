"""What `explain` costs: whole requests, explained and plain in turn, by a service in this process on a store in memory.

python -m benchmarks.explain --rounds 20
"""

import asyncio
import json
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table
from starlette.types import ASGIApp, Message

from adrank_bench.traffic import Entities, bodies
from features.bundle import EXPLAIN_MODEL, MANIFEST, publish
from features.state import MemoryStore
from service.app import create_app
from service.settings import Settings
from training.export.explain import explain_graph
from training.export.export import FEW, random_feeds

from .benchmark_models import BENCHMARK_MODELS, BenchmarkModel, build, make

CANDIDATES, USERS, TURN = 50, 200, 20
Seconds = dict[str, list[list[float]]]


def publish_explaining(benchmark_model: BenchmarkModel, models: Path) -> dict[str, int]:
    """Publish the benchmark model with an `explain.onnx`; bytes of both graphs."""
    served, built = make(benchmark_model), build(benchmark_model)
    cases = [random_feeds(served.schema, benchmark_model.population.heights, *shape) for shape in FEW]
    graph, outputs = explain_graph(served.network, served.schema, cases)  # type: ignore[arg-type]  # a benchmark_model's is a `Network`
    files = {path.name: path.read_bytes() for path in built.bundle.iterdir() if path.name != MANIFEST}
    publish(models, benchmark_model.name, {**files, **graph}, {"explains": outputs})
    return {"model.onnx": built.graph.stat().st_size, EXPLAIN_MODEL: len(graph[EXPLAIN_MODEL])}


async def ask(app: ASGIApp, body: bytes) -> bytes:
    """The answer to one ranking."""
    sent: list[Message] = []
    received = [{"type": "http.request", "body": body}]

    async def receive() -> Any:
        return received.pop() if received else {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    scope = {"type": "http", "method": "POST", "path": "/rank", "query_string": b"", "headers": headers, "client": ("127.0.0.1", 1)}
    await app({**scope, "http_version": "1.1", "scheme": "http", "root_path": "", "state": {}}, receive, send)
    return b"".join(message.get("body", b"") for message in sent)


async def measure(benchmark_model: BenchmarkModel, models: Path, rounds: int) -> Seconds:
    """CPU and wall seconds a request `(2,)` of each round, explained and plain."""
    population, store = benchmark_model.population, MemoryStore()
    users = list(islice(population.users(), USERS))
    await store.put_ads(population.ads())
    await store.put_users(users)
    plain = bodies(Entities([user_id for user_id, _ in users], population.ad_ids), CANDIDATES)[:TURN]
    turns = {"plain": plain, "explained": [json.dumps({**json.loads(body), "options": {"explain": True}}).encode() for body in plain]}
    app, seconds = create_app(Settings(models=models, redis="memory://"), store), {name: list[list[float]]() for name in turns}
    async with app.router.lifespan_context(app):
        while b'"contributions":{' not in (answer := await ask(app, turns["explained"][0])) and b'"attention":[' not in answer:
            await asyncio.sleep(0.2)
        for i in range(rounds):
            for name in turns if i % 2 else reversed(turns):
                began = time.process_time(), time.perf_counter()
                for body in turns[name]:
                    await ask(app, body)
                spent = time.process_time() - began[0], time.perf_counter() - began[1]
                seconds[name].append([each / TURN for each in spent])
    return seconds


@click.command()
@click.option("--rounds", type=click.IntRange(min=3), default=20, show_default=True)
def main(rounds: int) -> None:
    """What an explained request costs beside a plain one."""
    table = Table("model", "graphs, MB", "plain µs", "explained µs", "explained costs", "by the clock")
    for benchmark_model in (make_one() for make_one in BENCHMARK_MODELS.values()):
        with tempfile.TemporaryDirectory() as models:
            sizes = publish_explaining(benchmark_model, Path(models))
            seconds = {name: np.array(taken) for name, taken in asyncio.run(measure(benchmark_model, Path(models), rounds)).items()}
        ratios = np.quantile(seconds["explained"] / seconds["plain"], (0.5, 0.1, 0.9), axis=0).T
        spreads = [f"{middle:.2f} ({low:.2f}–{high:.2f}) times" for middle, low, high in ratios]
        cpu = [f"{np.median(seconds[name][:, 0]) * 1e6:,.0f}" for name in ("plain", "explained")]
        table.add_row(benchmark_model.name, " + ".join(f"{size / 1e6:.1f}" for size in sizes.values()), *cpu, *spreads)
    Console().print(table)


if __name__ == "__main__":
    main()
