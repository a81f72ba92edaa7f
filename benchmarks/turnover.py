"""What does the eviction of idle ids cost and save, where ads come and go?

Windows of the drifting world, in which 6 % of the ads leave in a day and as many come: DeepFM goes on from window to window, once with
every id kept and once with rows of idle ids taken by new ones. Both are measured on the same newest rows of each window.

    python -m benchmarks.turnover --windows 20 --evict-after 2
"""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np
import polars as pl
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from features.schema import parse_schema
from features.vocabulary import Vocabulary
from training.datasets.prepared import Prepared, open_prepared, write_split, write_tables, writing
from training.networks import NETWORKS
from training.progress import progress_bar
from training.simulation import AGES, DAYS, POSITIONS, SLOTS, World, make_world
from training.train import Start, Trained, train
from training.train_settings import TrainSettings

SCHEMA = "\n".join(
    ['name = "turnover"']
    + [f'[{path}]\nkind = "category"' for path in ("user.user_id", "user.age", "context.slot", "context.position")]
    + [f'[ad.{name}]\nkind = "category"' for name in ("ad_id", "category", "brand")]
)
DAYS_A_WINDOW = 2
SHARES = {"train": (0.0, 0.8), "valid": (0.8, 0.9), "test": (0.9, 1.0)}


@dataclass(frozen=True)
class WindowResult:
    """What came of a window: ids of ads in the table, and AUC on its newest rows."""

    ids: int
    auc: float


def window(world: World, number: int, rows: int, folder: Path) -> Prepared:
    """A window's impressions of the ads that are there on each of its days, as a prepared data set."""
    random, days = np.random.default_rng(number), DAYS + number * DAYS_A_WINDOW + np.arange(DAYS_A_WINDOW)
    day = np.repeat(days, rows // DAYS_A_WINDOW)
    user, ad = (
        random.integers(0, len(world.age), len(day)),
        np.concatenate([random.choice(world.live(int(d)), rows // len(days)) for d in days]),
    )
    slot, position = random.integers(0, len(SLOTS), len(day)), random.integers(0, POSITIONS, len(day))
    frame = pl.DataFrame(
        {
            "label": (random.random(len(day)) < world.p_click(day, user, ad, slot, position)).astype(np.int8),
            "user_id": [f"u{each}" for each in user],
            "ad_id": [f"a{each}" for each in ad],
            "user.age": [AGES[world.age[each]] for each in user],
            "context.slot": [SLOTS[each] for each in slot],
            "context.position": [str(each + 1) for each in position],
        }
    )
    ads = [{"ad_id": f"a{each}"} | {f"ad.{name}": text for name, text in world.ad(each).items()} for each in np.unique(ad)]
    with writing(folder) as staged:
        write_tables(staged, parse_schema(SCHEMA), pl.DataFrame(ads))
        for split, (first, end) in SHARES.items():
            write_split(staged, split, [frame[round(first * len(day)) : round(end * len(day))]])
    return open_prepared(folder)


def windows(world: World, count: int, rows: int, settings: TrainSettings, progress: Progress) -> list[WindowResult]:
    """One arm: a training for each window, each from the one before it."""
    start, found = None, []
    with tempfile.TemporaryDirectory() as folder:
        for number in progress.track(range(count), description=f"seed {settings.seed}, evict_after {settings.evict_after}"):
            data = window(world, number, rows, Path(folder) / str(number))
            quiet = Progress(console=Console(quiet=True), disable=True)
            trained = train(data, "deepfm", NETWORKS["deepfm"].settings(), settings, quiet, start)
            start = _next(trained)
            ids = trained.encoder.vocabularies.categories["ad_id"]
            assert isinstance(ids, Vocabulary)
            found.append(WindowResult(len(ids.values), trained.metrics["test"].auc))
    return found


def _next(trained: Trained) -> Start:
    return Start(trained.network, trained.encoder.vocabularies, idle=trained.tenure.idle)


@click.command()
@click.option("--windows", "count", type=click.IntRange(min=2), default=20, show_default=True)
@click.option("--rows", type=click.IntRange(min=100), default=20_000, show_default=True, help="Of a window.")
@click.option("--ads", type=click.IntRange(min=20), default=400, show_default=True)
@click.option("--evict-after", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True)
def main(count: int, rows: int, ads: int, evict_after: int, seeds: int) -> None:
    """Run both arms with each seed, and print how large the tables grow and what AUC comes to."""
    world, usual = make_world(ads=ads, later=count * DAYS_A_WINDOW), TrainSettings(threads=1, flat_below=0, least_steps=0, patience=1)
    arms: dict[int, list[list[WindowResult]]] = {0: [], evict_after: []}
    with progress_bar() as progress:
        for seed in range(1, seeds + 1):
            for after, found in arms.items():
                settings = replace(usual, seed=seed, epochs=3, batch=256, evict_after=after)
                found.append(windows(world, count, rows, settings, progress))
    auc = {after: np.array([[each.auc for each in chain] for chain in found]) for after, found in arms.items()}
    table = Table("window", "ids kept", "with eviction", "AUC kept", "with eviction", "difference")
    for number in range(count):
        ids = (f"{found[0][number].ids:,}" for found in arms.values())
        means = [float(each[:, number].mean()) for each in auc.values()]
        table.add_row(str(number + 1), *ids, *(f"{mean:.4f}" for mean in means), f"{means[1] - means[0]:+.4f}")
    Console(width=160).print(table)
    for name, found in (
        ("with eviction less without", auc[evict_after] - auc[0]),
        ("the same between two seeds", auc[0][1:] - auc[0][:-1]),
    ):
        print(f"AUC {name}, mean over windows, by seed: {', '.join(f'{each:+.5f}' for each in found.mean(1))}")


if __name__ == "__main__":
    main()
