"""What shows and measures: `demo`, `bench`, `benchmark models`."""

import signal
from pathlib import Path
from typing import Any, TextIO

import click

from .options import FILE, FOLDER, Refusal, WithNetworks, console, in_json, is_quiet, needs, networks, progress_bar, settings_of, tell


@click.command(epilog="Example: adrank demo --once")
@click.option("--once", is_flag=True, help="Print one ranking and stop.")
@click.option("--loop", is_flag=True, help="Let users visit, click and change; retrain and swap the model every minute.")
@click.option("--rounds", type=click.IntRange(2, 100), default=8, show_default=True, help="With --loop: how many minutes.")
@click.option("--visits", type=click.IntRange(1, 1_000_000), help="Let so many users visit a demo that runs, click, and tell it.")
@click.option("--port", type=int, default=8000, show_default=True, help="Port of the service.")
@click.option(
    "--dir", "folder", type=FOLDER, default="data/demo", show_default=True, help="Where the demo's data and models go, anew each time."
)
@in_json
@needs("demo")
def demo(once: bool, loop: bool, rounds: int, visits: int | None, port: int, folder: Path, as_json: bool) -> None:
    """Make a synthetic ad world, train DIN and DeepFM on its log, serve them, and rank for a user; --loop closes the loop."""
    from adrank_demo.demo import run
    from adrank_demo.loop import run as run_loop

    for ending in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C does: the store and the service end with the demo
        signal.signal(ending, signal.default_int_handler)
    if loop + once + bool(visits) > 1:
        raise Refusal("--once stops after one ranking, --loop goes on, --visits asks a demo that runs: choose one")
    if visits:
        _visit(port, visits, as_json)
    elif loop:
        run_loop(folder, port, rounds, as_json, is_quiet())
    else:
        run(folder, port, once, as_json, is_quiet())


def _visit(port: int, count: int, as_json: bool) -> None:
    from http.client import HTTPException

    from adrank_demo.visits import send_visits

    try:
        with progress_bar() as progress:
            shown, clicked = send_visits(port, count, progress)
    except (OSError, HTTPException) as error:
        raise Refusal(f"no demo answers on port {port} ({error}); start one with adrank demo, or name its port with --port") from error
    told = {"visits": count, "shown": shown, "clicked": clicked}
    tell(told, lambda: print(f"{count:,} visits: {shown:,} ads shown, {clicked:,} clicked"), as_json)


@click.command(epilog="Example: adrank bench --url http://127.0.0.1:8000 --redis redis://127.0.0.1:6379/0 --candidates 500 --rate half")
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
    measured = bench.run(load_settings({"redis": redis}), load, is_quiet())
    bench.write(bench.as_dict(load, measured), target)
    if str(target) != "-":
        bench.show(load, measured, console())
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


@click.group(epilog="Example: adrank benchmark models --data data/frappe --model lr --seeds 3")
def benchmark() -> None:
    """Measure what this machine makes of adrank's own parts."""


@benchmark.command(
    "models", cls=WithNetworks, epilog="Example: adrank benchmark models --data data/frappe --model lr --model deepfm --seeds 3"
)
@click.option("--data", type=FOLDER, required=True, help="A prepared data set.")
@click.option("--model", "families", multiple=True, shell_complete=networks, help="A network; several may be given. Default: all.")
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
    from training.tuned import names_of

    opened = open_prepared(data)
    path = target or Path("data/bench") / f"models-{opened.schema.name}.json"

    def said(family: str) -> dict[str, str]:
        found = settings_of(opened.schema.name, family, given["file"], given["settings"])
        return {key: value for key, value in found.items() if key in names_of(family)}

    with progress_bar() as progress:
        runs = models.measure(opened, families or tuple(NETWORKS), seeds, said, path, progress)
    models.show(runs, console())
    if picture:
        models.draw(runs, picture)
