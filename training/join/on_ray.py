"""The parts of a log made on a Ray cluster, by Ray Data: the very same query, on whichever machine is free."""

from collections.abc import Iterator
from contextlib import contextmanager

import ray.data
from ray.exceptions import RayError

from ..datasets.prepared import DataError
from ..ray_cluster import cluster
from .attributed import HourPart, Maker, Run, Unmade

ONE_PROCESSOR = {"env_vars": {"POLARS_MAX_THREADS": "1"}}
"""What Ray gives a task, which polars would not know."""

OURS = f"{DataError.__name__}: "
"""What a sentence of ours follows in the traces that Ray gives."""


@contextmanager
def on_ray(address: str) -> Iterator[Run]:
    """Have parts made on the cluster at an address; `local` starts one on this machine, and ends it.

    Every machine of it sees the log and the output under the same paths, and has this version of adrank.

    Raises:
        ClusterError: there is no such cluster.
        DataError: a part could not be made.
    """
    try:
        with cluster(address, "say --ray local", runtime_env=ONE_PROCESSOR):
            yield _run
    except RayError as error:
        lines = str(error).splitlines() or [type(error).__name__]
        why = next((line.partition(OURS)[2] for line in lines if OURS in line), lines[0])
        raise DataError(f"the log cannot be attributed on Ray: {why}") from error


def _run(make: Maker, parts: list[HourPart]) -> Iterator[Unmade]:
    ray.data.DataContext.get_current().enable_progress_bars = False  # ours is shown
    numbers = ray.data.range(len(parts), override_num_blocks=max(1, len(parts)))
    for row in numbers.map(lambda row: make(parts[row["id"]])._asdict()).iter_rows():
        yield Unmade(**row)
