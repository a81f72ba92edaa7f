"""What subcommands share: types of options, settings given as texts, what is printed."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

import click

P = ParamSpec("P")
OURS = ("adrank_bench", "adrank_cli", "adrank_demo", "features", "service", "training")
OF_LIBRARY = {"confluent_kafka": "kafka", "ray": "ray", "tensorboard": "tensorboard", "mlflow": "mlflow"}
"""Extras of single options: what the rest of their subcommands needs has another."""
SHARE = click.FloatRange(0, 1, min_open=True)
FOLDER = click.Path(file_okay=False, path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)
PLACE = click.Path(readable=False, path_type=Path)
"""What is for who reads it to judge: a service may wait for it, and a bundle says what is in its place."""


class Refusal(click.ClickException):
    """Something a person can mend: one sentence, exit code 2."""

    exit_code = 2


def needs(extra: str) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Say which extra to install where a subcommand's libraries are missing: the base installation has what serving takes."""

    def with_sentence(command: Callable[P, None]) -> Callable[P, None]:
        @wraps(command)
        def run(*words: P.args, **options: P.kwargs) -> None:
            try:
                command(*words, **options)
            except ModuleNotFoundError as missing:
                library = str(missing.name).partition(".")[0]
                if library in OURS:
                    raise
                named = OF_LIBRARY.get(library, extra)
                what = f"adrank {click.get_current_context().command_path.partition(' ')[2]} needs {library}, which is not installed"
                raise Refusal(f"{what}: pip install 'adrank[{named}]', which has all that it needs") from missing

        return run

    return with_sentence


def moment(_context: click.Context, option: click.Parameter, text: str | None) -> int | None:
    """A time in seconds since 1970: given so, or as a date with perhaps a time of day, UTC."""
    try:
        if text is None or text.isdecimal():
            return None if text is None else int(text)
        at = datetime.fromisoformat(text)
        return int((at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp())
    except ValueError:
        raise click.BadParameter(f"{text}: expected a time such as 2026-11-22, 2026-11-22T17:00 or 1795366800", param=option) from None


def attributing(command: Callable[..., None]) -> Callable[..., None]:
    """Options of what belongs to an impression: `adrank join` keeps them in the log, and whoever reads it may say otherwise."""
    days, most = 86_400, 90 * 86_400
    shown = "What an impression is: what callers say (top_k, shown) or report, what they report, or all that was answered [default: told]."
    for option in (
        click.option("--shown", type=click.Choice(["told", "reported", "served"]), help=shown),
        click.option("--lateness", type=click.FloatRange(0, days), help="Seconds to wait for events beyond it [default: 60]."),
        click.option("--conversion-window", type=click.FloatRange(0, most), help="Seconds a conversion may take [default: 7 days]."),
        click.option("--impression-window", type=click.FloatRange(0, most), help="Seconds an impression may take [default: as a click]."),
        click.option(
            "--window", "--click-window", "click_window", type=click.FloatRange(0, most), help="Seconds a click may take [default: 1800]."
        ),
    ):
        command = option(command)
    return command


on_device = click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), help="Where to train. Default: auto, which is CUDA where there is one."
)


def bounded(command: Callable[..., None]) -> Callable[..., None]:
    """Options of how much memory is used, and of where on disk that is which does not fit."""
    memory = "What may be used; rows that would take an eighth of it go to disk [default: three quarters of the machine's or cgroup's]."
    for option in (
        click.option("--cache", type=FOLDER, metavar="DIR", help="Where on disk. Default: .encoded in the folder of the data."),
        click.option("--memory", type=click.FloatRange(0, min_open=True), metavar="GB", help=memory),
    ):
        command = option(command)
    return command


def memory_of(flags: dict[str, Any]) -> Any:
    """The `Memory` that the options say, which leave the flags."""
    from training.datasets.memory import Memory

    return Memory(flags.pop("memory"), flags.pop("cache"))


def by_workers(command: Callable[..., None]) -> Callable[..., None]:
    """Options of a training by several processes; the cluster's address goes where Ray looks for it."""
    for option in (
        click.option(
            "--ray",
            metavar="ADDRESS",
            expose_value=False,
            callback=lambda _context, _option, address: address and os.environ.update(RAY_ADDRESS=address),
            help="The Ray cluster of the workers, such as head:6379 or auto. Default: RAY_ADDRESS, or one started on this machine.",
        ),
        click.option("--shard-rows", type=click.IntRange(min=0), help="Split tables of more rows over the workers; docs/scale.md."),
        click.option("--workers", type=click.IntRange(min=1), help="Processes that share every batch, by Ray; docs/scale.md."),
    ):
        command = option(command)
    return command


