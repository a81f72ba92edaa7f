"""The command line. It joins the offline and the online road, and loads of each only what a subcommand needs."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

# Threads that spin while they wait make training tens of times slower on a machine that does anything else.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

DATA_SETS = ("movielens", "frappe", "criteo", "open-bandit", "csv")
MENDABLE = (
    ("features.bundle", "BundleError"),
    ("features.schema", "SchemaError"),
    ("features.state", "StoreError"),
    ("service.settings", "SettingsError"),
    ("service.workers", "ListenError"),
    ("training.datasets.prepared", "DataError"),
    ("training.train", "TrainError"),
    ("demo", "DemoError"),
    ("benchmarks.load", "LoadError"),
)
FOLDER = click.Path(file_okay=False, path_type=Path)


class Refusal(click.ClickException):
    """Something a person can mend: one sentence, exit code 2."""

    exit_code = 2


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="adrank")
def cli() -> None:
    """Rank ads: train CTR models on an impression log, and serve them."""


@cli.command(epilog="Example: adrank prepare movielens --source ml-1m --out data/ml-1m")
@click.argument("data_set", type=click.Choice(DATA_SETS))
@click.option("--source", type=click.Path(path_type=Path), required=True, help="The data set as published: a folder or a file.")
@click.option("--out", type=FOLDER, required=True, help="The prepared data set; must not exist yet.")
@click.option("--schema", type=click.Path(dir_okay=False, path_type=Path), help="For csv: the schema file, see docs/data.md.")
def prepare(data_set: str, source: Path, out: Path, schema: Path | None) -> None:
    """Turn a data set as published into a prepared one."""
    from importlib import import_module

    from training.progress import progress_bar

    if (data_set == "csv") != (schema is not None):
        raise Refusal("csv needs --schema FILE (see docs/data.md)" if schema is None else f"--schema is for csv; {data_set} has its own")
    module = import_module("training.datasets." + {"csv": "csv_table", "open-bandit": "open_bandit"}.get(data_set, data_set))
    with progress_bar() as progress:
        task = progress.add_task(f"preparing {data_set}", total=None)
        options = [schema] if schema else []
        rows = module.prepare(source, out, *options, lambda done, total: progress.update(task, completed=done, total=total))
    print(f"{out}: " + ", ".join(f"{split} {count:,}" for split, count in rows.items()) + " rows")


@cli.command(epilog="Example: adrank train --data data/ml-1m --model din --models models --set embedding_l2=0.01")
@click.option("--data", type=FOLDER, required=True, help="A prepared data set.")
@click.option("--model", required=True, help="The network: deepfm or din.")
@click.option("--models", type=FOLDER, default="models", show_default=True, help="The model repository.")
@click.option("--name", help="Name in the repository; default: the network's.")
@click.option("--seed", type=int, help="One seed makes a run repeatable to the last bit on one machine.")
@click.option("--epochs", type=click.IntRange(min=1), help="The most passes over the train split.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any setting of training or of the network.")
def train(data: Path, model: str, models: Path, name: str | None, seed: int | None, epochs: int | None, settings: tuple[str, ...]) -> None:
    """Train a network and publish it as a bundle, the new live version."""
    from features.bundle import check_name, read_manifest
    from training.datasets.prepared import open_prepared
    from training.export import train_and_publish
    from training.progress import progress_bar

    check_name(name or model)
    given = dict(_pair(text) for text in settings)
    given |= {key: str(value) for key, value in {"seed": seed, "epochs": epochs}.items() if value is not None}
    with progress_bar() as progress:
        path, trained = train_and_publish(open_prepared(data), model, models, name or model, given, progress)
    _print_metrics(trained.metrics)
    print(f"published {path}")
    if int8 := read_manifest(path).get("int8"):
        moves = ", ".join(f"{name} {move:+.2g}" for name, move in int8["moved"].items())
        print(f"int8 is not served: {int8['refused']}" if int8["refused"] else f"int8 may be served; on test it moves {moves}")


@cli.command(epilog="Example: adrank evaluate --bundle models/din/20261122101500 --data data/ml-1m --json")
@click.option("--bundle", type=FOLDER, required=True, help="A version in the model repository.")
@click.option("--data", type=FOLDER, required=True, help="A prepared data set.")
@click.option("--split", type=click.Choice(["train", "valid", "test"]), default="test", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def evaluate(bundle: Path, data: Path, split: str, as_json: bool) -> None:
    """Measure a published bundle on a split, through ONNX Runtime."""
    from features.bundle import load_bundle
    from training.datasets.prepared import open_prepared
    from training.export import evaluate_bundle
    from training.progress import progress_bar

    with progress_bar() as progress:
        metrics = evaluate_bundle(load_bundle(bundle), open_prepared(data), split, progress)
    if as_json:
        print(json.dumps(metrics.as_dict()))
    else:
        _print_metrics({split: metrics})


@cli.command(epilog="Example: adrank load --data data/ml-1m --redis redis://127.0.0.1:6379/0")
@click.option("--data", type=FOLDER, required=True, help="A prepared data set.")
@click.option("--redis", help="The store's URL; default: ADRANK_REDIS, then redis://127.0.0.1:6379/0.")
def load(data: Path, redis: str | None) -> None:
    """Write a prepared data set's users, histories and ads into the store; running services follow."""
    from service.app import open_store
    from service.settings import load_settings
    from training.datasets.prepared import open_prepared
    from training.datasets.states import fill_store
    from training.progress import progress_bar

    store = open_store(load_settings({"redis": redis}))
    with progress_bar() as progress:
        users, ads = asyncio.run(fill_store(store, open_prepared(data), progress))
    print(f"loaded {users:,} users and {ads:,} ads")


