"""From what was served to the next version: `join`, `bridge`, `attribute`, `skew`, `replay`, `retrain`."""

import asyncio
import contextlib
import math
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import click

from .options import (
    FOLDER,
    PLACE,
    Refusal,
    attributing,
    attribution_of,
    bounded,
    console,
    in_json,
    kafka_settings,
    memory_of,
    moment,
    needs,
    networks,
    on_device,
    pair,
    progress_bar,
    sentences_of_kafka,
    tell,
    to_kafka,
    working,
)


@click.command(epilog="Example: adrank join --redis redis://127.0.0.1:6379/0 --log data/log --models models --metrics-port 9109")
@click.option("--redis", help="The service's store; default: ADRANK_REDIS, then redis://127.0.0.1:6379/0.")
@click.option("--log", "folder", type=FOLDER, required=True, help="The log, made where there is none; docs/log.md says what it holds.")
@click.option("--models", type=FOLDER, default="models", show_default=True, help="The model repository.")
@click.option("--name", help="The model whose schema a new log takes; default: ADRANK_MODEL, then the only live one.")
@attributing
@click.option("--rows-per-file", type=click.IntRange(1, 10_000_000), default=100_000, show_default=True, help="Entries of a file.")
@click.option(
    "--bytes-per-file",
    type=click.IntRange(2**16, 2**30),
    default=32 * 2**20,
    show_default=True,
    help="Of the entries of a file: what is in memory at once.",
)
@click.option("--to-kafka", "topic", metavar="TOPIC", help="Rankings go to this topic of Kafka too (docs/kafka.md). The extra `kafka`.")
@click.option("--take-over", is_flag=True, help="Join even if another log's joiner is at work on the same streams.")
@click.option("--metrics-port", type=click.IntRange(0, 65_535), default=0, show_default=True, help="Where scrapes are answered; 0 is none.")
@click.option("--metrics-host", default="127.0.0.1", show_default=True, help="Address that the metrics are answered on.")
@click.option("--once", is_flag=True, help="Write what there is, and exit.")
@click.option("--drain", is_flag=True, help="As --once, with what others hold, and count all as closed, whether windows are over or not.")
@needs("train")
def join(redis: str | None, folder: Path, models: Path, name: str | None, topic: str | None, **rest: Any) -> None:
    """Write what was served and what came of it into the log. May be killed at any time; several share the work."""
    os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)  # of a service with several workers; it would turn these metrics into its files
    from service.settings import load_settings
    from service.store.streams import RedisStreams
    from service.telemetry import logs
    from service.telemetry.metrics import JoinMetrics
    from training.join.attribution import Attribution
    from training.join.log import open_log, wait_for_log
    from training.join.sink import SinkSettings, join_log

    metrics_host, metrics_port, take_over = rest.pop("metrics_host"), rest.pop("metrics_port"), rest.pop("take_over")
    settings, metrics = load_settings({"redis": redis}), JoinMetrics()
    logs.start(settings, private=True)
    url = settings.redis
    if url.startswith("memory:"):
        raise Refusal("a store in memory has no streams to join; name a Redis with --redis")
    drain, once = rest.pop("drain"), rest.pop("once")
    once_what = "everything" if drain else "due" if once else None
    try:
        stop = metrics.serve(metrics_port, metrics_host) if metrics_port else None
    except OSError as error:
        raise Refusal(f"--metrics-port {metrics_port} cannot be listened on at {metrics_host}: {error.strerror}") from error
    try:
        into = (open_log if once_what else wait_for_log)(folder, models, name or settings.model)
        sizes = {name: rest.pop(name) for name in ("rows_per_file", "bytes_per_file")}
        said = Attribution(**{key: value for key, value in rest.items() if value is not None})
        forward = to_kafka(topic) if topic else None
        print(asyncio.run(join_log(lambda: RedisStreams(url), into, SinkSettings(said, **sizes), metrics, once_what, take_over, forward)))
    finally:
        if stop:
            stop()


@click.command(epilog="Example: adrank bridge --topic clicks --dead-letters clicks-rejected, with RDKAFKA_BOOTSTRAP_SERVERS=kafka:9092")
@click.option("--topic", "topics", multiple=True, required=True, help="A topic of events as POST /v1/events takes them; may be said again.")
@click.option("--service", "url", default="http://127.0.0.1:8000", show_default=True, help="Where adrank serve answers.")
@click.option("--dead-letters", "dead", default="", metavar="TOPIC", help="Where events go that are never taken; else they are told of.")
@click.option("--metrics-port", type=click.IntRange(0, 65_535), default=0, show_default=True, help="Where scrapes are answered; 0 is none.")
@click.option("--metrics-host", default="127.0.0.1", show_default=True, help="Address that the metrics are answered on.")
@needs("kafka")
def bridge(topics: tuple[str, ...], url: str, dead: str, metrics_port: int, metrics_host: str) -> None:
    """Move events from topics of Kafka into a service (docs/kafka.md). May be killed at any time; several share the work."""
    os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)
    token = os.environ.pop("ADRANK_TOKEN", "")
    from service.feedback.bridge import Bridge, EventsService
    from service.settings import load_settings
    from service.telemetry import logs
    from service.telemetry.metrics import BridgeMetrics

    metrics, ending = BridgeMetrics(), threading.Event()
    logs.start(load_settings(), private=True)
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda *_: ending.set())
    try:
        stop = metrics.serve(metrics_port, metrics_host) if metrics_port else None
    except OSError as error:
        raise Refusal(f"--metrics-port {metrics_port} cannot be listened on at {metrics_host}: {error.strerror}") from error
    try:
        with sentences_of_kafka():
            moving = Bridge(kafka_settings({"group.id": "adrank"}), topics, EventsService(url, token), metrics, dead)
            moving.run(ending)
        print("moved: " + (", ".join(f"{count:,} {what}" for what, count in sorted(moving.counts.items())) or "nothing"))
    finally:
        if stop:
            stop()


