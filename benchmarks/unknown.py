"""Where does an ad of which nothing is known come among those that are? And what does an unknown user get?

Requests are users, contexts and histories of the test split, each with a made-up ad among 19 that are known, drawn from the catalogue
and, beside it, as often as they were shown: a neutral one has a mean rank of 10.5 of 20. On the demo's world with the demo's own
settings, on any number of rows of MovieLens-1M, and on a log like Avazu's. What was measured stays in the JSON file and is not
measured again.

    python -m benchmarks.unknown --movielens data/ml-1m --rate 0 --rate 0.01 --json data/bench/unknown.json
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from adrank_demo.demo import NETWORKS as DEMO
from features.encode import Block
from training.datasets.encoded import Rows, Strangers, ad_table
from training.datasets.prepared import Prepared, open_prepared
from training.networks import NETWORKS
from training.networks.contract import CLICK, Part, RequestTensors
from training.progress import progress_bar
from training.simulation import make_world
from training.simulation import write_log as write_world

from . import avazu_like
from .defaults import EncodedSplits, Found, cut, measured

AMONG = 20
REQUESTS = 1_000


def places(network: Any, encoded: EncodedSplits, catalogue: Block) -> Found:
    """Mean rank of a made-up ad by how the others are drawn, its mean p(click) beside theirs, and the mean of unknown users."""
    random, test, train = np.random.default_rng(0), encoded.rows["test"], encoded.rows["train"]
    rows = random.choice(len(test), min(REQUESTS, len(test)), replace=False)
    found: Found = {}
    for name, pool in (("catalogue", catalogue), ("shown", train.ad)):
        scores = _scored(network, test, rows, pool.take(random.integers(0, len(pool), (len(rows), AMONG - 1))))
        ours, others = scores[:, :1], scores[:, 1:]
        rank = 1 + (others > ours).sum(1) + (others == ours).sum(1) / 2
        found[name] = {"rank": float(rank.mean()), "p_unknown": float(_click(ours).mean()), "p_known": float(_click(others).mean())}
    known = _click(_rowwise(network, test, rows)).mean()
    stranger = _click(_rowwise(network, _unknown_users(test, test.strangers), rows)).mean()
    return {**found, "user": {"p_unknown": float(stranger), "p_known": float(known)}}


def _scored(network: Any, test: Rows, rows: Any, others: Block) -> Any:
    """Logits `(R, 20)`, the made-up ad's first."""
    user, history, _, ages = test.batch(rows)
    made_up = test.strangers.ad.take(np.zeros((len(rows), 1), np.int64))
    ids, numbers = np.concatenate([made_up.ids, others.ids], 1), np.concatenate([made_up.numbers, others.numbers], 1)
    with torch.no_grad():
        return network(RequestTensors(user, history, Part(torch.from_numpy(ids), torch.from_numpy(numbers)), ages))[CLICK].numpy()


def _rowwise(network: Any, rows: Rows, chosen: Any) -> Any:
    with torch.no_grad():
        return network(rows.batch(chosen))[CLICK].numpy()


def _unknown_users(rows: Rows, strangers: Strangers) -> Rows:
    """The same rows, of users of whom nothing is known and who have no history."""
    ids, numbers = rows.user.ids.copy(), rows.user.numbers.copy()
    ids[:, : strangers.user.ids.shape[1]], numbers[:, : strangers.user.numbers.shape[1]] = strangers.user.ids, strangers.user.numbers
    return replace(rows, user=Block(ids, numbers), history=np.zeros_like(rows.history))


def _click(logits: Any) -> Any:
    return 1 / (1 + np.exp(-logits))


def data_sets(folder: Path, movielens: Path | None, rows: tuple[int, ...]) -> dict[str, tuple[Prepared, Mapping[str, Mapping[str, str]]]]:
    """The data sets by name, made where they are not there yet, and the settings of each network on them."""
    if not (folder / "world").exists():
        write_world(make_world(), folder / "world")
    if not (folder / "avazu-like").exists():
        avazu_like.write_log(folder / "avazu-like", 60_000)
    found: dict[str, tuple[Prepared, Mapping[str, Mapping[str, str]]]] = {"demo": (open_prepared(folder / "world"), DEMO)}
    found["avazu-like"] = open_prepared(folder / "avazu-like"), {}
    for count in rows if movielens else ():
        found[f"ml-1m, {count:,}"] = cut(open_prepared(movielens), count, folder / f"rows-{count}"), {}  # type: ignore[arg-type]
    return found


def table(found: Mapping[str, Found]) -> Table:
    """A row a training."""
    shown = Table(
        "data", "model", "unknown_rate", "AUC valid", "AUC test", "rank", "rank, as shown", "p(click), known", "unknown user, known"
    )
    for key, each in found.items():
        name, family, rate = key.split("/")
        pairs = (f"{part['p_unknown']:.3f}, {part['p_known']:.3f}" for part in (each["catalogue"], each["user"]))
        ranks = (f"{each[draw]['rank']:.1f}" for draw in ("catalogue", "shown"))
        shown.add_row(name, family, rate, f"{each['valid']:.4f}", f"{each['test']:.4f}", *ranks, *pairs)
    return shown


@click.command()
@click.option("--movielens", type=click.Path(file_okay=False, path_type=Path), help="MovieLens-1M, prepared.")
@click.option("--rows", type=click.IntRange(min=100), multiple=True, default=(8_000,), show_default=True, help="Of MovieLens.")
@click.option("--rate", "rates", type=click.FloatRange(0, 1, max_open=True), multiple=True, default=(0.0, 0.01), show_default=True)
@click.option("--data", "names", multiple=True, help="Only data sets whose name begins so.")
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), default=Path("data/bench/unknown.json"), show_default=True)
def main(movielens: Path | None, rows: tuple[int, ...], rates: tuple[float, ...], names: tuple[str, ...], path: Path) -> None:
    """Measure what is not in the JSON file yet, and print the table."""
    found: Found = json.loads(path.read_text("utf-8")) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    with progress_bar() as progress:
        for name, (data, settings) in data_sets(path.parent, movielens, rows).items():
            if names and not name.startswith(names):
                continue
            encoded = EncodedSplits.of(data)
            ads = ad_table(data, encoded.encoder).block
            catalogue = ads.take(np.arange(1, len(ads)))
            for family in progress.track(list(NETWORKS), description=name):
                for rate in rates:
                    given = {**settings.get(family, {}), "unknown_rate": str(rate)}
                    measured(found, path, f"{name}/{family}/{rate:g}", partial(_measure, encoded, family, given, catalogue))
    Console(width=160).print(table(found))


def _measure(encoded: EncodedSplits, family: str, given: Mapping[str, str], catalogue: Block) -> Found:
    network, aucs = encoded.fit(family, given, Progress(console=Console(quiet=True), disable=True))
    return {**aucs, **places(network, encoded, catalogue)}


if __name__ == "__main__":
    main()
