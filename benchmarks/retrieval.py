"""What it costs to rank the whole catalogue: CPU of a request that retrieves and ranks K ads, beside one that lists as many.

In this process, without HTTP: two_tower retrieves and ranks, and requests of each kind take turns.

    python -m benchmarks.retrieval --ads 1000000
"""

import asyncio
import gc
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
import psutil
from rich.console import Console

from features.bundle import AD_VECTOR, GOLDENS, MODEL, REQUEST_VECTOR, SCHEMA, VOCABULARIES, goldens_json, publish
from features.state import MemoryStore
from service.app import Service
from service.ranking.query import Query, Selection
from service.settings import Settings
from service.telemetry.metrics import Metrics, RequestTimings
from training.calibrate import Calibration
from training.export.export import SAMPLE, ServedNetwork, random_feeds, to_onnx
from training.export.onnx import request_graph
from training.export.retrieval import AdVectors, RequestVectors
from training.networks.contract import Fields
from training.networks.two_tower import TwoTower, TwoTowerSettings

from .benchmark_models import BenchmarkModel, din_100, random_goldens
from .service import show

WARM_UP = 5


@dataclass(frozen=True)
class RetrievalCost:
    """Milliseconds of CPU a request."""

    request: str
    p50_ms: float
    p99_ms: float
    recall: float | None = None
    """Of the K best by float64, the share that was found."""


def publish_towers(benchmark_model: BenchmarkModel, models: Path) -> None:
    """A two_tower bundle of random weights, of the ads and users of a benchmark model."""
    population = benchmark_model.population
    schema, encoder = population.schema, population.encoder
    network = TwoTower(Fields(schema.layouts, population.heights), TwoTowerSettings()).eval()
    served, sample = ServedNetwork(network, Calibration(), schema).eval(), random_feeds(schema, {}, *SAMPLE)
    of_ads = {name: values for name, values in sample.items() if schema.tensors[name][0] == "ad"}
    others = {name: values for name, values in sample.items() if name not in of_ads}
    files = {
        MODEL: to_onnx(served),
        REQUEST_VECTOR: request_graph(RequestVectors(network), schema, others, ("vector",)),
        AD_VECTOR: request_graph(AdVectors(network), schema, of_ads, ("vector",)),
        SCHEMA: schema.to_toml().encode(),
        VOCABULARIES: encoder.vocabularies.to_json().encode(),
        GOLDENS: goldens_json(random_goldens(population, served, encoder)),
    }
    publish(models, "two_tower", files, {})


async def measure(benchmark_model: BenchmarkModel, models: Path, count: int, rounds: int) -> tuple[dict[str, float], list[RetrievalCost]]:
    """Start with all ads in memory, and rank."""
    population, store, memory = benchmark_model.population, MemoryStore(), psutil.Process().memory_info
    await store.put_ads(population.ads())
    await store.put_users(list(population.users())[:1_000])
    service, before = Service(Settings(models=models, model="two_tower"), store, Metrics()), memory().rss
    await service.reload.look()
    began = time.process_time()
    await service.ranker.catalogue.load()
    spent, model = time.process_time() - began, service.ranker.models.loaded["two_tower"]
    table = service.ranker.catalogue.table(model.bundle.fingerprint)
    vectors, random = next(iter(table.vectors.values())), np.random.default_rng(0)
    gc.freeze()

    async def found(user: str, **asked: object) -> tuple[float, float | None]:
        query = Query(user_id=user, ad_ids=random.choice(population.ad_ids, count).tolist(), top_k=20, **asked)  # type: ignore[arg-type]
        began = time.process_time()
        ranking = await service.ranker.rank(query, RequestTimings("/rank"))
        spent = time.process_time() - began
        if not query.selection or not query.selection.retrieve:
            return spent, None
        towers = model.towers
        assert towers is not None  # as published
        near = vectors[1 : len(table.block)].astype(np.float64) @ towers.request(ranking.encoded.feeds).astype(np.float64)
        best = table.ad_ids(1 + np.argpartition(near, -count)[-count:])
        return spent, len(set(best) & set(query.ad_ids)) / count

    category = {"category": ["category-7"]}
    kinds: dict[str, Callable[[str], object]] = {
        f"{count} listed": found,
        f"retrieve {count}": lambda user: found(user, selection=Selection({}, 10_000, count)),
        "all of one category in 1,000": lambda user: found(user, selection=Selection(category, 10_000)),
    }
    costs: dict[str, list[tuple[float, float | None]]] = {name: [] for name in kinds}
    for turn in range(rounds + WARM_UP):
        for name, ask in kinds.items():
            costs[name].append(await ask(population.user_ids[turn % 1_000]))  # type: ignore[misc]
    facts = {
        "ads": len(table),
        "vectors_mib": vectors.nbytes / 2**20,
        "resident_more_mib": (memory().rss - before) / 2**20,
        "load_cpu_s": spent,
    }
    return facts, [_cost(name, each[WARM_UP:]) for name, each in costs.items()]


def _cost(name: str, found: list[tuple[float, float | None]]) -> RetrievalCost:
    times, recalls = [spent * 1_000 for spent, _ in found], [recall for _, recall in found if recall is not None]
    p50, p99 = np.percentile(times, [50, 99]).round(2).tolist()
    return RetrievalCost(name, p50, p99, min(recalls) if recalls else None)


@click.command()
@click.option("--ads", type=click.IntRange(min=20_000), default=1_000_000, show_default=True, help="Of the catalogue.")
@click.option("--retrieve", type=int, default=500, show_default=True, help="Ads to rank.")
@click.option("--rounds", type=int, default=100, show_default=True, help="Requests of each kind.")
def main(ads: int, retrieve: int, rounds: int) -> None:
    """Measure the ranking of a whole catalogue."""
    benchmark_model = din_100(ads)
    with tempfile.TemporaryDirectory() as folder:
        publish_towers(benchmark_model, Path(folder))
        facts, costs = asyncio.run(measure(benchmark_model, Path(folder), retrieve, rounds))
    show({"start": [facts], "cost": [asdict(cost) for cost in costs]}, Console())


if __name__ == "__main__":
    main()
