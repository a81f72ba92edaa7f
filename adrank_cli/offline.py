"""From a data set to a bundle: `init`, `prepare`, `train`, `tune`."""

import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from .options import (
    FILE,
    FOLDER,
    PLACE,
    Refusal,
    WithNetworks,
    attributing,
    attribution_of,
    bounded,
    by_workers,
    console,
    in_json,
    memory_of,
    needs,
    networks,
    on_device,
    pair,
    print_metrics,
    progress_bar,
    settings_of,
    tell,
    warn,
)

DATA_SETS = ("movielens", "frappe", "criteo", "open-bandit", "csv")


@click.command(epilog="Example: adrank init --source log.csv --out schema.toml")
@click.option("--source", type=click.Path(path_type=Path), required=True, help="A table of impressions: a file or a folder of parts.")
@click.option("--out", type=FILE, default="schema.toml", show_default=True, help="The schema file; must not exist yet.")
@click.option("--label", help="The column of clicks. Default: by its name.")
@click.option("--user", "user_id", help="The column of users' ids. Default: by its name.")
@click.option("--ad", "ad_id", help="The column of ads' ids. Default: by its name.")
@click.option("--time", "ts", help="The column of times. Default: by its name.")
@needs("train")
def init(source: Path, out: Path, **named: str | None) -> None:
    """Look at a table and write a first schema file for it, with comments that say what was guessed, and why."""
    from training.datasets.first_schema import first_schema
    from training.datasets.prepared import DataError

    if out.exists():
        raise Refusal(f"{out} is there already; name another file, --out FILE, or remove it first")
    try:
        text = first_schema(source, {role: column for role, column in named.items() if column}).text(out.absolute().parent.name or "log")
    except DataError as error:
        published = ", ".join(each for each in DATA_SETS if each != "csv")
        raise Refusal(f"{error}. A public data set, as published, needs no schema: adrank prepare {published}") from error
    try:
        out.write_text(text, "utf-8")
    except OSError as error:
        raise Refusal(f"cannot write {out}: {error.strerror}") from error
    print(text)
    prepare = shlex.join(["adrank", "prepare", "csv", "--source", str(source), "--schema", str(out), "--out", "data/mine"])
    print(f"written to {out}; when it is right: {prepare}")


@click.command(epilog="Example: adrank prepare movielens --source ml-1m --out data/ml-1m")
@click.argument("data_set", type=click.Choice(DATA_SETS))
@click.option(
    "--source", type=click.Path(path_type=Path), required=True, help="The data set as published: a folder or a file; - is standard input."
)
@click.option("--out", type=FOLDER, required=True, help="The prepared data set; must not exist yet.")
@click.option("--schema", type=click.Path(dir_okay=False, path_type=Path), help="For csv: the schema file, see docs/data.md.")
@in_json
@needs("train")
def prepare(data_set: str, source: Path, out: Path, schema: Path | None, as_json: bool) -> None:
    """Turn a data set as published into a prepared one, and say what is in it and what there is to doubt."""
    from dataclasses import asdict
    from importlib import import_module

    from training.datasets.prepared import open_prepared
    from training.datasets.profile import profile

    if (data_set == "csv") != (schema is not None):
        raise Refusal("csv needs --schema FILE (see docs/data.md)" if schema is None else f"--schema is for csv; {data_set} has its own")
    module = import_module("training.datasets." + {"csv": "csv_table", "open-bandit": "open_bandit"}.get(data_set, data_set))
    doubts: list[str] = []
    with progress_bar() as progress:
        task = progress.add_task(f"preparing {data_set}", total=None)

        def advance(done: int, total: int) -> None:
            progress.update(task, description=f"{'preparing' if total else 'reading'} {data_set}", completed=done, total=total or None)

        rows = module.prepare(source, out, schema, advance, doubts.append) if schema else module.prepare(source, out, advance)
    found = profile(open_prepared(out))
    doubts += [warning for column in found.columns for warning in column.warnings]
    for doubt in doubts:
        warn(f"warning: {doubt}")
    tell({**asdict(found), "warnings": doubts}, lambda: _print_profile(found), as_json)
    if not as_json:
        print(f"{out}: " + ", ".join(f"{split} {count:,}" for split, count in rows.items()) + " rows")


