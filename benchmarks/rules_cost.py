"""What rules after ranking cost a request, at the median and at the 99th percentile: each alone and all together, in turns in one process.

    python -m benchmarks.rules_cost --requests 2000

The application and the model are those of `benchmarks/counters_cost.py` with the counter `seen`; CPU of the one thread.
"""

import asyncio
import json
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import click
import numpy as np

from .benchmark_models import FOLDER
from .counters import of_the_world
from .counters_cost import SEEN, LocalService, build, open_local

RULES: dict[str, dict[str, Any]] = {
    "max_per": {"max_per": {"brand": 2}},
    "distance": {"distance": {"category": 3}},
    "diversity": {"diversity": {"trade_off": 0.7, "by": ["category", "brand"]}},
    "frequency": {"frequency": {"seen": 3}},
    "already_clicked": {"already_clicked": True},
}
PLANS = {"none": {}, **RULES, "all": {name: value for each in RULES.values() for name, value in each.items()}}
WARM = 100


def request(subject: LocalService, candidates: int, options: dict[str, Any], random: np.random.Generator) -> bytes:
    """One of a random user for random ads."""
    user, ads = str(random.choice(subject.users)), random.choice(subject.ads, candidates, replace=False).tolist()
    context = {"slot": "feed", "position": "1"}
    return json.dumps({"user": {"id": user}, "context": context, "candidates": ads, "options": options}).encode()


async def measure(folder: Path, requests: int, sizes: tuple[int, ...], top_k: int) -> None:
    """Each in its turn, a request at a time, and a line for each size and rule."""
    made, random = build(folder, "seen", of_the_world(1_000)[2] + SEEN), np.random.default_rng(1)
    async with AsyncExitStack() as stack:
        subject = await open_local(stack, *made)
        for size in sizes:
            took: dict[str, list[float]] = {name: [] for name in PLANS}
            for number in range(WARM + requests):
                for name, rules in PLANS.items():
                    body = request(subject, size, {"top_k": top_k} | ({"rules": rules} if rules else {}), random)
                    began = time.thread_time()
                    await subject.ask(body)
                    took[name] += [(time.thread_time() - began) * 1e6] if number >= WARM else []
            plain = np.quantile(took["none"], (0.5, 0.99))
            for name, cpu in took.items():
                own = np.quantile(cpu, (0.5, 0.99))
                times = own / plain
                print(f"{size} candidates, {name}: p50 {own[0]:.0f} us ({times[0]:.2f}), p99 {own[1]:.0f} us ({times[1]:.2f})", flush=True)


@click.command()
@click.option("--requests", type=click.IntRange(min=1), default=2_000, show_default=True, help="Of each kind.")
@click.option("--candidates", "sizes", type=int, multiple=True, default=(50, 200, 500), show_default=True)
@click.option("--top-k", type=click.IntRange(min=1), default=10, show_default=True)
@click.option("--dir", "folder", type=click.Path(file_okay=False, path_type=Path), default=FOLDER / "counters", show_default=True)
def main(requests: int, sizes: tuple[int, ...], top_k: int, folder: Path) -> None:
    """Build what is not there, measure, and print."""
    asyncio.run(measure(folder, requests, sizes, top_k))


if __name__ == "__main__":
    main()
