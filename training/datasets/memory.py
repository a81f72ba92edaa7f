"""How much memory a run may use, and where it puts what would take more."""

from dataclasses import dataclass
from pathlib import Path

import psutil

from features.memory import Room

GB = 2**30
SHARE = 0.75
"""Of the memory of the machine, or the limit of the cgroup where that is less, unless it is said."""
PART = 8
"""A split is kept in memory if so many of its size fit: of three, each more while it is encoded, and beside a network."""
CACHE = ".encoded"


@dataclass(frozen=True)
class Memory:
    """What a run may use."""

    gigabytes: float | None = None
    cache: Path | None = None
    """Where the columns of splits are that do not fit; default: `.encoded` in the folder of the data."""

    @property
    def most(self) -> float:
        """In bytes."""
        return self.gigabytes * GB if self.gigabytes else SHARE * (Room().limit or psutil.virtual_memory().total)

    def holds(self, size: float) -> bool:
        """Whether so many bytes fit well inside it."""
        return PART * size <= self.most
