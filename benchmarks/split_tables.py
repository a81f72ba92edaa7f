"""A table that is split by rows over two workers beside one that a worker has whole: memory, and a step beside one of a small table.

DeepFM on drawn rows without a history, every id as likely; each worker one thread, joined by gloo. Steps of the large and of the small
table take turns in the same processes, the first round uncounted, in which moments get their memory. What `adrank train` has beside it,
such as the best epoch's weights, is not in this: tables, the moments of the rows that were drawn, and the steps alone. Without huge pages
these take no more than they need:

    NUMPY_MADVISE_HUGEPAGE=0 python -m benchmarks.split_tables --rows 100000000
"""

import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import click
import psutil
import torch
from torch import distributed
from torch.multiprocessing.spawn import spawn

from training.distributed import Process
from training.fit import StepLoss
from training.networks import NETWORKS
from training.networks.contract import Fields
from training.shards import split
from training.train_settings import TrainSettings
from training.unknown import Hiding
from training.updates import Updates

from .training import BATCH, ROWS, DrawnRows

SMALL = 1_000_000


class Contender:
    """A network, and what makes its steps."""

    def __init__(self, rows: int, process: Process) -> None:
        self.rows, self.process, several = rows, process, process.of > 1
        self.drawn, kind = DrawnRows.of(0, rows), NETWORKS["deepfm"]
        fields = Fields.of(self.drawn.schema, self.drawn.encoder.vocabularies)._replace(shard_rows=SMALL // 2 if several else 0)
        self.settings = TrainSettings(workers=process.of).for_rows(ROWS)
        self.network = kind(fields, kind.settings())
        split(self.network, process, self.settings.seed)
        self.updates = Updates(self.network, self.drawn.rows, self.settings, process=process)
        self.loss = process.parallel(StepLoss(self.network, None), [table.weight for table in self.updates.tables.tables])

    def steps(self) -> list[tuple[float, float]]:
        """Seconds of each step of a round, and those of the processor."""
        rows, found, clocks = self.drawn.rows, list[tuple[float, float]](), (time.perf_counter, time.process_time)
        hiding = Hiding(rows, self.settings.unknown_rate, self.settings.seed)
        for at in torch.arange(ROWS).view(-1, BATCH)[:, self.process.rank :: self.process.of].numpy():
            began = [clock() for clock in clocks]
            batch, labels, twins, _ = next(hiding.batches([(rows, at)]))
            loss = self.loss(batch, labels, twins, False)
            self.updates.step(loss, batch)
            found.append((clocks[0]() - began[0], clocks[1]() - began[1]))
        return found


def worker(rank: int, of: int, rows: int, rounds: int, folder: Path) -> None:
    """Measure as one of several, and leave what was found."""
    torch.set_num_threads(1)
    if of > 1:
        distributed.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=rank, world_size=of)
    before = psutil.Process().memory_info().rss
    contenders, times = [Contender(each, Process(rank, of)) for each in (SMALL, rows)], dict[int, list[tuple[float, float]]]()
    for number in range(rounds + 1):
        for contender in contenders:
            steps = contender.steps()
            times.setdefault(contender.rows, []).extend(steps if number else ())
    ms = {size: [1e3 * median(clock) for clock in zip(*each, strict=True)] for size, each in times.items()}
    found = {"ms": ms, "rss": psutil.Process().memory_info().rss, "before": before}
    torch.save(found, folder / f"{rank}.pt")
    if of > 1:
        distributed.destroy_process_group()


def measured(of: int, rows: int, rounds: int) -> list[dict[str, Any]]:
    """What each of so many workers found."""
    with TemporaryDirectory() as folder:
        spawn(worker, (of, rows, rounds, Path(folder)), of)  # type: ignore[no-untyped-call]
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(of)]


@click.command()
@click.option(
    "--rows", type=click.IntRange(SMALL + 1), default=10_000_000, show_default=True, help="Of the large table, of 16 + 1 numbers a row."
)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help=f"Of {ROWS // BATCH} steps of {BATCH} rows.")
def main(rows: int, rounds: int) -> None:
    """Measure one worker, then two."""
    for of in (1, 2):
        each = measured(of, rows, rounds)
        memory = ", ".join(f"{found['rss'] / 1e9:.2f} GB ({found['before'] / 1e9:.2f} before there was a table)" for found in each)
        steps = ", ".join(f"{size:,} rows {ms:.1f} ms ({cpu:.1f} of a processor)" for size, (ms, cpu) in each[0]["ms"].items())
        print(f"{of} worker(s): RSS {memory}; a step with {steps}", flush=True)


if __name__ == "__main__":
    main()
