"""Files that others may have put there: read where they are regular files of a bounded size, and never waited for.

A pipe, a device or a file without end where a file of a bundle is expected is an `OSError` at once, whoever made it.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from .errors import AdrankError

LOCK_SECONDS = 30.0
"""How long another process may hold a model's lock before who waits for it is told."""
LOCK_PAUSE = 0.02
NOTED, NOTED_SECONDS = 2**26, 120.0
"""Bytes from which on a digest is noted for other processes, and how long they wait for it before they work it out themselves."""
MEGABYTE = 2**20


class NotAFileError(OSError):
    """What is there is a pipe, a device, a socket, or larger than anything that belongs there."""


@contextlib.contextmanager
def opened(path: Path, most: int) -> Iterator[IO[bytes]]:
    """A regular file of at most `most` bytes, to read; links are followed.

    Raises:
        OSError: it cannot be opened, is no regular file, or is larger.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:  # noqa: PTH123  # a pipe without a writer would block
        there = os.fstat(file.fileno())
        if stat.S_ISDIR(there.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(there.st_mode):
            raise NotAFileError(errno.EINVAL, f"it is {kind_of(there.st_mode)}, not a file", str(path))
        if there.st_size > most:
            raise NotAFileError(errno.EFBIG, f"it has {there.st_size:,} bytes, more than the {most:,} that belong there", str(path))
        yield file


def read(path: Path, most: int = MEGABYTE) -> bytes:
    """What a regular file of at most `most` bytes holds; raises as `opened` does."""
    with opened(path, most) as file:
        data = file.read(most + 1)
    if len(data) > most:  # it grew
        raise NotAFileError(errno.EFBIG, f"it has more than the {most:,} bytes that belong there", str(path))
    return data


def read_toml(path: Path, wrong: type[AdrankError]) -> dict[str, Any]:
    """What a TOML file says.

    Raises:
        wrong: it cannot be read, or is no TOML; the message names the file.
    """
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise wrong(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise wrong(f"{path} is not UTF-8: see its byte {error.start + 1:,}, and save it as UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise wrong(f"{path} is no TOML: {error}") from error


def allocate(path: Path, size: int) -> None:
    """Make a file of zeros, for writing to it through memory, with its blocks: a disk that has no more of them then ends the process.

    Raises:
        OSError: there is no room for it.
    """
    with path.open("ab") as file:
        os.posix_fallocate(file.fileno(), 0, size)


def sync(folder: Path) -> None:
    """Make the names in a folder last."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(path: Path, most: int, notes: Path | None = None) -> str:
    """The SHA-256 of a regular file; raises as `opened` does.

    Of processes that share a folder for `notes`, which nobody else may write to, the first works out that of a large file, and the others
    wait. A note is of this very file as it is now: of its inode, size and times, the one that no program can set among them.
    """
    with opened(path, most) as file:
        it = os.fstat(file.fileno())
        if notes and it.st_size >= NOTED:
            note = notes / f"digest-{it.st_dev}-{it.st_ino}-{it.st_size}-{it.st_mtime_ns}-{it.st_ctime_ns}"
            with contextlib.suppress(OSError), exclusive(note, NOTED_SECONDS):
                if note.stat().st_size != 64:
                    note.write_text(_digest(file), "ascii")
                return note.read_text("ascii")
        return _digest(file)


def _digest(file: IO[bytes]) -> str:
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def kind_of(mode: int) -> str:
    """What a file that is none is, in words."""
    kinds = {
        stat.S_IFIFO: "a pipe",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
        stat.S_IFSOCK: "a socket",
        stat.S_IFDIR: "a folder",
    }
    return kinds.get(stat.S_IFMT(mode), "something else")


@contextlib.contextmanager
def exclusive(path: Path, seconds: float = LOCK_SECONDS) -> Iterator[None]:
    """Hold the lock of a file, made where there is none; wait for another holder so long and no longer.

    Raises:
        OSError: it cannot be made or is no file; a `TimeoutError` where somebody holds it still.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    try:
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            raise NotAFileError(errno.EINVAL, f"it is {kind_of(mode)}, not a file", str(path))
        until = time.monotonic() + seconds
        while not _lock(handle):
            if time.monotonic() > until:
                raise TimeoutError(errno.ETIMEDOUT, f"another process has held it for {seconds:g} s; see which one hangs", str(path))
            time.sleep(LOCK_PAUSE)
        yield
    finally:
        os.close(handle)


def _lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