def _print_profile(found: Any) -> None:
    from rich.markup import escape
    from rich.table import Column, Table

    from training.datasets.profile import RULE

    table = Table(*(Column(name, overflow="fold") for name in ("field", "kind", "missing", "values", "most frequent, or the mean")))
    for column in found.columns:
        usual = (
            f"{share:g}" if column.kind in ("number", "vector") else f"{value[:20]} {share:.1%}" for value, share in column.usual.items()
        )
        table.add_row(column.name, column.kind, f"{column.missing:.1%}", f"{column.distinct:,}", escape(", ".join(usual)))
    rates = ", ".join(f"{split} {rate:.2%}" for split, rate in found.click_rate.items())
    out = console()
    width = shutil.get_terminal_size().columns if out.is_terminal else out.width  # many columns of a few values: here folding cuts none
    out.print(f"Click rate: {rates}\nThe train split. {RULE}", table, sep="\n", highlight=False, width=width, soft_wrap=False)


@click.command(cls=WithNetworks, epilog="Example: adrank train --data data/ml-1m --model din --models models --set embedding_l2=0.01")
@click.option("--data", "--log", "data", type=FOLDER, required=True, help="A prepared data set, or a log.")
@click.option("--model", required=True, shell_complete=networks, help="The network, one of those below.")
@click.option("--models", type=FOLDER, default="models", show_default=True, help="The model repository.")
@click.option("--name", help="Name in the repository; default: the network's.")
@click.option("--seed", type=int, help="One seed makes a run repeatable to the last bit on one machine.")
@click.option("--epochs", type=click.IntRange(min=1), help="The most passes over the train split.")
@on_device
@by_workers
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any setting of training, of the network or of the gate.")
@click.option("--settings", "file", type=FILE, help="Settings in a TOML file; --set goes before. Default: those known for the data set.")
@click.option("--init-from", type=PLACE, metavar="BUNDLE", help="A bundle whose embeddings are where this network's begin.")
@click.option(
    "--promote",
    type=click.Choice(["gate", "always", "if-better", "never"]),
    default="gate",
    show_default=True,
    help="When it is the new live version: if it is fit by itself, always, if it is better than the live one too, never.",
)
@click.option(
    "--report/--no-report", default=None, help="Whether report.html, what the training came to, is in the bundle.  [default: yes]"
)
@click.option("--segment", metavar="FIELD", help="A field by whose values the report tells of calibration and AUC, such as context.slot.")
@click.option("--resume", is_flag=True, help="Go on from the checkpoint of a training that was killed, to the same weights.")
@click.option("--checkpoint", type=FOLDER, metavar="DIR", help="Where checkpoints go. Default: MODELS-checkpoints/NAME, beside the models.")
@click.option("--checkpoint-minutes", "minutes", type=click.FloatRange(0), default=5, show_default=True, help="From one to the next.")
@click.option("--log-to", type=click.Choice(["tensorboard", "mlflow"]), help="Log the training there too; an extra each (docs/models.md).")
@bounded
@attributing
@in_json
@needs("train")
def train(data: Path, model: str, models: Path, name: str | None, settings: tuple[str, ...], file: Path | None, **flags: Any) -> None:
    """Train a network and publish it as a bundle, the new live version if it is fit to be; exit code 3 if not."""
    from features.bundle import check_name
    from training.checkpoint import Checkpoint
    from training.datasets.log import open_data
    from training.retrain.publish import train_and_publish
    from training.trackers import check

    check_name(name or model)
    if tracker := flags.pop("log_to"):
        check(tracker)
    chosen, ours = flags.pop("checkpoint"), Path(f"{models.absolute()}-checkpoints") / (name or model)
    checkpoint = Checkpoint(chosen or ours, flags.pop("minutes"), flags.pop("resume"), ours=not chosen)
    memory, promote, as_json = memory_of(flags), flags.pop("promote"), flags.pop("as_json")
    opened = replace(open_data(data, attribution_of(data, flags)), memory=memory)
    given = settings_of(opened.schema.name, model, file, settings)
    given |= {key: str(value) for key, value in flags.items() if value is not None}
    with progress_bar() as progress:
        path, outcome = train_and_publish(opened, model, models, name or model, given, progress, promote, checkpoint)
    if tracker:
        _log(tracker, outcome.trained, path)
    tell(outcome.as_dict(path), lambda: _print_outcome(outcome, path), as_json)
    sys.exit(3 if outcome.refused else 0)


