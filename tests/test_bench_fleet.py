"""The simulated fleet: waiting as queueing theory has it, and what a lost zone costs."""

import numpy as np
import pytest

from benchmarks.fleet import MOST, Costs, simulate


def test_a_steady_fleet_waits_as_erlang_says() -> None:
    """An M/M/2 queue at half load waits a third of a service time (Erlang C = 1/3); a coefficient of variation of 1 stands in for it."""
    fleet = simulate("steady", Costs(0.01, 1.0, 5.0), 3, 0.5, 300.0)
    assert np.mean(fleet.times) == pytest.approx(0.01 * (1 + 1 / 3), rel=0.04)
    assert (fleet.shed, fleet.lost, len(fleet.pods)) == (0, 0, 3)


def test_a_lost_zone_loses_what_its_pods_had_and_is_made_up_for() -> None:
    fleet = simulate("zone", Costs(0.01, 0.3, 1.0), 6, 0.5, 90.0)
    assert 0 < fleet.lost <= 2 * MOST
    assert {pod.zone for pod in fleet.pods} >= {1, 2}
    assert len(fleet.pods) >= 6


def test_twice_the_load_is_refused_by_half_and_never_waits_longer_than_the_queue() -> None:
    fleet = simulate("steady", Costs(0.01, 0.3, 1_000.0), 3, 1.9, 60.0)  # no new pod comes in time
    share = fleet.shed / (fleet.shed + len(fleet.times))
    assert share == pytest.approx(1 - 1 / 1.9, abs=0.03)
    assert max(fleet.times) < 0.01 * MOST / 2 * 1.5
