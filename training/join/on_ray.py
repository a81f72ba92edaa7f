"""The parts of a log made on a Ray cluster, by Ray Data: the very same query, on whichever machine is free."""

from collections.abc import Iterator
from contextlib import contextmanager

import ray
import ray.data
from ray.exceptions import RayError

from ..datasets.prepared import DataError
from .attributed import HourPart, Maker, Run, Unmade

ONE_PROCESSOR = {"env_vars": {"POLARS_MAX_THREADS": "1"}}
"""What Ray gives a task, which polars would not know."""


@contextmanager
def on_ray(address: str) -> Iterator[Run]:
    """Have parts made on the cluster at an address; `local` starts one on this machine, and ends it.

    Every machine of it sees the log and the output under the same paths, and has this version of adrank.

    Raises:
        DataError: the cluster is not there, or a part could not be made.
    """
    try:
        ray.init(address, runtime_env=ONE_PROCESSOR, include_dashboard=False, log_to_driver=False, logging_level="error")
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"no Ray cluster at {address}: {error}; start one with ray start --head, or say --ray local") from error
    try:
        yield _run
    except RayError as error:
        raise DataError(f"the log cannot be attributed on Ray: {error}") from error
    finally:
        ray.shutdown()


def _run(make: Maker, parts: list[HourPart]) -> Iterator[Unmade]:
    ray.data.DataContext.get_current().enable_progress_bars = False  # ours is shown
    numbers = ray.data.range(len(parts), override_num_blocks=max(1, len(parts)))
    for row in numbers.map(lambda row: make(parts[row["id"]])._asdict()).iter_rows():
        yield Unmade(**row)
