"""Do the defaults of `adrank train` suit the size of a log? Beside logistic regression, and beside the best settings of a grid.

The first N rows of MovieLens-1M by time, 80/10/10 by time. `later` are up to 10,000 rows that follow them: the test split of a small log
is too small to tell anything. The grid is chosen from on valid. What was measured stays in the JSON file and is not measured again.

    adrank prepare movielens --source ml-1m --out data/ml-1m
    python -m benchmarks.defaults --data data/ml-1m --rows 2000 --rows 8000 --rows 80000 --rows 800000 --json data/bench/defaults.json
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import click
import numpy as np
import polars as pl
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.feature_extraction import FeatureHasher
from sklearn.linear_model import LogisticRegression

from adrank_bench.bench import write
from features.encode import Encoder
from training.datasets.encoded import Rows, encode_split
from training.datasets.prepared import SPLITS, Prepared, by_order, column_of, open_prepared
from training.datasets.vocabularies import joined, learn_vocabularies
from training.evaluate import auc
from training.first_order import settled
from training.fit import deterministic, fit_network, predict
from training.networks import NETWORKS
from training.networks.contract import Fields
from training.progress import progress_bar
from training.train_settings import TrainSettings, overridden

LATER, LATER_ROWS = "later", 10_000
MEASURED = ("valid", "test", LATER)
GRIDS: dict[int, dict[str, tuple[str, ...]]] = {
    0: {"batch": ("32", "128", "512"), "learning_rate": ("0.001", "0.003")},
    50_000: {"batch": ("512", "2048"), "learning_rate": ("0.001", "0.003")},
    500_000: {"batch": ("512", "2048"), "learning_rate": ("0.001",)},
}
"""What is tried from so many rows on: a training of many takes long."""
ONE_SEED = 500_000
"""From so many rows on one seed has to do."""
STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Of the regression's regularisation, C."""
BUCKETS = 2**20
Found = dict[str, Any]


@dataclass(frozen=True)
class EncodedSplits:
    """A data set whose splits are encoded, for trainings one after the other."""

    encoder: Encoder
    rows: Mapping[str, Rows]

    @classmethod
    def of(cls, data: Prepared) -> "EncodedSplits":
        """All splits that are there."""
        encoder = Encoder(data.schema, learn_vocabularies(data))
        return cls(encoder, {split: encode_split(data, split, encoder) for split in (*SPLITS, LATER) if (data.folder / split).exists()})

    def fit(self, family: str, given: Mapping[str, str], progress: Progress) -> tuple[Any, Found]:
        """A network trained with these settings, and its AUC by split; one thread, so that a seed gives the same bits again."""
        network, loop = overridden({"threads": "1", **given}, NETWORKS[family].settings(), TrainSettings())
        with deterministic(loop):
            network = settled(network, len(self.rows["train"]) < loop.flat_below)
            made = NETWORKS[family](Fields.of(self.encoder.schema, self.encoder.vocabularies), network)
            epochs = fit_network(made, self.rows["train"], self.rows["valid"], loop, progress)
        aucs = {split: auc(rows.labels, predict(made, rows)) for split, rows in self.rows.items() if split != "train"}
        return made, {**aucs, "epochs": len(epochs)}


def cut(data: Prepared, rows: int, out: Path) -> Prepared:
    """The first rows of a data set by time as a data set, with those that follow them as the split `later`."""
    if not out.exists():
        staging = out.with_name(f".{out.name}")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        for name in ("schema.toml", "ads.parquet", "users.parquet"):
            shutil.copy(data.folder / name, staging / name)
        files = [path for split in SPLITS for path in data.files(split)]
        log = pl.concat([pl.scan_parquet(path) for path in files]).head(rows + LATER_ROWS).collect()
        for split, part in {**by_order(rows), LATER: range(rows, len(log))}.items():
            if part:
                (staging / split).mkdir()
                log[part.start : part.stop].write_parquet(staging / split / "0.parquet")
        staging.rename(out)
    return open_prepared(out)


def regression(data: Prepared) -> Found:
    """Logistic regression on hashed features (all but the history), its strength chosen on valid."""
    hashed = {split: _hashed(data, split) for split in (*SPLITS, LATER) if (data.folder / split).exists()}
    used = np.flatnonzero(hashed["train"][0].getnnz(0))
    models = [LogisticRegression(C=c, max_iter=300).fit(hashed["train"][0][:, used], hashed["train"][1]) for c in STRENGTHS]
    found = [{split: auc(y, model.decision_function(x[:, used])) for split, (x, y) in hashed.items()} for model in models]
    best = max(range(len(models)), key=lambda i: found[i]["valid"])
    return {**found[best], "C": STRENGTHS[best]}


