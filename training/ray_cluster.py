"""A Ray cluster: the one at an address, or one of this machine alone, which ends with its block."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from features.errors import AdrankError

LOCAL = "local"
"""The address of a cluster that is started on this machine."""
FOUND_SECONDS = 10.0


class ClusterError(AdrankError, RuntimeError):
    """There is no such cluster; the message says why and what to do."""


def check_cluster(address: str, instead: str) -> None:
    """That there is Ray, and somebody at the address: Ray itself would try for eight minutes. `instead` is what to do without.

    Raises:
        ClusterError: there is not.
    """
    if find_spec("ray") is None:
        raise ClusterError("several workers or machines need ray, which is not installed: pip install 'adrank[ray]'")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if host and port.isdecimal():
            socket.create_connection((host.strip("[]"), int(port)), FOUND_SECONDS).close()
    except OSError as error:
        raise _none_at(address, error, instead) from error


@contextmanager
def cluster(address: str, instead: str, processors: int | None = None, **options: Any) -> Iterator[Any]:
    """Ray, with the cluster; a local one has so many processors, all of this machine's by default.

    Raises:
        ClusterError: see `check_cluster`.
    """
    check_cluster(address, instead)
    import ray  # noqa: PLC0415  # an extra

    if address == LOCAL:
        options |= {"num_cpus": processors, "include_dashboard": False}
    try:
        ray.init(address, log_to_driver=False, logging_level="error", **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise _none_at(address, error, instead) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _none_at(address: str, error: Exception, instead: str) -> ClusterError:
    line = str(error).strip().splitlines()[0].rstrip(".")
    return ClusterError(f"no Ray cluster at {address}: {line}; start one with ray start --head, or {instead}")
