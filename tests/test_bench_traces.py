"""What tracing costs, from turns that are given."""

import pytest

from benchmarks.traces import OFF, SAME, TRACED, Turn, costs


def test_costs_are_medians_of_each_rounds_ratio() -> None:
    off = [Turn(1_000, 1e-3, 0.01, 100, 0), Turn(500, 2e-3, 0.02, 50, 0), Turn(2_000, 1e-3, 0.01, 200, 0)]
    traced = [Turn(900, 1.1e-3, 0.02, 90, 1), Turn(495, 2.02e-3, 0.02, 50, 0), Turn(1_900, 1.02e-3, 0.01, 190, 0)]
    first, same, last = costs({OFF: off, SAME: off, TRACED: traced}, 33)
    assert (first.throughput, first.cpu, same.throughput, same.traces_per_request) == (1, 1, 1, 0)
    assert (last.throughput, last.cpu, last.p99, last.errors) == (0.95, 1.02, 1, 1)
    assert last.throughput_low < 0.95 < last.throughput_high
    assert last.traces_per_request == 0.1
    assert (last.requests_per_s, last.cpu_us) == (900, pytest.approx(1_100))
