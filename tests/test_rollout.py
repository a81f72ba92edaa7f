"""A rollout under load loses nothing, and does where the wait, the farewell or the drain is taken away."""

import asyncio
import os
import sys
import time
from pathlib import Path

import pytest
from conftest import Server
from processes import fill
from redis_servers import eventually
from rolling import LAG_SECONDS, cluster, far, load

from adrank_bench.load import Target
from adrank_bench.measured import Measured

PRE_STOP_SECONDS = LAG_SECONDS + 0.5
FAREWELL_SECONDS = 2.0

long = pytest.mark.skipif(not os.environ.get("REQUIRE_TOOLS"), reason="shows what is lost without each precaution: make rollout-test")


def roll(
    server: Server, folder: Path, pre_stop: float = PRE_STOP_SECONDS, kill: bool = False, farewell: float = FAREWELL_SECONDS, **more: int
):
    """A rollout; what its clients found, and how many answers each had from each pod.

    They are those of an ingress, those of a Service, and those of a Service that are far away and pause between two requests on one
    connection, for a second.
    """
    asyncio.run(fill(server.url))
    settings = {"farewell_seconds": farewell, "max_inflight": 400, **more}  # none is shed while a busy machine pauses
    with cluster(folder, server.url, pre_stop=pre_stop, kill=kill, settings=settings) as pods, far(pods.proxy.tcp) as away:
        ingress, service, distant = (Target("127.0.0.1", port) for port in (pods.proxy.http, pods.proxy.tcp, away))
        with load(ingress, 60, 8) as one, load(service, 60, 16) as two, load(distant, 100, 100) as three:
            time.sleep(0.5)
            pods.roll()
            everyone = {pod.name for pod in pods.started}
            eventually(lambda: all(set(clients.by) == everyone for clients, _ in (one, two, three)))
        return [Found(dict(clients.by), *measured) for clients, measured in (one, two, three)]


class Found:
    def __init__(self, by: dict[str, int], measured: Measured) -> None:
        self.by, self.answered, self.errors = by, measured.statuses["200"], measured.errors
        self.how = f"{by}: {dict(measured.statuses)}, {measured.broken} cut off, {measured.unanswered} unanswered"
        sys.stdout.write(f"{self.how}\n")


def test_a_rollout_loses_nothing(server: Server, tmp_path: Path) -> None:
    for found in roll(server, tmp_path):
        assert found.errors == 0, found.how
        assert set(found.by) == {"pod-1", "pod-2", "pod-3", "pod-4"}
        assert sum(found.by.values()) == found.answered


@long
def test_a_rollout_of_rankers_with_two_workers_loses_nothing(server: Server, tmp_path: Path) -> None:
    for found in roll(server, tmp_path, workers=2):
        assert found.errors == 0, found.how
        assert set(found.by) == {"pod-1", "pod-2", "pod-3", "pod-4"}


@long
def test_without_the_wait_before_the_end_requests_are_lost(server: Server, tmp_path: Path) -> None:
    assert sum(found.errors for found in roll(server, tmp_path, pre_stop=0)) > 0


@long
def test_without_the_drain_requests_are_lost(server: Server, tmp_path: Path) -> None:
    assert sum(found.errors for found in roll(server, tmp_path, kill=True)) > 0


@long
def test_without_the_farewell_clients_that_pause_lose_requests(server: Server, tmp_path: Path) -> None:
    assert sum(found.errors for found in roll(server, tmp_path, farewell=0)) > 0
