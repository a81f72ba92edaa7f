"""How much memory there is: of the cgroup, of the machine."""

from dataclasses import dataclass
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")
LIMITS = ("memory.max", "memory/memory.limit_in_bytes")
USES = ("memory.current", "memory/memory.usage_in_bytes")
RESERVE = 32 * 2**20


@dataclass(frozen=True, slots=True)
class Room:
    """The memory that this process and those beside it may use, in bytes; `limit` is None where only the machine bounds it."""

    cgroup: Path = CGROUP

    @property
    def limit(self) -> int | None:
        """The cgroup's limit, if it has one that is less than the machine."""
        limit = _first(self.cgroup, LIMITS)
        return limit if limit is not None and limit < psutil.virtual_memory().total else None

    def left(self) -> int:
        """What can be taken now without ending a process, with a reserve."""
        left, limit = psutil.virtual_memory().available, self.limit
        if limit is not None:
            left = min(left, limit - (_first(self.cgroup, USES) or 0))
        return max(0, int(left) - RESERVE)


def _first(cgroup: Path, names: tuple[str, ...]) -> int | None:
    for name in names:
        try:
            text = (cgroup / name).read_text().strip()
        except OSError:
            continue
        return int(text) if text.isdecimal() else None
    return None
