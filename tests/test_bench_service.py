"""The peer and the service, real processes on a real store: the same scores, so that a comparison means something."""

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from bench_models import NARROW, built_once
from conftest import Server

from adrank_bench.load import LoadError, ask
from adrank_bench.measured import LoadPlan
from benchmarks import growth, service
from benchmarks.bare import Bare
from benchmarks.population import fill
from benchmarks.scoring import requests as tensors
from benchmarks.service import ALONE, BARE, CONNECTIONS, OURS, PEER, Bench, Sample, benches
from benchmarks.subjects import serving
from tests.small import quiet


@pytest.fixture(scope="module", params=list(NARROW))
def bench(request: pytest.FixtureRequest, servers: Callable[[str], Server], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("bench")
    built, url = built_once(request.param, tmp_path_factory), servers("valkey").url
    database = url.replace("/0", f"/{list(NARROW).index(request.param) + 3}")
    with benches(built, database, 2, 0.3, folder) as bench:
        yield bench


def test_adrank_and_the_peer_rank_alike(bench: Bench) -> None:
    for candidates in (1, 50, 200):
        for body in bench.requests(candidates)[:5]:
            ours, theirs = (_ranked(bench, name, body) for name in (OURS, PEER))
            assert set(ours) == set(theirs) == set(json.loads(body)["candidates"])
            assert max(abs(ours[ad_id] - theirs[ad_id]) for ad_id in ours) < 1e-5
            values = np.array(list(theirs.values()))
            assert (np.diff(values) <= 0).all()
            assert np.abs(values - np.array(list(ours.values()))).max() < 1e-5  # the same order, but for ties


def _ranked(bench: Bench, name: str, body: bytes) -> dict[str, float]:
    target = bench.subjects[name].target
    for _ in range(100):  # the store may take longer than 50 ms now and then, where other tests keep the processors busy
        status, answer = ask(target, target.request(body))
        document = json.loads(answer)
        if not document.get("degraded"):
            break
    assert (status, document.get("degraded", [])) == (200, [])
    assert [ad["rank"] for ad in document["ads"]] == list(range(1, len(document["ads"]) + 1))
    return {ad["ad_id"]: ad["p_click"] for ad in document["ads"]}


def test_a_round_measures_every_subject(bench: Bench) -> None:
    requests = bench.requests(20)
    feeds = tensors(bench.built, 20, bench.built.benchmark_model.population.schema.history_length)
    samples = {name: bench.turn(name, requests, feeds) for name in (BARE, OURS, PEER, ALONE)}
    assert all(sample.requests_per_s > 0 and sample.cpu > 0 and sample.errors == 0 for sample in samples.values())
    assert samples[BARE].cpu < samples[OURS].cpu  # a service is the graph and more
    for subject in bench.subjects.values():
        assert subject.memory() > 2**20
        assert subject.connections() == []
        assert all(1 / len(subject.tree()) <= share <= 1 for share in service.spread(subject, 2))


def test_connections_are_counted_by_process(bench: Bench) -> None:
    subject = bench.subjects[ALONE]
    assert service.spread(subject, 2) == [1.0, 1.0]
    socket = subject.target.connect()
    assert sum(service._accepted(subject)) == 1
    socket.close()
    assert CONNECTIONS == 8


def test_tails_are_at_half_of_each_ones_own_peak(bench: Bench) -> None:
    peaks = service.throughput(bench, 10, 1, quiet())
    assert [peak.subject for peak in peaks] == [BARE, *(name for name in bench.subjects if name != ALONE)]
    tails = service.tails(bench, peaks, 0.3, quiet())
    assert [(tail.subject, tail.rate, tail.errors) for tail in tails] == [
        (peak.subject, pytest.approx(peak.requests_per_s / 2, abs=0.1), 0) for peak in peaks[1:]
    ]
    assert all(0 < tail.p50 <= tail.p99 <= tail.p999 for tail in tails)


def test_ratios_and_overhead_are_of_the_same_round() -> None:
    samples = {
        BARE: [Sample(100, 0.001), Sample(10, 0.010), Sample(50, 0.002)],
        OURS: [Sample(50, 0.002, 1), Sample(5, 0.012), Sample(30, 0.004, 2)],
        PEER: [Sample(25, 0.003), Sample(1, 0.100), Sample(10, 0.020)],
    }
    found = service._throughput("y", OURS, 50, samples)
    assert (found.requests_per_s, found.candidates_per_s) == (30, 1_500)
    assert (found.to_bare, found.to_peer) == (0.5, 3.0)
    assert (found.cpu_us, found.overhead_us, found.errors) == (4_000, 2_000, 3)


def test_bare_uses_all_its_processes(bench: Bench) -> None:
    feeds = tensors(bench.built, 5, 0)
    with Bare(bench.built.graph, 2) as two:
        pace = two.measure(feeds, 0.2)
    assert pace.requests_per_second > 0
    assert 0 < pace.cpu < 0.2


def test_a_server_that_does_not_start_is_a_sentence(tmp_path: Path) -> None:
    with (
        pytest.raises(LoadError, match=r"did not start; the last line of .*log is: no$"),
        serving("x", ["echo", "no"], 1_024, tmp_path / "log"),
    ):
        pass


def test_ctrl_c_ends_the_run(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("adrank_bench.load.LoadRun.loop", stop)
    with pytest.raises(KeyboardInterrupt):
        service.load(bench.subjects[OURS], [b"{}"], LoadPlan(None, 1, 0, 1))


def test_the_store_of_each_benchmark_model_is_its_own(servers: Callable[[str], Server], bench: Bench) -> None:
    population = bench.built.benchmark_model.population
    asyncio.run(fill(population, servers("valkey").url.replace("/0", "/9")))
    assert _ranked(bench, OURS, bench.requests(3)[0])


def test_growth_measures_a_service_of_its_own(servers: Callable[[str], Server], bench: Bench, tmp_path: Path) -> None:
    database = servers("valkey").url.replace("/0", "/9")
    asyncio.run(fill(bench.built.benchmark_model.population, database))
    start, costs = growth.grow(bench.built, database, (1, 20), 0.4, tmp_path, 1)
    assert (start.ads, start.workers) == (300, 1)
    assert start.ready_s > 0
    assert start.catalogue_s is not None
    assert start.resident_mib > 50
    assert start.together_mib > 50
    assert [(cost.candidates, cost.errors) for cost in costs] == [(1, 0), (20, 0)]
    assert all(0 < cost.p50_ms <= cost.p99_ms and cost.cpu_us >= 0 for cost in costs)
    assert (
        sum(cost.cpu_us for cost in costs) > 0
    )  # of one alone it may be less than the system counts in, 10 ms, where others keep processors busy
