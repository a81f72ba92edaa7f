"""What exploring costs and brings where ads come and go: the world's days after its log, each policy on its own, retrained each day.

python -m benchmarks.regret --days 10 --seed 1 --seed 2

A visit has 20 ads of the day, of which the policy shows 3. Its regret is by how many expected clicks the best 3 would have had more.
"""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import polars as pl
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from adrank_bench.bench import write
from features.policy import EpsilonGreedy, PlackettLuce, Policy, Thompson
from features.schema import parse_schema
from training.calibrate import Calibration
from training.datasets.ads import ad_table
from training.datasets.encoded import encode_frames
from training.datasets.history import Past
from training.datasets.prepared import open_prepared, write_split, write_tables, writing
from training.fit import predict
from training.networks import NETWORKS
from training.progress import progress_bar
from training.simulation import DAY, DAYS, HISTORY, SCHEMA, SLOTS, START, World, make_world, write_log
from training.train import Trained, train
from training.train_settings import TrainSettings

POLICIES: dict[str, Policy] = {
    "greedy": EpsilonGreedy(0.0),
    "epsilon_greedy 0.1": EpsilonGreedy(0.1),
    "plackett_luce 0.2": PlackettLuce(0.2),
    "thompson": Thompson(),
}
OFFERED, SHOWN = 20, 3
SETTINGS = TrainSettings(epochs=4, learning_rate=0.003, threads=1)
Array = np.ndarray[Any, np.dtype[Any]]


def learned(world: World, log: pl.DataFrame, day: int, seed: int, folder: Path, progress: Progress) -> Trained:
    """A DeepFM of all that was shown so far, from a data set `folder` of it; a tenth of the rows is held out, at random."""
    apart = np.random.default_rng([seed, day]).integers(0, 20, len(log))
    splits = {"train": apart >= 2, "valid": apart == 0, "test": apart == 1}
    ads = np.flatnonzero(world.days[:, 0] <= day)
    frame = log.with_columns(history=Past(log, HISTORY).histories(slice(None)))
    with writing(folder) as staged:
        table = pl.DataFrame([{"ad_id": f"a{ad}"} | {f"ad.{name}": text for name, text in world.ad(int(ad)).items()} for ad in ads])
        write_tables(staged, parse_schema(SCHEMA), table, world.users())
        for split, those in splits.items():
            write_split(staged, split, [frame.filter(pl.Series(those))])
    network = NETWORKS["deepfm"]
    settings = replace(network.settings(), embedding=8, hidden=(32,))
    return train(open_prepared(folder), "deepfm", settings, replace(SETTINGS, seed=seed), progress)


def visits(world: World, day: int, count: int, random: np.random.Generator) -> tuple[Array, Array, Array]:
    """Users `(V,)`, slots `(V,)` and what is offered to them `(V, OFFERED)`: the same for every policy."""
    live = world.live(day)
    offered = np.stack([random.choice(live, OFFERED, replace=False) for _ in range(count)])
    return random.integers(0, len(world.age), count), random.integers(0, len(SLOTS), count), offered


def rows(day: int, users: Array, slots: Array, ads: Array, positions: Array, labels: Array) -> pl.DataFrame:
    """Impressions `(N,)` of a day as rows of its log."""
    return pl.DataFrame(
        {
            "label": labels.astype(np.int8),
            "user_id": [f"u{user}" for user in users],
            "ad_id": [f"a{ad}" for ad in ads],
            "ts": START + day * DAY + np.arange(len(users)) * DAY // len(users),
            "context.slot": [SLOTS[slot] for slot in slots],
            "context.position": [str(position + 1) for position in positions],
        }
    )


def scored(trained: Trained, folder: Path, log: pl.DataFrame, asked: pl.DataFrame) -> Array:
    """p(click) `(N,)` of rows that come after a log."""
    data, history = open_prepared(folder), Past(pl.concat([log, asked]), HISTORY).histories(slice(len(log), None))
    encoded = encode_frames(data, [asked.with_columns(history=history)], trained.encoder, ad_table(data, trained.encoder))
    calibration: Calibration = trained.calibration
    p: Array = 1 / (1 + np.exp(-(predict(trained.network, encoded) * calibration.scale + calibration.shift)))
    return p