@click.command(epilog="Example: adrank attribute --log data/log --out data/rows --click-window 3600")
@click.option("--log", "folder", type=FOLDER, required=True, help="The log that adrank join writes.")
@click.option("--out", type=FOLDER, required=True, help="The rows, a log that needs no attribution; must not exist yet.")
@click.option("--ray", "address", metavar="ADDRESS", help="Do it on this Ray cluster; local starts one on this machine. The extra `ray`.")
@attributing
@needs("train")
def attribute(folder: Path, out: Path, address: str | None, **options: Any) -> None:
    """Write a log's impressions with what came of them, once for all who train on them; on one machine, or on a cluster."""
    from training.datasets.log import is_log
    from training.join.attributed import here, write_attributed
    from training.join.attribution import settings_of

    if not is_log(folder):
        raise Refusal(f"{folder} is not a log; adrank join writes one")
    settings = attribution_of(folder, options) or settings_of(folder)
    if address:
        from training.join.on_ray import on_ray
    with progress_bar() as progress, on_ray(address) if address else contextlib.nullcontext(here) as run:
        task = progress.add_task("attributing", total=None)

        def shown(make: Any, parts: Any) -> Any:
            progress.update(task, total=len(parts))
            for left in run(make, parts):
                progress.advance(task)
                yield left

        found = write_attributed(folder, out, settings, shown)
    rows = f"{found.impressions:,} impressions, {found.clicks:,} clicks, {found.conversions:,} conversions"
    print(f"{out}: {rows}; {found.unmade.open:,} rankings are open, {found.unmade.repeated:,} repeated ids were dropped")


@click.command(epilog="Example: adrank skew --log log --models models --since 2026-11-22")
@click.option("--log", "folder", type=FOLDER, required=True, help="The log that adrank join writes.")
@click.option("--models", type=FOLDER, default="models", show_default=True, help="The model repository that served.")
@click.option("--name", help="Check the rows of this model alone.")
@click.option("--since", callback=moment, help="Rows from that time on, UTC: 2026-11-22, 2026-11-22T17:00, or seconds since 1970.")
@click.option("--until", callback=moment, help="Rows before that time.")
@click.option("--sample", type=click.IntRange(min=1), help="Compare the scores of about so many rows; default: of all.")
@click.option("--precision", type=click.Choice(["float32", "int8"]), default="float32", show_default=True, help="Of the graph that served.")
@in_json
@attributing
@needs("train")
def skew(folder: Path, models: Path, name: str | None, since: int | None, until: int | None, as_json: bool, **options: Any) -> None:
    """Encode and score logged rows again: exit code 0 if that comes to what was served, 3 if it does not."""
    from training.datasets.log import open_log
    from training.skew import find_skew, show

    settings = attribution_of(folder, options)
    with working("encoding and scoring again"):
        found = find_skew(open_log(folder, since, until, settings=settings), models, name, **options)
    tell(found.as_dict(), lambda: show(found, console()), as_json)
    sys.exit(3 if found.found else 0)


@click.command("replay", epilog="Example: adrank replay --log log --bundle models/din/20261122101500 --policy plackett_luce:0.5 --top-k 3")
@click.option("--log", "folder", type=FOLDER, required=True, help="The log that adrank join writes, or a data set with propensities.")
@click.option("--bundle", type=PLACE, required=True, help="A version in the model repository.")
@click.option("--policy", default="greedy", show_default=True, help="How it shows ads: greedy, epsilon_greedy:E, plackett_luce:T.")
@click.option("--objective", type=click.Choice(["pctr", "ecpm"]), default="pctr", show_default=True, help="What it orders ads by.")
@click.option("--top-k", type=click.IntRange(min=1), help="Only the first so many places; default: all that were shown.")
@click.option("--since", callback=moment, help="Rows of a log from that time on, as for skew.")
@click.option("--until", callback=moment, help="Rows of a log before that time.")
@click.option("--split", type=click.Choice(["train", "valid", "test"]), default="test", show_default=True, help="Of a prepared data set.")
@click.option("--clip", type=click.FloatRange(min=0, min_open=True), help="The largest weight; it makes estimates biased.")
@in_json
@attributing
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
    settings = attribution_of(folder, options)
    data = open_log(folder, since, until, settings=settings) if is_log(folder) else open_prepared(folder)
    with working("weighing what was shown"):
        found = replay(data, load_bundle(bundle), target, **options)
    tell(found.as_dict(), lambda: show(found, console()), as_json)


