"""How much memory there is: of this process, of its cgroup, of the machine."""

import os
from dataclasses import dataclass
from pathlib import Path

from ..settings import CGROUP

LIMITS = ("memory.max", "memory/memory.limit_in_bytes")
USES = ("memory.current", "memory/memory.usage_in_bytes")
MEMINFO = Path("/proc/meminfo")
RESERVE = 32 * 2**20


@dataclass(frozen=True, slots=True)
class Room:
    """The memory that this process and those beside it may use, in bytes; `limit` is None where only the machine bounds it."""

    cgroup: Path = CGROUP

    @property
    def limit(self) -> int | None:
        """The cgroup's limit, if it has one that is less than the machine."""
        limit = _first(self.cgroup, LIMITS)
        return limit if limit is not None and limit < _meminfo("MemTotal") else None

    def left(self) -> int:
        """What can be taken now without ending a process, with a reserve."""
        left, limit = _meminfo("MemAvailable"), self.limit
        if limit is not None:
            left = min(left, limit - (_first(self.cgroup, USES) or 0))
        return max(0, left - RESERVE)


def resident() -> int:
    """Bytes of this process that are in memory; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def _first(cgroup: Path, names: tuple[str, ...]) -> int | None:
    for name in names:
        try:
            text = (cgroup / name).read_text().strip()
        except OSError:
            continue
        return int(text) if text.isdecimal() else None
    return None


def _meminfo(name: str) -> int:
    """In bytes; without bound where the system does not say."""
    try:
        lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        return int(lines[name].split()[0]) * 1024
    except (OSError, ValueError, KeyError):
        return 2**62