def live_through(name: str, seed: int, days: int, count: int, progress: Progress) -> dict[str, Any]:
    """Regret and clicks of a policy, in the mean of a visit, by day."""
    world = make_world(300, 200, seed, days)
    with tempfile.TemporaryDirectory() as temporary:
        write_log(world, Path(temporary) / "log", 40_000, seed)
        whole = open_prepared(Path(temporary) / "log")
        columns = rows(0, *(np.zeros(1, np.int64) for _ in range(5))).columns
        log = pl.concat([frame.select(columns) for split in ("train", "valid", "test") for frame in whole.frames(split)])
    regret, clicks = [], []
    for day in progress.track(range(DAYS, DAYS + days), description=f"{name}, seed {seed}"):
        random = np.random.default_rng([seed, day])
        users, slots, offered = visits(world, day, count, random)
        none = np.zeros(offered.size, np.int64)
        everything = rows(day, users.repeat(OFFERED), slots.repeat(OFFERED), offered.ravel(), none, none)
        with tempfile.TemporaryDirectory() as temporary, progress_bar(quiet=True) as quiet:
            trained = learned(world, log, day, seed, folder := Path(temporary) / "rows", quiet)
            values = scored(trained, folder, log, everything).reshape(offered.shape)
            by_id, ids = trained.ad_deviations, trained.encoder.vocabularies.categories["ad_id"]
        assert by_id is not None  # the world's schema has ads' ids
        spread = (1 - values) * by_id[ids.encode(everything["ad_id"].to_list())].reshape(offered.shape)
        shown = np.stack([draw(POLICIES[name], *each, random) for each in zip(values, spread, strict=True)])
        chosen, place = np.take_along_axis(offered, shown, 1), np.arange(SHOWN)
        truth = world.p_click(day, users[:, None], chosen, slots[:, None], place)
        first = world.p_click(day, users[:, None], offered, slots[:, None], 0)
        ideal = np.take_along_axis(offered, np.argsort(-first, axis=1)[:, :SHOWN], 1)
        best = world.p_click(day, users[:, None], ideal, slots[:, None], place)
        labels = random.random(truth.shape) < truth
        regret.append(float((best - truth).sum() / count))
        clicks.append(float(labels.sum() / count))
        log = pl.concat([log, rows(day, users.repeat(SHOWN), slots.repeat(SHOWN), chosen.ravel(), np.tile(place, count), labels.ravel())])
    return {"policy": name, "seed": seed, "regret": regret, "clicks": clicks}


def draw(policy: Policy, values: Array, spread: Array, random: np.random.Generator) -> Array:
    """The columns of the ads that are shown, of `values (C,)`, as the service draws them."""
    best = np.argsort(-values, kind="stable")
    bound = Thompson(spread[best]) if isinstance(policy, Thompson) else policy
    shown: Array = best[bound.draw(values[best].astype(np.float64), SHOWN, random).ranks[:SHOWN]]
    return shown


@click.command()
@click.option("--policy", "names", type=click.Choice(list(POLICIES)), multiple=True, help="Default: all.")
@click.option("--days", type=click.IntRange(min=2), default=10, show_default=True)
@click.option("--visits", "count", type=click.IntRange(min=10), default=2_000, show_default=True, help="A day.")
@click.option("--seed", "seeds", type=int, multiple=True, default=(1,), show_default=True)
@click.option("--json", "target", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures here too.")
def main(names: tuple[str, ...], days: int, count: int, seeds: tuple[int, ...], target: Path | None) -> None:
    """Cumulative regret by policy."""
    with progress_bar() as progress:
        found = [live_through(name, seed, days, count, progress) for seed in seeds for name in names or POLICIES]
    table = Table("policy", "seed", "regret of a visit", "first half", "second half", "clicks of a visit")
    for each in found:
        halves = np.array_split(each["regret"], 2)
        figures = [np.mean(each["regret"]), *map(np.mean, halves), np.mean(each["clicks"])]
        table.add_row(each["policy"], str(each["seed"]), *(f"{figure:.4f}" for figure in figures))
    Console().print(table)
    write(found, target)


if __name__ == "__main__":
    main()
