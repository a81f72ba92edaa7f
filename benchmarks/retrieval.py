"""What it costs to choose the candidates of a request from the whole catalogue: CPU time, one thread, random vectors of unit length.

The ads that are chosen are then ranked as if they had been listed, which `benchmarks.service` measures.

    OPENBLAS_NUM_THREADS=1 python -m benchmarks.retrieval --ads 1000000
"""

import time
from dataclasses import asdict, dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
from rich.console import Console

from features.encode import AdTable, Block
from features.vocabulary import Numbers
from service.catalogue.ads import Ads, View
from service.ranking.query import Selection
from service.ranking.selection import select

from .benchmark_models import din_100
from .population import value
from .service import show

CATEGORIES, WARM_UP = 1_000, 3


@dataclass(frozen=True)
class SelectionCost:
    """Of one kind of request; milliseconds."""

    request: str
    candidates: int
    p50_ms: float
    p99_ms: float


class RandomTower:
    """Vectors of unit length, whatever the ads are."""

    width = 32

    def __init__(self) -> None:
        self._random = np.random.default_rng(0)

    def vectors(self, ads: Block) -> Numbers:
        """See `AdTower`."""
        vectors: Numbers = self._random.standard_normal((len(ads), self.width), dtype=np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors


def measure(ads: int, count: int, rounds: int) -> tuple[dict[str, float], list[SelectionCost]]:
    """The size of the vectors and the share of the best that are found; and what each kind of request costs."""
    population, random, tower = din_100(ads).population, np.random.default_rng(1), RandomTower()
    table, ad_ids = AdTable(encoder := population.encoder, ads), population.ad_ids
    for _ in table.keep_vectors(tower, ads):
        pass
    categories = [value("category", i) for i in range(CATEGORIES)]
    columns = {"ad_id": ad_ids, "category": [categories[i] for i in random.integers(CATEGORIES, size=ads)]}
    table.put(ad_ids, encoder.encode("ad", columns, ads))
    view, vectors = View(Ads({"f": table}, ids=table.ids), "f"), table.vectors[tower]
    model: Any = SimpleNamespace(bundle=SimpleNamespace(encoder=encoder), towers=tower, name="two_tower")
    kinds = {
        f"retrieve {count}": Selection({}, ads, count),
        f"retrieve {count} of half": Selection({"category": categories[::2]}, ads, count),
        f"retrieve {count} of 1 in 100": Selection({"category": categories[:10]}, ads, count),
        "all of 1 in 1,000": Selection({"category": categories[:1]}, ads),
    }
    spent: dict[str, list[float]] = {name: [] for name in kinds}
    sizes, recall = dict.fromkeys(kinds, 0), 1.0
    for turn in range(rounds + WARM_UP):
        asked = random.standard_normal(tower.width, dtype=np.float32)
        for name, selection in kinds.items():
            began = time.thread_time()
            found, _ = select(selection, model, view, partial(np.asarray, asked), [])
            spent[name].append((time.thread_time() - began) * 1_000)
            sizes[name] = len(found)
            if turn < WARM_UP and selection.retrieve and not selection.filters:
                near = vectors[1:].astype(np.float64) @ asked.astype(np.float64)
                recall = min(recall, len({*found} & {ad_ids[i] for i in np.argsort(-near)[:count]}) / count)
    quantiles = {name: np.percentile(each[WARM_UP:], [50, 99]).round(2).tolist() for name, each in spent.items()}
    costs = [SelectionCost(name, sizes[name], *each) for name, each in quantiles.items()]
    return {"ads": ads, "vectors_mib": round(vectors.nbytes / 2**20, 1), "recall": recall}, costs


@click.command()
@click.option("--ads", type=click.IntRange(min=10_000), default=1_000_000, show_default=True, help="Of the catalogue.")
@click.option("--retrieve", type=int, default=500, show_default=True, help="Ads to find.")
@click.option("--rounds", type=int, default=100, show_default=True, help="Requests of each kind; they take turns.")
def main(ads: int, retrieve: int, rounds: int) -> None:
    """Measure the choice of candidates."""
    facts, costs = measure(ads, retrieve, rounds)
    show({"catalogue": [facts], "cost": [asdict(cost) for cost in costs]}, Console())


if __name__ == "__main__":
    main()
