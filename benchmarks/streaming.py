"""Data larger than memory: what a run takes at most, how fast it is beside one in memory, and what blocks cost in AUC.

python -m benchmarks.streaming peak --rows 50000000 --memory 3 --model lr --work /tmp/streaming
python -m benchmarks.streaming speed --rows 500000
python -m benchmarks.streaming auc --data data/ml-1m --model deepfm
"""

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import polars as pl
import psutil
from rich.console import Console
from rich.progress import Progress

from features.encode import Encoder
from training.datasets.columns import Mapped
from training.datasets.criteo import CATEGORIES, NUMBERS, SCHEMA
from training.datasets.encoded import Rows, encode_split
from training.datasets.memory import Memory
from training.datasets.prepared import SHARES, SPLITS, Prepared, open_prepared, write_split, write_tables
from training.datasets.vocabularies import learn_vocabularies
from training.fit import deterministic, fit_network
from training.networks import NETWORKS, build
from training.networks.contract import Fields
from training.train_settings import TrainSettings, overridden

ROWS_A_FILE, MOST_VALUES = 500_000, 100_000
VALUES = (1460, 583, 10**7, 10**6, 305, 24, 12_517, 633, 3, 93_145, 5683, 10**6, 3194, 27, 14_992, 10**6, 10, 5652, 2173, 4, 10**6, 18)
VALUES_OF = [min(MOST_VALUES, count) for count in (*VALUES, 15, 286_181, 105, 142_572)]
"""Of each category, about as in Criteo's log, but at most 100,000: a vocabulary is in memory whatever the rows are."""
QUIET = Progress(console=Console(quiet=True), disable=True)
EPOCHS, TIMES = 3, 3


def criteo_like(folder: Path, rows: int) -> Prepared:
    """A data set of Criteo's shape: 13 numbers, 26 categories with values as frequent as by Zipf's law; some tell of clicks."""
    if not folder.exists():
        random, staging = np.random.default_rng(1), folder.with_name(folder.name + ".part")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        write_tables(staging, SCHEMA)
        for split, share in zip(SPLITS, SHARES, strict=True):
            count = round(rows * share)
            sizes = [min(ROWS_A_FILE, count - start) for start in range(0, count, ROWS_A_FILE)]
            write_split(staging, split, (_drawn(random, size) for size in sizes))
        staging.rename(folder)
    return open_prepared(folder)


def _drawn(random: np.random.Generator, rows: int) -> pl.DataFrame:
    numbers = {f"ad.{name}": np.floor(random.lognormal(1, 2, rows)) for name in NUMBERS}
    logit, categories = -1.5 + 0.2 * np.log1p(numbers["ad.I1"]), dict[str, pl.Series]()
    for name, size in zip(CATEGORIES, VALUES_OF, strict=True):
        drawn = np.minimum(size ** random.random(rows), size).astype(np.int64) - 1  # Zipf: a value's chance is one over its rank
        categories[f"ad.{name}"] = pl.Series([f"{(at * 2654435761) % 2**32:08x}" for at in range(size)]).gather(drawn)
        logit += 0.3 * np.sin(drawn + size)
    labels = (random.random(rows) < 1 / (1 + np.exp(-logit))).astype(np.int8)
    return pl.DataFrame({"label": labels, **numbers, **categories}).with_columns(user_id=pl.lit(""), ad_id=pl.lit(""))


@click.group()
def main() -> None:
    """What data larger than memory costs."""


@main.command()
@click.option("--rows", default=1_000_000, show_default=True)
@click.option("--memory", default=1.0, show_default=True, help="GB, for adrank train.")
@click.option("--model", default="lr", show_default=True)
@click.option("--work", type=click.Path(path_type=Path), default=Path("data/streaming"), show_default=True)
def peak(rows: int, memory: float, model: str, work: Path) -> None:
    """The most that `adrank train` has in memory on so many rows, one epoch."""
    data = criteo_like(work / f"rows-{rows}", rows)
    words = ["train", "--data", str(data.folder), "--model", model, "--memory", str(memory), "--epochs", "1", "--promote", "always"]
    with tempfile.TemporaryDirectory() as models:
        start, most = time.monotonic(), 0
        process = psutil.Popen([sys.executable, "-m", "adrank", *words, "--models", models, "--set", "threads=1"], stdout=sys.stderr)
        while True:
            try:
                process.wait(0.2)
                break
            except (psutil.TimeoutExpired, subprocess.TimeoutExpired):
                most = max(most, process.memory_info().rss)
        if process.returncode:
            raise click.ClickException("the training failed")
    stored = sum(path.stat().st_size for path in (data.folder / ".encoded").rglob("*") if path.is_file()) / 2**30
    seconds = time.monotonic() - start
    print(f"{rows:,} rows, {stored:.2f} GB encoded on disk, --memory {memory:g}: at most {most / 2**30:.2f} GiB resident, {seconds:,.0f} s")