@click.command(epilog="Example: adrank retrain --log log --models models --name din --days 14 --gate not-worse")
@click.option("--log", type=FOLDER, required=True, help="The log that adrank join writes; or a prepared data set, taken as it is.")
@click.option("--models", type=FOLDER, default="models", show_default=True, help="The model repository.")
@click.option("--name", required=True, help="Name in the repository; its live version is the champion.")
@click.option(
    "--since", callback=moment, metavar="TIME", help="Begin of the window: 2026-11-22T17:00:00Z, or seconds since 1970. Default: the log's."
)
@click.option("--until", callback=moment, metavar="TIME", help="End of the window. Default: the log's.")
@click.option("--days", type=click.IntRange(1, 36_500), help="Length of the window, in place of --since.")
@click.option("--start", type=click.Choice(["warm", "scratch"]), default="warm", show_default=True, help="Weights to begin with.")
@click.option("--model", "network", shell_complete=networks, help="The network, where it is not the live version's.")
@click.option("--holdout", type=float, default=0.1, show_default=True, help="Share of the rows, the newest, to compare on.")
@click.option("--valid", type=float, default=0.1, show_default=True, help="Share before them, for early stopping and calibration.")
@click.option("--gate", type=click.Choice(["better", "not-worse"]), help="What log loss has to be; default better.")
@click.option("--report", type=FOLDER, help="Folder for the report; default MODELS/NAME/reports/TIME.")
@click.option("--position-as", metavar="CONTEXT.FIELD", help="The context field that takes the position where an ad was shown.")
@click.option("--seed", type=int, help="One seed makes a run repeatable to the last bit on one machine.")
@click.option("--epochs", type=click.IntRange(min=1), help="The most passes over the rows.")
@on_device
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any setting of training, of the checks or of the gate.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON instead of tables.")
@bounded
@attributing
@needs("train")
def retrain(settings: tuple[str, ...], as_json: bool, **flags: Any) -> None:
    """Train on a window of the log, and publish if the new version stands up to the live one; exit code 3 if not."""
    from training.retrain.pipeline import RetrainRequest
    from training.retrain.pipeline import retrain as run

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    given = dict(pair(text) for text in settings)
    flags["attribution"], flags["memory"] = attribution_of(flags["log"], flags), memory_of(flags)
    given |= {name: str(value) for name in ("seed", "epochs", "device", "gate") if (value := flags.pop(name)) is not None}
    with progress_bar() as progress:
        report = run(RetrainRequest(settings=given, **flags), progress)
    tell(report.as_dict(), lambda: console().print(report.tables(), markup=False, highlight=False), as_json)
    sys.exit(0 if report.published else 3)


@click.command("compare-arms", epilog="Example: adrank compare-arms --log log --experiment button --arms control,green")
@click.option("--log", "folder", type=FOLDER, required=True, help="The log that adrank join writes.")
@click.option("--experiment", required=True, help="The name that requests sent.")
@click.option("--arms", default="", metavar="ARM,ARM", help="Compare these with the first. Default: all, by name.")
@click.option("--shares", default="", metavar="SHARE,SHARE", help="Of the users that each arm was to have. Default: equal ones.")
@click.option(
    "--planned", type=click.IntRange(min=1), default=10_000, show_default=True, help="Users of both arms by when it is to be told."
)
@click.option("--since", callback=moment, help="Rows from that time on, as for skew.")
@click.option("--until", callback=moment, help="Rows before that time.")
@in_json
@attributing
@needs("train")
def compare_arms(folder: Path, experiment: str, since: int | None, until: int | None, as_json: bool, **options: Any) -> None:
    """Compare the arms of an experiment, with intervals that hold however often you look; exit code 3 where the arms' users do not fit."""
    from dataclasses import asdict

    from training.datasets.log import open_log
    from training.offpolicy import arms

    settings = attribution_of(folder, options)
    names = [each for each in options["arms"].split(",") if each]
    try:
        shares = [float(each) for each in options["shares"].split(",") if each]
    except ValueError:
        raise Refusal(f"--shares {options['shares']}: expected numbers apart by commas, such as 0.9,0.1") from None
    if len(names) == 1 or len(set(names)) < len(names):
        raise Refusal(f"--arms {options['arms']}: expected at least two arms, each once, such as control,green")
    by_user, crossed = arms.users_by_arm(open_log(folder, since, until, settings=settings), experiment, names)
    if shares and (len(shares) != len(by_user) or not all(0 < share < math.inf for share in shares)):
        raise Refusal(f"--shares {options['shares']}: expected a share above 0 for each of the arms {', '.join(by_user)}")
    found = arms.compare_arms(by_user, options["planned"], shares, crossed)
    tell({**asdict(found), "warnings": found.warnings}, lambda: arms.show(found, console()), as_json)
    sys.exit(3 if found.p_sample_ratio < arms.MISMATCH else 0)