def _log(tracker: str, trained: Any, path: Path) -> None:
    from training.trackers import TrackerError, track

    try:
        warn(track(tracker, trained, path))
    except TrackerError as error:  # what was trained is published, and told as ever
        click.echo(f"Error: {error}", err=True)


def _print_outcome(outcome: Any, path: Path) -> None:
    from features.bundle import read_manifest

    print_metrics(outcome.trained.metrics)
    for head, calibration in outcome.trained.calibrations.items():
        print(calibration.line(head))
    print(f"published {path}")
    if int8 := read_manifest(path).get("int8"):
        moves = ", ".join(f"{name} {move:+.2g}" for name, move in int8["moved"].items())
        print(f"int8 is not served: {int8['refused']}" if int8["refused"] else f"int8 may be served; on test it moves {moves}")
    for reason in outcome.reasons:
        print(f"{'live all the same' if outcome.live else 'not live'}: {reason}")
    if not outcome.live:
        fix = f"adrank promote --models {shlex.quote(str(path.parent.parent))} --name {path.parent.name} --version {path.name}"
        print(f"{path.name} is published and not live; {fix} makes it so")


@click.command(cls=WithNetworks, epilog="Example: adrank tune --data data/ml-1m --model din --minutes 60 --set epochs=5")
@click.option("--data", type=FOLDER, required=True, help="A prepared data set, or a log.")
@click.option("--model", "family", required=True, shell_complete=networks, help="The network, one of those below.")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), required=True, help="How long to search; the file goes on from before.")
@click.option("--trials", "path", type=FILE, help="The file of trials; default data/tune/DATA-MODEL.log.")
@click.option("--most", type=click.IntRange(min=1), help="Stop after so many trials.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="A setting that is not tried but fixed.")
@click.option("--settings", "file", type=FILE, help="Where to begin, in a TOML file. Default: those known for the data set.")
@click.option("--write", "target", type=FILE, help="Write the best settings there, for --settings of adrank train.")
@on_device
@needs("tune")
def tune(data: Path, family: str, minutes: float, path: Path | None, most: int | None, **given: Any) -> None:
    """Search settings of a network that are good on the valid split. Goes on where it was stopped; Ctrl-C keeps what is done."""
    from training.datasets.log import open_data
    from training.tune import Tuning

    settings = (*given["settings"], *([f"device={given['device']}"] if given["device"] else []))
    opened, fixed = open_data(data), dict(pair(text) for text in settings)
    path = path or Path("data/tune") / f"{opened.schema.name}-{family}.log"
    tuning = Tuning(opened, family, settings_of(opened.schema.name, family, given["file"], settings), fixed, path)
    with progress_bar() as progress:
        stopped = tuning.search(minutes, most, progress)
    best = tuning.best()
    print(f"best of {best.ended} trials that ended ({best.pruned} were cut short): {best.valid:.5f} on valid; all are in {path}")
    print(best.command(data, family))
    if target := given["target"]:
        best.write(target, family)
        print(f"written to {target}")
    if stopped:
        raise click.Abort
