"""Several workers against one process of as many threads: rows a second between the first epoch's end and the last's, and AUC on test.

python -m benchmarks.workers_training --data data/frappe --model deepfm
"""

import io
import tempfile
import time
from pathlib import Path
from statistics import median

import click
from rich.console import Console
from rich.progress import Progress

from training.checkpoint import Checkpoint
from training.datasets.prepared import Prepared, open_prepared
from training.networks import NETWORKS
from training.train import train
from training.train_settings import TrainSettings


class Marks(io.StringIO):
    """Notes when each epoch's line is written."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def write(self, text: str) -> int:
        """Count it."""
        self.times += [time.monotonic()] * text.count("learning rate ", 0, 40) * text.startswith("epoch")
        return len(text)


def measured(data: Prepared, family: str, workers: int, threads: int, seed: int, epochs: int) -> tuple[float, float]:
    """Rows a second, and AUC on test."""
    settings = TrainSettings(seed=seed, workers=workers, threads=threads, epochs=epochs, patience=epochs, flat_below=0)
    marks = Marks()
    with tempfile.TemporaryDirectory() as folder, Progress(console=Console(file=marks, width=1000), disable=True) as progress:
        trained = train(data, family, NETWORKS[family].settings(), settings, progress, checkpoint=Checkpoint(Path(folder) / "one" / "two"))
    return trained.rows["train"] * (epochs - 1) / (marks.times[-1] - marks.times[0]), trained.metrics["test"].auc


@click.command()
@click.option("--data", "folder", type=click.Path(path_type=Path), required=True, help="A prepared data set.")
@click.option("--model", "family", default="deepfm", show_default=True)
@click.option("--workers", type=click.IntRange(2), default=2, show_default=True)
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--epochs", type=click.IntRange(2), default=5, show_default=True)
def main(folder: Path, family: str, workers: int, seeds: int, epochs: int) -> None:
    """Measure both in turns, a seed each."""
    data, ratios = open_prepared(folder), list[float]()
    for seed in range(1, seeds + 1):
        one = measured(data, family, 1, workers, seed, epochs)
        several = measured(data, family, workers, 1, seed, epochs)
        ratios.append(several[0] / one[0])
        rates = ", ".join(
            f"{what} {rate:,.0f} rows/s, AUC {auc:.5f}" for what, (rate, auc) in (("one", one), (f"{workers} workers", several))
        )
        print(f"seed {seed}: {rates}; ratio {ratios[-1]:.2f}", flush=True)
    print(f"ratio {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