def _hashed(data: Prepared, split: str) -> tuple[Any, Any]:
    rows: list[list[str]] = []
    labels: list[int] = []
    tables = {side: data.table(side) for side in ("user", "ad")}
    for frame in data.frames(split):
        whole = joined(frame, data.schema, tables)
        columns = [(field.path, column_of(whole, field)) for field in data.schema.fields if field.kind != "number"]
        tokens = [[(path, value) for value in column.to_list()] for path, column in columns if column is not None]
        rows += [[f"{path}={each}" for path, value in row for each in _values(value)] for row in zip(*tokens, strict=True)]
        labels += frame["label"].to_list()
    return FeatureHasher(BUCKETS, input_type="string", alternate_sign=False).transform(rows).tocsc(), np.array(labels)


def _values(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def plan(rows: int, families: tuple[str, ...], seeds: int) -> Iterator[tuple[str, str, dict[str, str]]]:
    """What to train on so many rows: a key, the network, its settings. Defaults with each seed, the grid with the first."""
    grid = GRIDS[max(least for least in GRIDS if least <= rows)]
    for family in families:
        for seed in range(1, seeds + 1):
            yield f"{rows}/{family}/defaults/{seed}", family, {"seed": str(seed)}
        for values in product(*grid.values()):
            given = dict(zip(grid, values, strict=True))
            yield f"{rows}/{family}/{' '.join(map('='.join, given.items()))}/1", family, given


def table(found: Mapping[str, Found], rows: tuple[int, ...], families: tuple[str, ...]) -> Table:
    """AUC on test and on the rows that follow, means over seeds with the smallest and the largest."""
    shown = Table("rows", "model", "seeds", "valid", "test", "later", "settings")
    for size in rows:
        if f"{size}/logistic" in found:
            each = found[f"{size}/logistic"]
            shown.add_row(f"{size:,}", "logistic regression", "", *(_span([each.get(split)]) for split in MEASURED), f"C={each['C']:g}")
        for family in families:
            ours = [found[key] for key in found if key.startswith(f"{size}/{family}/defaults/")]
            grid = {key.split("/")[2]: value for key, value in found.items() if key.startswith(f"{size}/{family}/batch=")}
            if ours:
                spans = (_span([each.get(split) for each in ours]) for split in MEASURED)
                shown.add_row(f"{size:,}", family, str(len(ours)), *spans, "defaults")
            if grid:
                best = max(grid, key=lambda name: grid[name]["valid"])
                spans = (_span([grid[best].get(split)]) for split in MEASURED)
                shown.add_row(f"{size:,}", family, f"best of {len(grid)}", *spans, best)
    return shown


def _span(values: list[float | None]) -> str:
    there = [value for value in values if value is not None]
    if not there:
        return "–"
    return f"{mean(there):.4f}" + (f" ({min(there):.4f}–{max(there):.4f})" if len(there) > 1 else "")


def resume(path: Path) -> Found:
    """What an earlier run left."""
    return dict(json.loads(path.read_text("utf-8"))) if path.exists() else {}


def measured(found: Found, path: Path, key: str, measure: Callable[[], Found]) -> None:
    """Measure what is not there yet, and write all down."""
    if key not in found:
        found[key] = measure()
        write(found, path)


@click.command()
@click.option("--data", type=click.Path(file_okay=False, path_type=Path), required=True, help="MovieLens-1M, prepared.")
@click.option("--rows", type=click.IntRange(min=100), multiple=True, default=(2_000, 8_000, 80_000), show_default=True)
@click.option("--model", "families", multiple=True, type=click.Choice(list(NETWORKS)), default=tuple(NETWORKS), show_default=True)
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Of the defaults; one from 500,000 rows on.")
@click.option("--grid/--no-grid", default=True, show_default=True)
@click.option(
    "--json", "path", type=click.Path(dir_okay=False, path_type=Path), default=Path("data/bench/defaults.json"), show_default=True
)
def main(data: Path, rows: tuple[int, ...], families: tuple[str, ...], seeds: int, grid: bool, path: Path) -> None:
    """Measure what is not in the JSON file yet, and print the table."""
    found = resume(path)
    with progress_bar() as progress:
        for size in rows:
            part = cut(open_prepared(data), size, path.parent / f"rows-{size}")
            measured(found, path, f"{size}/logistic", partial(regression, part))
            wanted = [each for each in plan(size, families, seeds if size < ONE_SEED else 1) if grid or "/defaults/" in each[0]]
            encoded = EncodedSplits.of(part) if any(key not in found for key, *_ in wanted) else None
            for key, family, given in progress.track(wanted, description=f"{size:,} rows"):
                if encoded:
                    measured(found, path, key, partial(_aucs, encoded, family, given))
    Console(width=140).print(table(found, rows, families))


def _aucs(encoded: EncodedSplits, family: str, given: Mapping[str, str]) -> Found:
    return encoded.fit(family, given, Progress(console=Console(quiet=True), disable=True))[1]


if __name__ == "__main__":
    main()
