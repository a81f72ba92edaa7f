"""What a ranker's own order does to the next one: `python -m benchmarks.position --seed 1 --seed 2 --seed 3`.

In the simulated world a ranker shows 8 of 20 ads a visit by what they bid (of log-normal deviation 1) and their true quality, whoever asks;
with `--oracle` by the true p(click) and an error. A tenth of the visits are shown in any order. A DeepFM learns from the clicks in each of
`WAYS`, and is judged by the true p(click) of visits that it has not seen. `--examined` takes other clicks: p(click) at the first place
times how likely a place is examined, one over its root.
"""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import polars as pl
from rich.console import Console
from rich.table import Table
from scipy.special import logit

from adrank_bench.bench import write
from features.schema import parse_schema
from training.datasets.history import Past
from training.datasets.prepared import open_prepared, write_split, write_tables, writing
from training.evaluate import auc
from training.fit import predict
from training.networks import NETWORKS
from training.progress import progress_bar
from training.simulation import DAY, DAYS, HISTORY, POSITIONS, SCHEMA, SLOTS, SPLIT_DAYS, START, World, make_world
from training.train import train
from training.train_settings import TrainSettings

WAYS = {"nothing": "", "feature": "", "tower": "tower", "pal": "pal", "ips": "ips", "em": "em"}
"""The place as a feature is that of the first when it is asked; the others are settings."""
OFFERED, EXPLORING = 20, 0.1
SETTINGS = TrainSettings(epochs=8, learning_rate=0.003, unknown_rate=0.0, flat_below=0, least_steps=0, threads=1)
PLACE = '[context.position]\nkind = "category"\n'
Array = np.ndarray[Any, np.dtype[Any]]


def made(world: World, examined: bool, oracle: bool, visits: int, seed: int) -> tuple[pl.DataFrame, Array, Array]:
    """What visits are shown, and in the days of test all that they were offered, a row an ad; their true p(click) by place
    `(N, POSITIONS)`; and of the rows that train, the same as a share of the first place `(POSITIONS,)`.
    """
    random = np.random.default_rng(seed)
    seconds = np.sort(random.integers(0, DAYS * DAY, visits))
    user, slot = random.integers(0, len(world.age), visits), random.integers(0, len(SLOTS), visits)
    ads = np.stack([random.choice(world.live(0), OFFERED, replace=False) for _ in range(visits)])
    asked, explores = seconds >= SPLIT_DAYS["test"][0] * DAY, random.random(visits) < EXPLORING
    day = seconds // DAY
    places = np.arange(POSITIONS)
    truth = world.p_click(day[:, None, None], user[:, None, None], ads[..., None], slot[:, None, None], 0 if examined else places)
    truth = truth / np.sqrt(places + 1) if examined else truth
    known = logit(truth[..., 0]) if oracle else world.quality[ads] + random.normal(size=len(world.quality))[ads]
    known = np.where(explores[:, None], 0.0, known) + np.where(explores[:, None] | oracle, random.normal(size=ads.shape), 0.0)
    place = np.where(asked[:, None], 0, np.argsort(np.argsort(-known, axis=1), axis=1))
    visit, which = np.nonzero(place < POSITIONS)
    at = place[visit, which]
    order = np.lexsort((at, visit))
    visit, which, at = visit[order], which[order], at[order]
    truth, first = truth[visit, which], at == 0
    label = random.random(len(at)) < truth[np.arange(len(at)), at]
    frame = pl.DataFrame(
        {
            "label": label.astype(np.int8),
            "user_id": [f"u{each}" for each in user[visit]],
            "ad_id": [f"a{each}" for each in ads[visit, which]],
            "ts": seconds[visit] + START,
            "context.slot": [SLOTS[each] for each in slot[visit]],
            "context.position": [str(each + 1) for each in at],
            "position": at + 1,
            "request_id": visit.astype(str),
            "propensity": np.where(explores[visit], 1 / (OFFERED - at), 1.0),
            "candidates": [["any"] * OFFERED if each else None for each in first],
        }
    )
    seen = frame.with_columns(label=pl.when(pl.Series(asked[visit])).then(0).otherwise("label"))
    past = Past(seen, HISTORY, np.searchsorted(visit, visit)).histories(slice(None))
    shown = truth[~asked[visit]].mean(0)
    return frame.with_columns(history=past), truth, shown / shown[0]