def attribution_of(log: Path, flags: dict[str, Any]) -> Any:
    """The `Attribution` that the options say, and for what they do not the log; None where they say nothing. They leave the flags."""
    from training.datasets.log import is_log
    from training.join.attribution import settings_of

    given = {name: flags.pop(name) for name in ("click_window", "impression_window", "conversion_window", "lateness", "shown")}
    if all(value is None for value in given.values()):
        return None
    if not is_log(log):
        raise Refusal(f"{log} is not a log, so it has no windows: leave out --click-window and its like")
    return settings_of(log, **given)


def kafka_settings(usual: dict[str, str]) -> dict[str, str]:
    """What `RDKAFKA_*` says: RDKAFKA_SASL_PASSWORD is librdkafka's `sasl.password`, and so on for all its settings."""
    prefix = "RDKAFKA_"
    given = {name.removeprefix(prefix).lower().replace("_", "."): text for name, text in os.environ.items() if name.startswith(prefix)}
    if "bootstrap.servers" not in given:
        raise Refusal("RDKAFKA_BOOTSTRAP_SERVERS is not set: it names Kafka's brokers, such as kafka:9092 (docs/kafka.md)")
    return {**usual, **given}


def to_kafka(topic: str) -> Any:
    """Who sends rankings to a topic."""
    from training.join.to_kafka import KafkaTopic

    with sentences_of_kafka():
        return KafkaTopic(kafka_settings({}), topic).send


@contextlib.contextmanager
def sentences_of_kafka() -> Iterator[None]:
    """Say what Kafka's library refuses, such as a setting that it does not have."""
    from confluent_kafka import KafkaException

    try:
        yield
    except KafkaException as error:
        raise Refusal(f"Kafka: {error.args[0].str()} (settings are RDKAFKA_* variables, see docs/kafka.md)") from error


class WithNetworks(click.Command):
    """A command whose help lists the networks."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options, and then the networks, a line each."""
        super().format_options(ctx, formatter)
        with contextlib.suppress(ModuleNotFoundError):  # the base installation trains none
            from training.networks import NETWORKS

            with formatter.section("Networks"):
                formatter.write_dl([(name, str(network.__doc__).partition("\n")[0]) for name, network in NETWORKS.items()])


def networks(_context: click.Context, _option: click.Parameter, begun: str) -> list[str]:
    """The names of networks that begin so, for whoever completes `--model` in a shell, which cannot wait for torch."""
    from training.families import CLASSES

    return [name for name in CLASSES if name.startswith(begun)]


def settings_of(data_set: str, family: str, file: Path | None, given: Sequence[str]) -> dict[str, str]:
    """The settings of a training as texts: those of the command, before those of a file, or else those known for the data set."""
    from training.networks import NETWORKS
    from training.tuned import known, settings_in

    found = file or known(data_set)
    kept = settings_in(found, family) if found and family in NETWORKS else {}
    if kept and not file:
        warn(f"settings known for {data_set}: " + ", ".join(f"{key}={value}" for key, value in kept.items()))
    return {**kept, **dict(pair(text) for text in given)}


def pair(text: str) -> tuple[str, str]:
    """A setting that was given as KEY=VALUE."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise Refusal(f"--set {text}: expected KEY=VALUE")
    return key, value


in_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")


def tell(document: Any, tables: Callable[[], None], as_json: bool) -> None:
    """Print what a command found: as one JSON document, or as the tables and lines for people that `tables` prints."""
    if as_json:
        print(json.dumps(document))
    else:
        tables()


def is_quiet() -> bool:
    """Whether `adrank --quiet` was said: no progress and no warnings, errors alone are on standard error."""
    return bool(click.get_current_context().find_root().params.get("quiet"))


def warn(text: str) -> None:
    """Say on standard error what the command does all the same."""
    if not is_quiet():
        click.echo(text, err=True)


def progress_bar() -> Any:
    """The progress bar of long work, on standard error."""
    from training.progress import progress_bar

    return progress_bar(is_quiet())


def working(what: str) -> Any:
    """Show that work goes on whose end nobody knows."""
    progress = progress_bar()
    progress.add_task(what, total=None)
    return progress


def print_metrics(metrics: dict[str, Any]) -> None:
    """Print the `Measures` of splits as a table."""
    from rich.table import Table

    table = Table("split", "rows", "AUC", "GAUC", "log loss", "normalised entropy", "calibration error", "p(click) / clicks")
    for split, m in metrics.items():
        rates = (m.auc, m.gauc, m.log_loss, m.normalised_entropy, m.calibration_error, m.calibration_ratio)
        table.add_row(split, f"{m.rows:,}", *(f"{value:.5f}" for value in rates))
    console().print(table)


def console() -> Any:
    """Where tables are printed: as wide as they are, since a terminal wraps lines, and rich would cut values off."""
    from rich.console import Console

    return Console(width=max(Console().width, 200), soft_wrap=True)
