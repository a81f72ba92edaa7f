"""A fleet of rankers that no machine here is large enough for, simulated: a morning, a lost zone, and a rollout.

Each pod has two workers and refuses what finds `MOST` requests there, as the service does; requests come at random and fall on pods at
random, as from a proxy without feedback; the autoscaler is Kubernetes' (ceil(pods * load / target), every 15 s, down after ten minutes).
A request's cost is measured; a fleet behaves as some of its pods do, so a few stand for all, and the load is told as a share of theirs.

    python -m benchmarks.fleet --request-ms 6.2 --start-s 7
"""

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

import click
import numpy as np
import simpy
from rich.console import Console
from rich.table import Table

from training.progress import progress_bar

WORKERS, MOST = 2, 64
"""Of a pod: its workers, and `max_inflight`."""
LOOK_SECONDS, DOWN_SECONDS, TOLERANCE = 15.0, 600.0, 0.1
"""Of the autoscaler; within the tolerance of its target it does nothing."""
WARM_UP = 20.0
"""Seconds that are not measured."""


@dataclass(frozen=True)
class Costs:
    """What is measured of one pod."""

    request: float
    """Seconds of a worker for a request."""
    spread: float
    """Its coefficient of variation; lognormal."""
    start: float
    """Seconds from a pod's being wanted to its first ranking."""


@dataclass(eq=False)
class Pod:
    """One pod: its workers, and how long they were busy since the autoscaler looked."""

    workers: simpy.Resource
    zone: int
    busy: float = 0.0
    gone: bool = False


@dataclass
class Fleet:
    """Pods in three zones, and what became of the requests."""

    env: simpy.Environment
    costs: Costs
    target: float
    random: np.random.Generator
    pods: list[Pod] = field(default_factory=list)
    coming: int = 0
    times: list[float] = field(default_factory=list)
    shed: int = 0
    lost: int = 0
    most: int = 0

    def add(self, zone: int) -> None:
        """A pod that ranks from now on."""
        self.pods.append(Pod(simpy.Resource(self.env, WORKERS), zone))
        self.most = max(self.most, len(self.pods))

    def start(self) -> Generator[simpy.Event, None, None]:
        """A pod that is wanted now, where there are fewest."""
        self.coming += 1
        yield self.env.timeout(self.costs.start)
        self.coming -= 1
        self.add(min(range(3), key=[pod.zone for pod in self.pods].count))

    def traffic(self, rate: Callable[[float], float], until: float) -> Generator[simpy.Event, None, None]:
        """Requests at a rate that changes with time, a Poisson process in pieces of a tenth of a second."""
        while self.env.now < until:
            for gap in np.diff(np.sort(self.random.random(self.random.poisson(rate(self.env.now) / 10))), prepend=0.0) / 10:
                yield self.env.timeout(gap)
                self.env.process(self.request())
            yield self.env.timeout((math.floor(self.env.now * 10 + 1e-6) + 1) / 10 - self.env.now)

    def request(self) -> Generator[simpy.Event, None, None]:
        """One request, on a pod at random; refused where too many wait, lost where its pod goes away."""
        pod, measured, came = self.pods[self.random.integers(len(self.pods))], bool(self.env.now > WARM_UP), self.env.now
        if pod.workers.count + len(pod.workers.queue) >= MOST:
            self.shed += measured
            return
        with pod.workers.request() as worker:
            yield worker
            sigma = math.sqrt(math.log1p(self.costs.spread**2))
            seconds = self.costs.request * self.random.lognormal(-(sigma**2) / 2, sigma)
            yield self.env.timeout(seconds)
            pod.busy += seconds
        if pod.gone:
            self.lost += measured
        elif measured:
            self.times.append(self.env.now - came)

    def scale(self) -> Generator[simpy.Event, None, None]:
        """The autoscaler."""
        wanted = [(self.env.now, len(self.pods))]
        while True:
            yield self.env.timeout(LOOK_SECONDS)
            load = sum(pod.busy for pod in self.pods) / (LOOK_SECONDS * WORKERS)
            for pod in self.pods:
                pod.busy = 0.0
            wanted = [(at, count) for at, count in wanted if at > self.env.now - DOWN_SECONDS]
            there, ratio = len(self.pods) + self.coming, load / len(self.pods) / self.target
            wanted.append((self.env.now, there if abs(ratio - 1) <= TOLERANCE else math.ceil(load / self.target)))
            most = max(count for _, count in wanted)
            for _ in range(wanted[-1][1] - there):
                self.env.process(self.start())
            for _ in range(there - max(most, 3)):
                self.pods.pop()  # it drains: what it has is answered

    def lose(self, zone: int, at: float) -> Generator[simpy.Event, None, None]:
        """A zone goes away, with what its pods had."""
        yield self.env.timeout(at)
        for pod in [pod for pod in self.pods if pod.zone == zone]:
            self.pods.remove(pod)
            pod.gone = True

    def roll(self, at: float) -> Generator[simpy.Event, None, None]:
        """Each pod is replaced by a new one, which ranks before the old one drains, one after the other."""
        yield self.env.timeout(at)
        for pod in list(self.pods):
            yield self.env.process(self.start())
            if pod in self.pods:
                self.pods.remove(pod)