@cli.command(epilog="Example: adrank serve --models models --redis redis://127.0.0.1:6379/0 --workers 2")
@click.option("--models", type=FOLDER, help="The model repository.")
@click.option("--redis", help="The store's URL. A password belongs into ADRANK_REDIS, not on the command line.")
@click.option("--host", help="Address to listen on; default 127.0.0.1.")
@click.option("--port", type=int, help="Port to listen on; default 8000.")
@click.option("--workers", type=int, help="Processes; default 1.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Where to score; default cpu.")
@click.option("--precision", type=click.Choice(["float32", "int8"]), help="int8 where a bundle has it; default float32.")
def serve(**flags: Any) -> None:
    """Answer POST /rank. Every flag is also a variable, such as ADRANK_PORT."""
    from service.settings import load_settings
    from service.workers import serve as run

    run(load_settings(flags))


@cli.command(epilog="Example: adrank demo --once")
@click.option("--once", is_flag=True, help="Print one ranking and stop.")
@click.option("--loop", is_flag=True, help="Let users visit, click and change; retrain and swap the model every minute.")
@click.option("--rounds", type=click.IntRange(2, 100), default=8, show_default=True, help="With --loop: how many minutes.")
@click.option("--port", type=int, default=8000, show_default=True, help="Port of the service.")
@click.option(
    "--dir", "folder", type=FOLDER, default="data/demo", show_default=True, help="Where the demo's data and models go, anew each time."
)
def demo(once: bool, loop: bool, rounds: int, port: int, folder: Path) -> None:
    """Make a synthetic ad world, train DIN and DeepFM on its log, serve them, and rank for a user; --loop closes the loop."""
    from demo import run
    from demo_loop import run as run_loop

    for ending in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C does: the store and the service end with the demo
        signal.signal(ending, signal.default_int_handler)
    if loop and once:
        raise Refusal("--once stops after one ranking, --loop goes on: choose one")
    run_loop(folder, port, rounds) if loop else run(folder, port, once)


@cli.command(epilog="Example: adrank bench --url http://127.0.0.1:8000 --redis redis://127.0.0.1:6379/0 --candidates 500 --rate half")
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="The running service.")
@click.option("--redis", help="The service's store, to draw users and ads from; default: ADRANK_REDIS.")
@click.option("--candidates", type=click.IntRange(min=1), default=200, show_default=True, help="Of each request.")
@click.option("--form", type=click.Choice(["ids", "columns", "rows"]), default="ids", show_default=True, help="How they are sent.")
@click.option("--connections", type=click.IntRange(1, 10_000), default=8, show_default=True)
@click.option("--rate", help="Open loop at this many requests a second, or half: of what the closed loop reaches. Default: closed loop.")
@click.option("--seconds", type=click.FloatRange(0, min_open=True), default=10.0, show_default=True, help="Of each measurement.")
@click.option("--warm-up", type=click.FloatRange(0), default=2.0, show_default=True, help="Seconds before it.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the users and candidates drawn.")
@click.option("--json", "target", type=click.Path(path_type=Path), help="Write JSON there too; - is standard output, instead of the table.")
def bench(url: str, redis: str | None, rate: str | None, target: Path | None, **rest: Any) -> None:
    """Load a running service, and measure throughput and latency."""
    from rich.console import Console

    from benchmarks import bench
    from benchmarks.load import Target
    from service.settings import load_settings

    load = bench.Load(target=Target.of(url), rate=_rate(rate), **rest)
    measured = bench.run(load_settings({"redis": redis}), load)
    bench.write(bench.as_dict(load, measured), target)
    if str(target) != "-":
        bench.show(load, measured, Console())
    if any(m.interrupted for m in measured):
        raise click.Abort


def _rate(text: str | None) -> Any:
    try:
        rate = text if text in (None, "half") else float(text)
    except ValueError:
        rate = -1.0
    if isinstance(rate, float) and not 0 < rate <= 1e6:
        raise Refusal(f"--rate {text}: expected requests a second, above 0 and at most 1,000,000, or half")
    return rate


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise Refusal(f"--set {text}: expected KEY=VALUE")
    return key, value


def _print_metrics(metrics: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("split", "rows", "AUC", "GAUC", "log loss", "normalised entropy", "calibration error", "p(click) / clicks")
    for split, m in metrics.items():
        rates = (m.auc, m.gauc, m.log_loss, m.normalised_entropy, m.calibration_error, m.calibration_ratio)
        table.add_row(split, f"{m.rows:,}", *(f"{value:.5f}" for value in rates))
    Console().print(table)


def _is_mendable(error: Exception) -> bool:
    """Whether the text of an error is a sentence for a person; a class that was never imported was never raised."""
    return any(isinstance(error, getattr(sys.modules.get(module), name, ())) for module, name in MENDABLE)


def main(words: Sequence[str] | None = None) -> None:
    """Run `adrank`: a mistake that a person can mend is one sentence and exit code 2, an interruption is exit code 130."""
    try:
        cli(words, prog_name="adrank", standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except Exception as error:
        if not _is_mendable(error):
            raise
        sys.stderr.write(f"Error: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
