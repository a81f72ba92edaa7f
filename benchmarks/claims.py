"""What papers say of their parts: each part beside what it replaces, all else alike, on a small sample of MovieLens-1M, three seeds each.

The first rows by time: 20,000 to train on, 4,000 to choose the epoch by, 12,000 to measure on. The JSON file's are not measured again.

    adrank prepare movielens --source ml-1m --out data/ml-1m
    python -m benchmarks.claims --data data/ml-1m --json data/bench/claims.json
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from shutil import copy
from statistics import mean
from typing import Any

import click
import numpy as np
import polars as pl
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from adrank_bench.cold import exposures
from training.datasets.history import Past
from training.datasets.prepared import SPLITS, Prepared, open_prepared
from training.evaluate import auc
from training.fit import deterministic, fit_network, predict
from training.networks import NETWORKS
from training.networks.contract import Fields
from training.networks.layers import Dice
from training.progress import progress_bar
from training.train_settings import TrainSettings, overridden

from .defaults import EncodedSplits, Found, measured, resume

ENDS = (0, 20_000, 24_000, 36_000)
LONGEST, LENGTH = 200, 50
LOOP = {"threads": "1", "epochs": "3", "batch": "256", "learning_rate": "0.001", "least_steps": "0", "flat_below": "0"}
DIN = {"attention": "32-16"}
RARE = 10
"""Impressions in train up to which an ad is cold."""


class PReLU(nn.Module):
    """x above 0, α x below, an α for each feature of the last axis, which is learned: torch's own wants features second."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(features))  # where Dice begins too

    def forward(self, x: Tensor) -> Tensor:
        """Of `(..., features)`, that shape."""
        return x.relu() + self.alpha * x.clamp(max=0)


@dataclass(frozen=True)
class Variant:
    """A network, its settings, how many behaviours it sees, and what stands in the place of Dice."""

    family: str
    settings: Mapping[str, str]
    length: int = LENGTH
    instead: Callable[[int], nn.Module] | None = None


VARIANTS = {
    "DIN: Dice, no softmax, whole-table decay, 50 behaviours": Variant("din", DIN),
    "DIN: PReLU": Variant("din", DIN, instead=PReLU),
    "DIN: ReLU": Variant("din", DIN, instead=lambda _: nn.ReLU()),
    "DIN: softmax": Variant("din", {**DIN, "softmax": "true"}),
    "DIN: mini-batch-aware decay": Variant("din", {**DIN, "regularise": "batch"}),
    "DIN: no decay": Variant("din", {**DIN, "embedding_l2": "0"}),
    "DIN: 10 behaviours": Variant("din", DIN, 10),
    "DIN: 200 behaviours": Variant("din", DIN, LONGEST),
    "DeepFM: batch norm": Variant("deepfm", {}),
    "DeepFM: layer norm": Variant("deepfm", {"norm": "layer"}),
    "DeepFM: variance-only norm": Variant("deepfm", {"norm": "variance"}),
    "DeepFM: no norm": Variant("deepfm", {"norm": "none"}),
    "DeepFM: with the co-occurrence head": Variant("deepfm", {"cooccurrence": "0.1"}),
}


def sample(data: Prepared, out: Path) -> Prepared:
    """The first rows by time as a data set, with histories of up to 200 from the rows themselves."""
    for name in ("ads.parquet", "users.parquet"):
        copy(data.folder / name, out / name)
    schema = (data.folder / "schema.toml").read_text("utf-8").replace(f"length = {LENGTH}\n", f"length = {LONGEST}\n", 1)
    (out / "schema.toml").write_text(schema, "utf-8")
    log = pl.concat(list(data.frames("train"))).select("label", "user_id", "ad_id", "ts").head(ENDS[-1])
    log = log.with_columns(Past(log, LONGEST).histories(slice(None)).alias("history"))
    for split, (start, stop) in zip(SPLITS, pairwise(ENDS), strict=True):
        (out / split).mkdir()
        log[start:stop].write_parquet(out / split / "0.parquet")
    return open_prepared(out)


def shortened(history: np.ndarray[Any, np.dtype[np.int32]], length: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    """The last behaviours alone `(N, length)` of `history (N, T)`, which is padded with 0 at the end."""
    count = (history > 0).sum(1, keepdims=True)
    places = np.maximum(count - length, 0) + np.arange(length)
    kept = np.take_along_axis(history, np.minimum(places, history.shape[1] - 1), 1)
    return np.where(places < count, kept, 0)


def replaced(network: nn.Module, instead: Callable[[int], nn.Module]) -> None:
    """Put something in the place of every Dice."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, Dice):
                setattr(module, name, instead(len(child.alpha)))


def tried(encoded: EncodedSplits, cold: np.ndarray[Any, np.dtype[np.bool_]], variant: Variant, seed: int) -> Found:
    """A training, and its AUC on all rows of test and on those of cold ads."""
    kind = NETWORKS[variant.family]
    settings, loop = overridden({**LOOP, **variant.settings, "seed": str(seed)}, kind.settings(), TrainSettings())
    rows = {split: replace(each, history=shortened(each.history, variant.length)) for split, each in encoded.rows.items()}
    with deterministic(loop):
        network = kind(Fields.of(encoded.encoder.schema, encoded.encoder.vocabularies), settings)
        if variant.instead:
            replaced(network, variant.instead)
        fit_network(network, rows["train"], rows["valid"], loop, Progress(console=Console(quiet=True), disable=True))
    logits, labels = predict(network, rows["test"]), rows["test"].labels
    return {"auc": auc(labels, logits), "cold": auc(labels[cold], logits[cold])}


@click.command()
@click.option("--data", type=click.Path(file_okay=False, path_type=Path), required=True, help="MovieLens-1M, prepared.")
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), default=Path("data/bench/claims.json"), show_default=True)
def main(data: Path, seeds: int, path: Path) -> None:
    """Measure what is not in the JSON file yet, and print the table: means over the seeds, the smallest and the largest."""
    found = resume(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, progress_bar() as progress:
        part = sample(open_prepared(data), Path(folder))
        encoded, cold = EncodedSplits.of(part), exposures(part)["ad"] <= RARE
        for seed in progress.track(range(1, seeds + 1), description="seeds"):
            for name, variant in VARIANTS.items():
                measured(found, path, f"{name}/{seed}", partial(tried, encoded, cold, variant, seed))
    table = Table("variant", "AUC", f"of {int(cold.sum()):,} rows whose ad has at most {RARE} impressions in train")
    for name in VARIANTS:
        each = [found[f"{name}/{seed}"] for seed in range(1, seeds + 1)]
        values = [[run[measure] for run in each] for measure in ("auc", "cold")]
        table.add_row(name, *(f"{mean(some):.4f} ({min(some):.4f} to {max(some):.4f})" for some in values))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
