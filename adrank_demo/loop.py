"""`adrank demo --loop`: users who change, a service that learns from what it showed them, and what that is worth.

Each visit is one of four kinds: ranked by the model that is retrained, by it while exploring, by the first model, which is never
retrained, or by an oracle that knows the truth. The world knows what each ad that was shown was worth.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from features.bundle import current_path, publish, read_manifest
from service.settings import Settings
from training.simulation import DAYS, SLOTS, World, make_world

from .demo import NETWORKS, START_SECONDS, DemoError, stage
from .visits import post, tell

ROUND_SECONDS = 60.0
DAYS_A_ROUND = 2
VISITS_A_SECOND = 60.0
THREADS = 4
CANDIDATES, SHOWN = 30, 5
ARMS = {"retrained": 0.5, "exploring": 0.15, "frozen": 0.2, "oracle": 0.15}
"""The share of the visits of each kind."""
EXPLORE = {"policy": "plackett_luce", "temperature": 0.5}
WINDOW_SECONDS, LATENESS_SECONDS = 4.0, 2.0
"""A user of this world clicks at once, so an impression need not be waited for long."""
LEARN_FROM_ROUNDS = 5
TRAINING = {"epochs": "3", "batch": "512", "learning_rate": "0.001", "embedding_l2": "0.00001", "threads": "1"}
CLICK_RATE_FACTOR = 5
"""The world's log shows ads at random, the service shows the best: more than the usual 3 times as many clicks are no poison here."""
NEW_MODEL, REFUSED = 0, 3


@dataclass
class ClickTally:
    """What was shown was worth: how many ads, how many were clicked, and how many clicks the truth expects of them."""

    shown: int = 0
    clicks: int = 0
    expected: float = 0.0

    def add(self, p_click: "np.ndarray[Any, Any]", clicks: int) -> None:
        """Count one ranking's ads with their true probabilities."""
        self.shown, self.clicks, self.expected = self.shown + len(p_click), self.clicks + clicks, self.expected + float(p_click.sum())

    @property
    def ctr(self) -> float:
        """Expected clicks an ad shown: the true click-through rate, without the noise of the coin."""
        return self.expected / self.shown if self.shown else float("nan")


