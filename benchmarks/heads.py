"""Networks with heads beside a single one for conversions, trained on the same rows: `python -m benchmarks.heads DATA` of adrank prepare.

The single one is trained on conversions as if they were clicks. What is compared is p(conversion) of the test split's impressions,
calibrated on valid; where the data set has `true_conversion`, also how far from it they are. `--known 0.05` leaves a twentieth of the
conversions of train and valid known, `--users 0.2` a fifth of the users; `--late` compares what rows of open windows count for.
"""

import shutil
import tempfile
from pathlib import Path

import click
import numpy as np
import polars as pl
from rich.progress import Progress

from training.datasets.prepared import SPLITS, open_prepared
from training.fit import predict_heads
from training.networks import NETWORKS
from training.retrain.compare import compare
from training.retrain.gate import users_of
from training.train import train
from training.train_settings import TrainSettings

BOTH = "click-conversion"
MODELS = {"deepfm": ("deepfm", BOTH), "mmoe": ("mmoe", BOTH), "esmm": ("esmm", BOTH)}
"""The single network, deepfm, is the bar; the first of these is it again, with a head for each outcome."""


def copied(source: Path, out: Path, users: float, known: float, single: bool) -> Path:
    """The data set with fewer users and fewer known conversions; for the single network conversions in place of clicks."""
    shutil.copytree(source, out, ignore=shutil.ignore_patterns(*SPLITS))
    kept = pl.col("user_id").hash(1) % 10_000 < 10_000 * users
    for path in (path for split in SPLITS for path in sorted((source / split).glob("*.parquet"))):
        frame = pl.read_parquet(path).filter(kept)
        if path.parent.name != "test" and known < 1:
            told = np.random.default_rng(len(frame)).random(len(frame)) < known
            frame = frame.with_columns(pl.when(pl.Series(told)).then("conversion").alias("conversion"))
        if single:
            frame = frame.filter(pl.col("conversion").is_not_null()).with_columns(label="conversion").drop("conversion")
        (out / path.parent.name).mkdir(exist_ok=True)
        frame.write_parquet(out / path.parent.name / path.name)
    return out


def p_of(data: Path, family: str, head: str, settings: TrainSettings) -> np.ndarray:
    """What a network that is trained gives for the test rows' head."""
    with Progress(disable=True) as progress:
        trained = train(open_prepared(data), family, NETWORKS[family].settings(), settings, progress)
    return trained.calibrations[head].on_log(predict_heads(trained.network, trained.held_out)[head])


@click.command()
@click.argument("source", type=click.Path(path_type=Path, exists=True))
@click.option("--users", default=1.0)
@click.option("--known", default=1.0)
@click.option("--seeds", default=1)
@click.option("--late", is_flag=True)
def main(source: Path, users: float, known: float, seeds: int, late: bool) -> None:
    """Train all and print how they compare."""
    with tempfile.TemporaryDirectory() as folder:
        both, alone = (copied(source, Path(folder) / name, users, known, name == "alone") for name in ("both", "alone"))
        data = open_prepared(both)
        test = pl.concat(data.frames("test"))
        labels, people = test["conversion"].to_numpy().astype(np.float64), users_of(data)
        print(f"{len(test):,} test rows, {labels.mean():.2%} converted; train: " + str(counted(both)))
        for seed in range(1, seeds + 1):
            usual = TrainSettings(seed=seed, threads=1)
            if late:
                truth = test["true_conversion"].to_numpy()
                for delayed in (True, False):
                    p = p_of(both, "esmm", "conversion", TrainSettings(seed=seed, threads=1, delayed=delayed))
                    print(f"seed {seed}: delayed={delayed}: sum of p / truth {p.sum() / truth.sum():.3f}, KL {distance(truth, p):.6f}")
                continue
            bar = p_of(alone, "deepfm", "click", usual)
            for name, (family, heads) in MODELS.items():
                p = p_of(both, family, "conversion", TrainSettings(seed=seed, threads=1, heads=heads))
                found = compare(labels, people, p, bar)
                told = []
                for what, move in ((what, found.differences[what]) for what in ("auc", "log_loss")):
                    before, after = getattr(found.champion, what), getattr(found.challenger, what)
                    told.append(f"{what} {before:.5f} -> {after:.5f}, {move.value:+.5f} ({move.low:+.5f} to {move.high:+.5f})")
                print(f"seed {seed}: single deepfm -> {name}: {'; '.join(told)}")
                if "true_conversion" in test.columns:
                    truth = test["true_conversion"].to_numpy()
                    print(f"    KL to the truth {distance(truth, bar):.6f} -> {distance(truth, p):.6f}", flush=True)


def distance(truth: np.ndarray, p: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence of Bernoulli p from the truth, in nats."""
    return float(np.mean(truth * np.log(truth / p) + (1 - truth) * np.log((1 - truth) / (1 - p))))


def counted(data: Path) -> dict[str, int]:
    """Rows, clicks and conversions of train."""
    rows = pl.concat(pl.read_parquet(path, columns=["label", "conversion"]) for path in (data / "train").glob("*.parquet"))
    known = rows["conversion"].drop_nulls()
    return {"rows": len(rows), "clicks": int(rows["label"].sum()), "known": len(known), "converted": int(known.sum())}


if __name__ == "__main__":
    main()
