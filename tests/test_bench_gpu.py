"""Up to the device: no GPU is needed, and no time is asserted."""

import numpy as np
import pytest
from bench_models import built_once
from click.testing import CliRunner
from rich.progress import Progress

from benchmarks.benchmark_models import make
from benchmarks.gpu import Device, floor, in_torch, main, measure, rowwise, tiles, training_speed
from benchmarks.scoring import requests
from service.ranking.scorer import PROVIDERS


@pytest.fixture(scope="module", params=["din-100", "deepfm-20"])
def built(request, tmp_path_factory):
    return built_once(request.param, tmp_path_factory)


def test_all_give_the_same_scores(built):
    feeds = requests(built, 70, max(built.benchmark_model.population.schema.history_length, 1), 3)
    expected = in_torch(make(built.benchmark_model), "cpu", compiled=False)(feeds)
    for score in (tiles(built, "cpu"), rowwise(built, "cpu")):
        np.testing.assert_allclose(np.stack(score(feeds)), np.stack(expected), atol=1e-5)


def test_the_floor_is_the_slower_of_arithmetic_and_memory(built):
    served, feeds = make(built.benchmark_model), requests(built, 50, 8, 1)[0]
    slow, fast = 1.0, 1e30
    assert floor(served, feeds, Device("", fast, 1e9)) == pytest.approx(floor(served, feeds, Device("", fast, 2e9)) * 2)
    read = floor(served, feeds, Device("", slow, fast))
    assert read == sum(array.size for array in feeds.values()) * 4 * 4 + sum(array.nbytes for array in feeds.values())


def test_every_contender_is_measured_at_every_size(built, monkeypatch):
    monkeypatch.setattr(
        "benchmarks.gpu.contenders", lambda built, device: {"tiles": tiles(built, device), "row-wise": rowwise(built, device)}
    )
    timings = measure(built, "cpu", Device("cpu", 1e9, 1e9), {"requests": [1, 2], "candidates": [3]}, 2, Progress(disable=True))
    assert [(t.contender, t.requests, t.candidates) for t in timings] == [(n, r, 3) for r in (1, 2) for n in ("tiles", "row-wise")]
    assert max(t.difference for t in timings) < 1e-5


def test_a_training_has_a_rate_for_each_way(monkeypatch):
    monkeypatch.setattr("benchmarks.training.ROWS", 8192)
    monkeypatch.setattr("benchmarks.gpu.TRAINED", {"din": 3})
    rates = training_speed("cpu", 2)["din"]
    assert list(rates) == ["cpu", "cpu, amp"]  # on a GPU the device is a third
    assert all(rate > 0 for rate in rates.values())


def test_without_a_gpu_a_sentence_says_so(monkeypatch):
    monkeypatch.setitem(PROVIDERS, "cuda", "NoExecutionProvider")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    done = CliRunner().invoke(main, [])
    assert (done.exit_code, done.output) == (
        0,
        "nothing is measured: this onnxruntime lacks NoExecutionProvider; the README says how to install adrank[gpu]\n",
    )