@main.command()
@click.option("--rows", default=200_000, show_default=True)
@click.option("--model", default="deepfm", show_default=True)
@click.option("--work", type=click.Path(path_type=Path), default=Path("data/streaming"), show_default=True)
def speed(rows: int, model: str, work: Path) -> None:
    """Rows a second of CPU, one thread, from disk and in memory by turns; the pool is an eighth of the rows."""
    data = criteo_like(work / f"rows-{rows}", rows)
    encoder = Encoder(data.schema, learn_vocabularies(data))
    kinds = {"memory": Memory(), "disk": Memory(1e-9)}
    splits = {kind: encode_split(replace(data, memory=memory), "train", encoder) for kind, memory in kinds.items()}
    few = splits["memory"].take(np.arange(1000))
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(TIMES):
        for kind, train in splits.items():
            settings = TrainSettings(
                epochs=EPOCHS, threads=1, flat_below=0, patience=EPOCHS, unknown_rate=0.0, shuffle_rows=len(train) // 8
            )
            at = [now for now, _ in _epochs(data, encoder, model, train, few, settings)]
            found[kind] += [len(train) / seconds for seconds in np.diff(at)]
    for kind, rates in found.items():
        print(f"{kind}: {np.median(rates):,.0f} rows a second of CPU, {min(rates):,.0f} to {max(rates):,.0f} over {len(rates)} epochs")
    print(f"disk / memory: {np.median(found['disk']) / np.median(found['memory']):.3f}")


@main.command()
@click.option("--data", "folder", type=click.Path(path_type=Path), required=True)
@click.option("--model", default="deepfm", show_default=True)
@click.option("--seeds", default=3, show_default=True)
@click.option("--part", default=50, show_default=True, help="Of how many the rows of a pool are one.")
def auc(folder: Path, model: str, seeds: int, part: int) -> None:
    """AUC on valid after one epoch, of all rows mixed and of pools of blocks, by seed."""
    data = open_prepared(folder)
    encoder = Encoder(data.schema, learn_vocabularies(data))
    train, valid = (encode_split(data, split, encoder) for split in ("train", "valid"))
    gaps = []
    for seed in range(1, seeds + 1):
        settings = TrainSettings(seed=seed, epochs=1, threads=1, flat_below=0, shuffle_rows=len(train) // part)
        orders = (train, replace(train, mapped=Mapped("", ())))
        whole, pools = (next(_epochs(data, encoder, model, rows, valid, settings))[1] for rows in orders)
        gaps.append(pools - whole)
        print(f"{folder.name}, seed {seed}: {whole:.5f} of all mixed, {pools:.5f} of pools of {settings.shuffle_rows:,} of {len(train):,}")
    print(f"{folder.name}: pools {np.mean(gaps):+.5f} on average, {min(gaps):+.5f} to {max(gaps):+.5f}")


def _epochs(
    data: Prepared, encoder: Encoder, model: str, train: Rows, valid: Rows, settings: TrainSettings
) -> Iterator[tuple[float, float]]:
    """Of each epoch the CPU seconds when it ended, and the AUC on valid."""
    found: list[tuple[float, float]] = []
    network_settings, settings = overridden({}, NETWORKS[model].settings(), settings)
    with deterministic(settings):
        network = build(model, Fields.of(data.schema, encoder.vocabularies), network_settings)
        fit_network(network, train, valid, settings, QUIET, each=lambda epoch: found.append((time.process_time(), epoch.valid.auc)))
    yield from found


if __name__ == "__main__":
    main()
