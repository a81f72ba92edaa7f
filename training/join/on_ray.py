"""The parts of a log made on a Ray cluster, by Ray Data: the very same query, on whichever machine is free."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import ray
import ray.data
from ray.exceptions import RayError

from ..datasets.prepared import DataError
from .attributed import HourPart, Maker, Run, Unmade

ONE_PROCESSOR = {"env_vars": {"POLARS_MAX_THREADS": "1"}}
"""What Ray gives a task, which polars would not know."""

REACH_SECONDS = 5.0
OURS = f"{DataError.__name__}: "
"""What a sentence of ours follows in the traces that Ray gives."""


@contextmanager
def on_ray(address: str) -> Iterator[Run]:
    """Have parts made on the cluster at an address; `local` starts one on this machine, and ends it.

    Every machine of it sees the log and the output under the same paths, and has this version of adrank.

    Raises:
        DataError: the cluster is not there, or a part could not be made.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if host and port.isdecimal():
            socket.create_connection((host, int(port)), REACH_SECONDS).close()  # Ray would try for eight minutes
        ray.init(address, runtime_env=ONE_PROCESSOR, include_dashboard=False, log_to_driver=False, logging_level="error")
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"no Ray cluster at {address}: {error}; start one with ray start --head, or say --ray local") from error
    try:
        yield _run
    except RayError as error:
        lines = str(error).splitlines() or [type(error).__name__]
        why = next((line.partition(OURS)[2] for line in lines if OURS in line), lines[0])
        raise DataError(f"the log cannot be attributed on Ray: {why}") from error
    finally:
        ray.shutdown()


def _run(make: Maker, parts: list[HourPart]) -> Iterator[Unmade]:
    ray.data.DataContext.get_current().enable_progress_bars = False  # ours is shown
    numbers = ray.data.range(len(parts), override_num_blocks=max(1, len(parts)))
    for row in numbers.map(lambda row: make(parts[row["id"]])._asdict()).iter_rows():
        yield Unmade(**row)