def simulate(name: str, costs: Costs, pods: int, target: float, seconds: float, seed: int = 1) -> Fleet:
    """A scenario by its name: `steady`, `morning` (the load doubles, steadily, in the first two thirds), `zone`, `rollout`."""
    env = simpy.Environment()
    fleet = Fleet(env, costs, target, np.random.default_rng(seed))
    for number in range(math.ceil(pods / 2) if name == "morning" else pods):
        fleet.add(number % 3)
    full = pods * WORKERS / costs.request * target
    rate: Callable[[float], float] = (lambda t: full * (0.5 + 0.5 * min(1.0, 1.5 * t / seconds))) if name == "morning" else (lambda _: full)
    env.process(fleet.traffic(rate, seconds))
    env.process(fleet.scale())
    if name == "zone":
        env.process(fleet.lose(0, seconds / 2))
    elif name == "rollout":
        env.process(fleet.roll(WARM_UP))
    env.run(seconds + 5)
    return fleet


@click.command()
@click.option("--request-ms", type=click.FloatRange(min=0.1), default=6.2, show_default=True, help="Of a worker, for a request.")
@click.option("--spread", type=click.FloatRange(min=0.01), default=0.3, show_default=True, help="Coefficient of variation of it.")
@click.option("--start-s", type=click.FloatRange(min=0), default=7.0, show_default=True, help="Until a new pod ranks.")
@click.option("--pods", type=click.IntRange(min=3), default=9, show_default=True)
@click.option("--target", "targets", type=click.FloatRange(0.05, 0.95), multiple=True, default=(0.5, 0.65), show_default=True)
@click.option("--seconds", type=click.FloatRange(min=60), default=150.0, show_default=True)
def main(request_ms: float, spread: float, start_s: float, pods: int, targets: tuple[float, ...], seconds: float) -> None:
    """Simulate each scenario at each target load, and print pods, times, and what was refused and lost."""
    costs = Costs(request_ms / 1e3, spread, start_s)
    table = Table("scenario", "target load", "pods, most", "requests", "p50 ms", "p99 ms", "p99.9 ms", "refused", "lost")
    with progress_bar() as progress:
        for name, target in progress.track(
            [(n, t) for n in ("steady", "morning", "zone", "rollout") for t in targets], description="fleet"
        ):
            found = simulate(name, costs, pods, target, seconds)
            every = len(found.times) + found.shed + found.lost
            times = (f"{value * 1e3:.1f}" for value in np.percentile(found.times, (50, 99, 99.9)))
            shares = (f"{count / every:.4%}" for count in (found.shed, found.lost))
            table.add_row(name, f"{target:.0%}", f"{pods}, {found.most}", f"{every:,}", *times, *shares)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