def saved(world: World, rows: pl.DataFrame, feature: bool, out: Path) -> Path:
    """The rows as a prepared data set."""
    with writing(out) as folder:
        write_tables(folder, parse_schema(SCHEMA if feature else SCHEMA.replace(PLACE, "")), world.ads(), world.users())
        for split, days in SPLIT_DAYS.items():
            begin, end = (START + day * DAY for day in days)
            write_split(folder, split, [rows.filter(pl.col("ts") >= begin, pl.col("ts") < end)])
    return out


def judged(world: World, rows: pl.DataFrame, truth: Array, way: str, seed: int) -> dict[str, Any]:
    """What a way comes to on the ads offered in the days of test."""
    with tempfile.TemporaryDirectory() as folder, progress_bar(quiet=True) as quiet:
        data = open_prepared(saved(world, rows, way == "feature", Path(folder) / "rows"))
        network = replace(NETWORKS["deepfm"].settings(), embedding=8, hidden=(32,))
        trained = train(data, "deepfm", network, replace(SETTINGS, seed=seed, position_bias=WAYS[way]), quiet)
        p = trained.calibration.on_log(predict(trained.network, trained.held_out))
    test = (rows["ts"] >= START + SPLIT_DAYS["test"][0] * DAY).to_numpy()
    first, labels = truth[test, 0], rows["label"].to_numpy()[test]
    share = np.bincount(rows["position"].to_numpy()[~test] - 1) / (~test).sum()
    said = first if way == "feature" else truth[test] @ share
    by_visit = (-1, OFFERED)
    gains = np.take_along_axis(first.reshape(by_visit), np.argsort(-p.reshape(by_visit), axis=1), 1)[:, :POSITIONS]
    best, discount = -np.sort(-first.reshape(by_visit), axis=1)[:, :POSITIONS], 1 / np.log2(np.arange(POSITIONS) + 2)
    return {
        "auc": auc(labels, p),
        "ndcg": float((gains @ discount / (best @ discount)).mean()),
        "correlation": float(np.corrcoef(logit(p), logit(first))[0, 1]),
        "log_loss": float(-np.mean(said * np.log(p) + (1 - said) * np.log(1 - p))),
        "least_log_loss": float(-np.mean(said * np.log(said) + (1 - said) * np.log(1 - said))),
        "examination": trained.examination.told() if trained.examination else [],
    }


@click.command()
@click.option("--way", "ways", type=click.Choice(list(WAYS)), multiple=True, help="Default: all.")
@click.option("--visits", type=click.IntRange(min=1_000), default=20_000, show_default=True)
@click.option("--seed", "seeds", type=int, multiple=True, default=(1,), show_default=True)
@click.option("--examined", is_flag=True, help="Clicks are examined and relevant.")
@click.option("--oracle", is_flag=True, help="The ranker knows more than any model.")
@click.option("--json", "target", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures here too.")
def main(ways: tuple[str, ...], visits: int, seeds: tuple[int, ...], examined: bool, oracle: bool, target: Path | None) -> None:
    """Each way to learn from clicks at places, beside the truth."""
    found, names = [], ("auc", "ndcg", "correlation", "log_loss", "least_log_loss")
    table = Table("way", "seed", *(name.replace("_", " ") for name in names), "examination by place")
    for seed in seeds:
        world = make_world(seed=seed)
        rows, truth, examination = made(world, examined, oracle, visits, seed)
        table.add_row("truth", str(seed), *[""] * len(names), " ".join(f"{each:.2f}" for each in examination))
        for way in ways or WAYS:
            found.append({"way": way, "seed": seed, "truth": examination.tolist(), **judged(world, rows, truth, way, seed)})
            curve = " ".join(f"{each['examination']:.2f}" for each in found[-1]["examination"])
            table.add_row(way, str(seed), *(f"{found[-1][name]:.4f}" for name in names), curve)
            write(found, target)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
