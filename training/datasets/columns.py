"""The columns of an encoded split: in memory, or in files that are written once and mapped. Knows nothing of what they hold."""

import fcntl
import hashlib
import json
import logging
import mmap
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .prepared import DataError, writing

Array = np.ndarray[Any, np.dtype[Any]]
FACTS, LOCK = "columns.json", ".lock"
"""What the files of a folder hold, and who is writing."""


class Columns(Protocol):
    """Columns that grow."""

    def add(self, name: str, rows: Array) -> None:
        """Add rows `(n, ...)` to a column: always of one type, and of one shape but for how many they are."""


class InMemory:
    """Columns that are arrays in the end."""

    def __init__(self) -> None:
        self.parts: dict[str, list[Array]] = {}

    def add(self, name: str, rows: Array) -> None:
        """See `Columns`."""
        self.parts.setdefault(name, []).append(rows)

    def arrays(self) -> dict[str, Array]:
        """The columns by name; they are gone from here then."""
        return {name: np.concatenate(self.parts.pop(name)) for name in list(self.parts)}


class OnDisk:
    """Columns that are files of a folder, a file each: its numbers, row by row, as they are in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.facts = folder, dict[str, dict[str, Any]]()
        self.digests: dict[str, Any] = {}

    def add(self, name: str, rows: Array) -> None:
        """See `Columns`."""
        fact = self.facts.setdefault(name, {"type": rows.dtype.str, "shape": [0, *rows.shape[1:]]})
        assert (fact["type"], fact["shape"][1:]) == (rows.dtype.str, list(rows.shape[1:]))  # noqa: S101  # else the file means nothing
        fact["shape"][0] += len(rows)
        data = np.ascontiguousarray(rows).data if rows.size else b""
        self.digests.setdefault(name, hashlib.sha256()).update(data)
        with (self.folder / name).open("ab") as file:
            file.write(data)

    def close(self) -> None:
        """Write what the files hold, after they are on the disk."""
        for name, fact in self.facts.items():
            fact["sha256"] = self.digests[name].hexdigest()
            with (self.folder / name).open("rb") as file:
                os.fsync(file.fileno())
        (self.folder / FACTS).write_text(json.dumps(self.facts), "utf-8")


@dataclass(frozen=True)
class Mapped:
    """The files that arrays are mapped from."""

    digest: str
    """Of all that they hold."""
    maps: tuple[mmap.mmap, ...]

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(map(len, self.maps))

    def release(self) -> None:
        """Let go of the memory that was read: it is the system's again, which may read it from the disk another time."""
        for each in self.maps:
            each.madvise(mmap.MADV_DONTNEED)


def cached(folder: Path, name: str, of: str, fill: Callable[[Columns], None]) -> tuple[Mapping[str, Array], Mapped]:
    """The columns of what is called `name` and follows from what has the digest `of`: as they are in the folder, or else filled first.

    Those of the same name that follow from something else make room, and so does what a killed run left. Two runs never fill one at once.

    Raises:
        DataError: the folder cannot be written, or what `fill` says; nothing is left then.
    """
    place = folder / f"{name}-{of[:16]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / LOCK).open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if place.exists() and (found := _opened(place)):
                return found
            for other in (*folder.glob(f"{name}-*"), *folder.glob(f".{name}-*")):
                shutil.rmtree(other)
            with writing(place) as staging:
                columns = OnDisk(staging)
                fill(columns)
                columns.close()
            found = _opened(place)
    except OSError as error:
        raise DataError(f"cannot write {folder}: {error.strerror or error}; name another folder with --cache DIR") from error
    if found is None:
        raise DataError(f"{place} was written and cannot be read: the disk is damaged; name another folder with --cache DIR")
    return found


def _opened(place: Path) -> tuple[Mapping[str, Array], Mapped] | None:
    """The columns in a folder; None, and a word of why, where they are not as they were written."""
    try:
        text = (place / FACTS).read_text("utf-8")
        arrays, maps = dict[str, Array](), list[mmap.mmap]()
        for name, fact in json.loads(text).items():
            with (place / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != fact["sha256"]:
                    raise ValueError(f"{name} is not as it was written")
                if file.tell():
                    maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
                arrays[name] = np.frombuffer(maps[-1] if file.tell() else b"", fact["type"]).reshape(fact["shape"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logging.getLogger(__name__).warning("%s is damaged (%s) and is made anew", place, error)
        return None
    return arrays, Mapped(hashlib.sha256(text.encode()).hexdigest(), tuple(maps))
