"""What counters cost a request: CPU of one with them, as a multiple of one without, in turns in one process.

    python -m benchmarks.counters_cost --rounds 150

A request goes through the whole application, from its body to its answer and its packed record in the log, on a store in memory: of a
service only the sockets of HTTP and of Redis are missing, which would make the multiples smaller. DeepFM as it trains by default, on the
world of `benchmarks/counters.py`.
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.progress import Progress

from features.state import MemoryStore
from service.app import Service, create_app
from service.settings import Settings
from training.datasets import csv_table
from training.datasets.prepared import Prepared, open_prepared
from training.datasets.states import newest_time
from training.loading import Loading
from training.retrain.publish import train_and_publish

from .benchmark_models import FOLDER
from .counters import of_the_world

IMPRESSIONS = 60_000
TURN = 10
"""Requests of one subject before the other has its turn."""
WARM = 10
"""Turns before the first that counts."""
SEEN = """
[counter.seen]
of = "impression"
by = ["user", "ad_id"]
window = "1d"
"""
"""What a frequency cap is about."""

Ask = Callable[[bytes], Awaitable[None]]


def build(folder: Path, what: str, counters: str) -> tuple[Path, Prepared]:
    """A repository with a model of the world with these counters, made where it is not there; and its data."""
    data, models = folder / what / "data", folder / what / "models"
    if not models.exists():
        rows, schema, _ = of_the_world(IMPRESSIONS)
        named = ", ".join(f'"{column}" = "{column}"' for column in rows.columns if "." in column)
        (folder / what).mkdir(parents=True, exist_ok=True)
        rows.write_parquet(source := folder / what / "rows")
        table = f'[table]\nts = "ts"\nnobody = []\nmissing = []\ncolumns = {{ {named} }}\n'
        (file := folder / what / "schema.toml").write_text(schema + counters + table)
        csv_table.prepare(source, data, file)
        with Progress(disable=True) as progress:
            train_and_publish(open_prepared(data), "deepfm", models, "deepfm", {"threads": "1", "epochs": "1"}, progress, "always")
    return models, open_prepared(data)


class LocalService:
    """An application in this process."""

    def __init__(self, service: Service, app: Any, prepared: Prepared) -> None:
        self._service, self._app = service, app
        users, ads = prepared.table("user"), prepared.table("ad")
        assert users is not None
        assert ads is not None
        self.users, self.ads = users["user_id"].to_list(), ads["ad_id"].to_list()

    async def ask(self, body: bytes) -> None:
        """Rank, and wait until the record of the ranking is packed."""
        messages: list[Any] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            messages.append(message)

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        scope = {"type": "http", "method": "POST", "path": "/rank", "query_string": b"", "headers": headers, "state": {}}
        await self._app({**scope, "client": ("127.0.0.1", 1), "http_version": "1.1", "root_path": ""}, receive, send)
        assert messages[0]["status"] == 200, messages
        while self._service.served._unlogged:
            await asyncio.sleep(0)


async def open_local(stack: AsyncExitStack, models: Path, prepared: Prepared) -> LocalService:
    """The application with the users and ads of the data, as of the end of it."""
    store = MemoryStore()
    with Progress(disable=True) as progress:
        await Loading(store, prepared, progress).merge()
    app = create_app(Settings(models=models, redis="memory://", threads=1), store)
    await stack.enter_async_context(app.router.lifespan_context(app))
    service, now = app.state.service, newest_time(prepared)
    service.ranker._clock = lambda: float(now or 0)
    return LocalService(service, app, prepared)


def bodies(subject: LocalService, candidates: int, count: int, random: np.random.Generator) -> list[bytes]:
    """Requests of random users for random ads."""
    return [
        json.dumps(
            {
                "user": {"id": str(random.choice(subject.users))},
                "context": {"slot": "feed", "position": "1"},
                "candidates": random.choice(subject.ads, candidates, replace=False).tolist(),
            }
        ).encode()
        for _ in range(count)
    ]


async def turn(subject: LocalService, asked: Sequence[bytes]) -> float:
    """Microseconds of CPU of this thread for a request."""
    began = time.thread_time()
    for body in asked:
        await subject.ask(body)
    return (time.thread_time() - began) / len(asked) * 1e6


async def measure(folder: Path, rounds: int, sizes: Sequence[int]) -> None:
    """Each in its turn, and a line for each size."""
    random = np.random.default_rng(1)
    world = of_the_world(1_000)[2]
    made = {what: build(folder, what, counters) for what, counters in (("without", ""), ("with", world), ("seen", world + SEEN))}
    async with AsyncExitStack() as stack:
        subjects = {what: await open_local(stack, *each) for what, each in made.items()}
        for size in sizes:
            took: dict[str, list[float]] = {what: [] for what in subjects}
            for number in range(WARM + rounds):
                asked = bodies(subjects["without"], size, TURN, random)
                for what in sorted(subjects, reverse=bool(number % 2)):
                    mean = await turn(subjects[what], asked)
                    took[what] += [mean] if number >= WARM else []
            without = np.array(took["without"])
            for what, cpu in took.items():
                quarters = np.quantile(np.array(cpu) / without, (0.5, 0.25, 0.75))
                print(
                    f"{size} candidates, {what}: {np.median(cpu):.0f} us (least {min(cpu):.0f}), "
                    f"{quarters[0]:.2f} ({quarters[1]:.2f} to {quarters[2]:.2f})",
                    flush=True,
                )


@click.command()
@click.option("--rounds", type=click.IntRange(min=1), default=150, show_default=True)
@click.option("--candidates", "sizes", type=int, multiple=True, default=(50, 200, 500), show_default=True)
@click.option("--dir", "folder", type=click.Path(file_okay=False, path_type=Path), default=FOLDER / "counters", show_default=True)
def main(rounds: int, sizes: tuple[int, ...], folder: Path) -> None:
    """Build what is not there, measure, and print."""
    asyncio.run(measure(folder, rounds, sizes))


if __name__ == "__main__":
    main()
