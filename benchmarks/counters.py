"""What are counters worth? AUC and log loss of a network with and without them, on ML-1M and in the world that drifts.

    python -m benchmarks.counters --seeds 3
    python -m benchmarks.counters --ml ../shared/data/ml-1m --seeds 3 --rates

In the world ads come and go every day, better and worse ones, and favourites change. A data set is prepared as a table twice, and the
`[counter]` tables are all that differs.
"""

from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

import click
import numpy as np
import polars as pl
from rich.progress import Progress

from training.datasets import csv_table, movielens
from training.datasets.prepared import SPLITS, open_prepared
from training.datasets.vocabularies import joined
from training.networks import NETWORKS
from training.simulation import AGES, CATEGORIES, DAY, DAYS, POSITIONS, SCHEMA, SLOTS, START, make_world
from training.train import train
from training.train_settings import TrainSettings, overridden

COUNTERS = """
[counter.ad_rate_short]
of = "click/impression"
by = "ad"
window = "{short}"
[counter.ad_rate_long]
of = "click/impression"
by = "ad"
window = "{long}"
[counter.user_rate]
of = "click/impression"
by = "user"
window = "{long}"
[counter.liked]
of = "click/impression"
by = ["user", "{value}"]
window = "{long}"
"""
SHOWN = """
[counter.ad_shown]
of = "impression"
by = "ad"
window = "{long}"
"""
LATER = 30


def of_ml(source: Path) -> tuple[pl.DataFrame, str, str]:
    """The ratings as a table, its schema, and the counters."""
    out = Path(mkdtemp()) / "ml"
    movielens.prepare(source, out)
    data = open_prepared(out)
    rows = pl.concat([frame.drop("history", "history_ts") for split in SPLITS for frame in data.frames(split)])
    rows = joined(rows, data.schema, {side: data.table(side) for side in ("user", "ad")})
    return rows, data.schema.to_toml(), (COUNTERS + SHOWN).format(short="7d", long="30d", value="genres")


def of_the_world(impressions: int = 200_000) -> tuple[pl.DataFrame, str, str]:
    """Impressions of days in which ads come and go, its schema, and the counters."""
    world, random = make_world(later=LATER), np.random.default_rng(7)
    second = np.sort(random.integers(0, (DAYS + LATER) * DAY, impressions))
    day, user = second // DAY, random.integers(0, len(world.age), impressions)
    ad = np.concatenate([random.choice(world.live(each), int((day == each).sum())) for each in range(DAYS + LATER)])
    slot, position = random.integers(0, len(SLOTS), impressions), random.integers(0, POSITIONS, impressions)
    rows = {
        "label": (random.random(impressions) < world.p_click(day, user, ad, slot, position)).astype(np.int8),
        "user_id": [f"u{each}" for each in user],
        "user.age": [AGES[world.age[each]] for each in user],
        "ad_id": [f"a{each}" for each in ad],
        "ad.category": [CATEGORIES[world.category[each]] for each in ad],
        "ad.brand": [f"brand{world.brand[each]}" for each in ad],
        "context.slot": [SLOTS[each] for each in slot],
        "context.position": [str(each + 1) for each in position],
        "ts": second + START,
    }
    return pl.DataFrame(rows), SCHEMA, (COUNTERS + SHOWN).format(short="1d", long="7d", value="category")


@click.command()
@click.option("--ml", type=click.Path(path_type=Path), help="The folder of ML-1M as GroupLens ships it, in place of the world.")
@click.option("--model", default="deepfm", show_default=True)
@click.option("--seeds", default=3, show_default=True)
@click.option("--rates", is_flag=True, help="Without the count of impressions, which follows the traffic.")
def main(ml: Path | None, model: str, seeds: int, rates: bool) -> None:
    """Prepare, train and tell."""
    rows, schema, counters = of_ml(ml) if ml else of_the_world()
    counters = counters.partition("[counter.ad_shown]")[0] if rates else counters
    named = ", ".join(f'"{column}" = "{column}"' for column in rows.columns if "." in column)
    table = f'[table]\nts = "ts"\nnobody = []\nmissing = []\ncolumns = {{ {named} }}\n'
    with TemporaryDirectory() as folder, Progress(disable=True) as progress:
        progress.console.quiet = True
        rows.write_parquet(source := Path(folder) / "rows")
        for what, more in (("without", ""), ("with", counters)):
            (file := Path(folder) / f"{what}.toml").write_text(schema + more + table)
            csv_table.prepare(source, out := Path(folder) / what, file)
            for seed in range(1, seeds + 1):
                own, settings = overridden({"threads": "1", "seed": str(seed)}, NETWORKS[model].settings(), TrainSettings())
                test = train(open_prepared(out), model, own, settings, progress).metrics["test"]
                print(f"{what} counters, seed {seed}: AUC {test.auc:.4f}, log loss {test.log_loss:.4f}", flush=True)


if __name__ == "__main__":
    main()