@dataclass
class Crowd:
    """The users: threads that visit at a constant rate, click as the truth says, and tell the service."""

    world: World
    address: tuple[str, int]
    day: int = DAYS
    worth: dict[str, ClickTally] = field(default_factory=lambda: defaultdict(ClickTally))
    failed: int = 0
    versions: set[str] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _ending: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def visiting(self) -> Iterator[None]:
        """Visit until the block ends."""
        threads = [threading.Thread(target=self._visit_on, args=(number,), daemon=True) for number in range(THREADS)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._ending.set()
            for thread in threads:
                thread.join(10)

    def take(self) -> tuple[Mapping[str, ClickTally], list[str]]:
        """What was shown since it was last asked, and the versions that ranked for the retrained arm."""
        with self._lock:
            worth, self.worth = self.worth, defaultdict(ClickTally)
            versions, self.versions = sorted(self.versions), set()
        return worth, versions

    def _visit_on(self, number: int) -> None:
        random, connection = np.random.default_rng(number), HTTPConnection(*self.address, timeout=10)
        due = time.monotonic()
        while not self._ending.is_set():
            try:
                self._visit(random, connection)
            except (OSError, HTTPException, ValueError, KeyError):
                with self._lock:
                    self.failed += 1
                connection.close()
            due = max(due + THREADS / VISITS_A_SECOND, time.monotonic() - 1)
            self._ending.wait(max(0.0, due - time.monotonic()))
        connection.close()

    def _visit(self, random: np.random.Generator, connection: HTTPConnection) -> None:
        world, day = self.world, self.day
        arm = str(random.choice(list(ARMS), p=list(ARMS.values())))
        user, slot = int(random.integers(len(world.age))), int(random.integers(len(SLOTS)))
        ads = random.choice(world.live(day), CANDIDATES, replace=False)
        request_id = uuid.uuid4().hex
        if arm == "oracle":
            shown = ads[np.argsort(-world.p_click(day, user, ads, slot, 0))[:SHOWN]]
        else:
            shown = self._ranked(connection, arm, _request(arm, request_id, user, slot, ads))
        truth = world.p_click(day, user, shown, slot, np.arange(len(shown)))
        clicked = shown[random.random(len(shown)) < truth]
        with self._lock:
            self.worth[arm].add(truth, len(clicked))
        if len(clicked):
            ranking = {} if arm == "oracle" else {"request_id": request_id}
            tell(connection, [{"type": "click", "user_id": f"u{user}", "ad_id": f"a{ad}", **ranking} for ad in clicked])

    def _ranked(self, connection: HTTPConnection, arm: str, request: Mapping[str, Any]) -> "np.ndarray[Any, Any]":
        answer = post(connection, "/rank", request)
        if arm == "retrained":
            with self._lock:
                self.versions.add(answer["model"]["version"])
        return np.array([int(ad["ad_id"][1:]) for ad in answer["ads"]])


def _request(arm: str, request_id: str, user: int, slot: int, ads: "np.ndarray[Any, Any]") -> dict[str, Any]:
    options: dict[str, Any] = {"model": "frozen" if arm == "frozen" else "din", "top_k": SHOWN}
    if arm == "exploring":
        options["explore"] = EXPLORE
    context = {"slot": SLOTS[slot], "position": "1"}
    candidates = [f"a{ad}" for ad in ads]
    return {"request_id": request_id, "user": {"id": f"u{user}"}, "context": context, "candidates": candidates, "options": options}


def run(folder: Path, port: int, rounds: int, as_json: bool = False, quiet: bool = False) -> None:
    """Let the loop run for so many rounds of a minute, and print after each what the ads shown in it were worth; `as_json` all at the end.

    Raises:
        DemoError: the port or the folder is taken, a process did not start, or a request failed.
    """
    console, world = Console(quiet=as_json), make_world(later=(rounds + 1) * DAYS_A_ROUND)
    with ExitStack() as stack:
        settings, url = stack.enter_context(stage(folder, port, world, {"din": NETWORKS["din"]}, freeze, quiet))
        stack.enter_context(_joiner(settings, folder))
        crowd = Crowd(world, (settings.host, port))
        console.print(f"\nThe service is up at {url}; a round takes {ROUND_SECONDS:g} s. Expected clicks an ad shown, by who ranked:")
        with crowd.visiting():
            history = [_round(number, crowd, settings, folder, console) for number in range(1, rounds + 1)]
    _conclude(history, crowd, folder, console)


def freeze(models: Path) -> None:
    """Publish the live version of `din` once more as `frozen`, which is never retrained."""
    path = current_path(models, "din")
    manifest = read_manifest(path)
    facts = {key: value for key, value in manifest.items() if key not in ("name", "version", "fingerprint", "files")}
    publish(models, "frozen", {file: (path / file).read_bytes() for file in manifest["files"]}, facts)


@contextmanager
def _joiner(settings: Settings, folder: Path) -> Iterator[None]:
    command = ["join", "--log", str(folder / "log"), "--models", str(settings.models), "--name", "din"]
    command += ["--window", str(WINDOW_SECONDS), "--lateness", str(LATENESS_SECONDS)]
    with (folder / "join.log").open("wb") as output:
        process = subprocess.Popen(_adrank(*command), env=_environment(settings), stdout=output, stderr=output)
    deadline = time.monotonic() + START_SECONDS
    try:
        while process.poll() is None and not (folder / "log" / "schema.toml").exists():
            if time.monotonic() > deadline:
                raise DemoError(f"the joiner did not start within {START_SECONDS} s; {folder / 'join.log'} may say why")
            time.sleep(0.05)
        yield
        if process.poll() is not None:
            raise DemoError(f"the joiner ended; {folder / 'join.log'} says why")
    finally:
        process.terminate()
        process.wait(30)


def _adrank(*words: str) -> list[str]:
    return [sys.executable, "-m", "adrank", *words]


def _environment(settings: Settings) -> dict[str, str]:
    return {**os.environ, **settings.environment()}


def _round(number: int, crowd: Crowd, settings: Settings, folder: Path, console: Console) -> dict[str, Any]:
    """One round: days pass, ads come and go, a model is trained on what was served before, and what was shown is counted."""
    until = time.monotonic() + ROUND_SECONDS
    training = _retrain(settings, folder) if number > 1 else None
    for step in range(DAYS_A_ROUND):
        _turn_over(crowd, DAYS + (number - 1) * DAYS_A_ROUND + step)
        time.sleep(max(0.0, until - ROUND_SECONDS * (DAYS_A_ROUND - 1 - step) / DAYS_A_ROUND - time.monotonic()))
    verdict = "" if training is None else _verdict(training, folder)
    worth, versions = crowd.take()
    result = {"round": number, "retrain": verdict, "versions": versions, **{arm: worth[arm].ctr for arm in ARMS}}
    result |= {"shown": {arm: worth[arm].shown for arm in ARMS}, "clicks": {arm: worth[arm].clicks for arm in ARMS}}
    console.print(_line(result))
    return result


def _turn_over(crowd: Crowd, day: int) -> None:
    """A day begins: ads leave and others come, as `ad` events."""
    world, before, now = crowd.world, crowd.world.live(day - 1), crowd.world.live(day)
    gone = [{"type": "ad", "ad_id": f"a{ad}", "active": False} for ad in np.setdiff1d(before, now)]
    new = [{"type": "ad", "ad_id": f"a{ad}", "features": world.ad(int(ad)), "active": True} for ad in np.setdiff1d(now, before)]
    connection = HTTPConnection(*crowd.address, timeout=10)
    try:
        tell(connection, new + gone)
    except (OSError, HTTPException) as error:
        raise DemoError(f"the service did not take the ads of a new day: {error}") from error
    finally:
        connection.close()
    crowd.day = day


def _retrain(settings: Settings, folder: Path) -> "subprocess.Popen[bytes]":
    since = int(time.time() - LEARN_FROM_ROUNDS * ROUND_SECONDS)
    command = ["retrain", "--log", str(folder / "log"), "--models", str(settings.models), "--name", "din", "--since", str(since)]
    command += ["--position-as", "context.position", "--gate", "better", "--set", f"click_rate_factor={CLICK_RATE_FACTOR}"]
    command += [word for pair in TRAINING.items() for word in ("--set", "=".join(pair))]
    with (folder / "retrain.log").open("ab") as output:
        return subprocess.Popen(["nice", "-n", "10", *_adrank(*command)], env=_environment(settings), stdout=output, stderr=output)


def _verdict(training: "subprocess.Popen[bytes]", folder: Path) -> str:
    try:
        code = training.wait(ROUND_SECONDS)
    except subprocess.TimeoutExpired:
        training.send_signal(signal.SIGTERM)
        training.wait(10)
        return "too slow"
    if code not in (NEW_MODEL, REFUSED):
        raise DemoError(f"adrank retrain ended with exit code {code}; {folder / 'retrain.log'} says why")
    return "published" if code == NEW_MODEL else "refused"


def _line(result: Mapping[str, Any]) -> str:
    rates = "  ".join(f"{arm} {result[arm]:.4f}" for arm in ("frozen", "retrained", "oracle"))
    return f"round {result['round']:2}: {rates}   retrain: {result['retrain'] or '-':9}  version {result['versions'][-1]}"


def _conclude(history: Sequence[Mapping[str, Any]], crowd: Crowd, folder: Path, console: Console) -> None:
    table = Table("round", *ARMS, "frozen loses", "model")
    for result in history:
        loss = 1 - result["frozen"] / result["retrained"]
        table.add_row(str(result["round"]), *(f"{result[arm]:.4f}" for arm in ARMS), f"{loss:+.1%}", result["versions"][-1])
    console.print(table)
    told = json.dumps({"rounds": list(history), "failed_requests": crowd.failed}, indent=1)
    (folder / "loop.json").write_text(told)
    if console.quiet:
        print(told)
    reports = folder / "models/din/reports"
    console.print(
        f"{crowd.failed} requests failed. {folder / 'loop.json'} has the figures; {reports} says of each model why it was taken or not."
    )
