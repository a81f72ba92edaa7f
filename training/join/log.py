"""The folder of a log: its schema, its id, and files that stand there whole or not at all."""

import errno
import io
import logging
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from features import files
from features.bundle import SCHEMA, BundleError, current_path, load_bundle
from features.errors import AdrankError
from features.repository import model_names
from features.schema import Schema, SchemaError, parse_schema

LOOK_SECONDS = 0.5
FILE_MODE, FOLDER_MODE, OWN_MODE = 0o640, 0o750, 0o700
"""Users and what they did are for the sinks, and their group to train on; what is in `.join` is the sinks' own."""
OWN = ".join"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
ABANDONED_SECONDS = 600.0
"""How old what a sink was writing is when it is sure to have ended."""

log = logging.getLogger(__name__)


class JoinError(AdrankError, RuntimeError):
    """Nothing can be written into the log; the message says why and what to do."""


class NoModelError(JoinError):
    """There is no model yet to take a log's schema from."""


class NoRoomError(AdrankError, RuntimeError):
    """The disk is full: it may be tried again."""


@dataclass(frozen=True)
class LogFolder:
    """The folder of a log, and its fields."""

    folder: Path
    schema: Schema
    models: Path

    @property
    def id(self) -> str:
        """What the log is known by, wherever its folder is moved: made when it is first asked for.

        Raises:
            JoinError: it cannot be read or written.
            NoRoomError: the disk is full.
        """
        path = self.folder / OWN / "id"
        with room(self.folder):
            if not path.exists():
                write_file(path, uuid.uuid4().hex.encode(), first=True)
            return path.read_text("ascii").strip()

    @property
    def place(self) -> str:
        """Where the log is, for a person."""
        return f"{self.folder.resolve()} on {socket.gethostname()}"


def open_log(folder: Path, models: Path, name: str | None) -> LogFolder:
    """Open a log's folder, or make it, with the schema of the live version of a model: `name`, or the repository's only one.

    Raises:
        NoModelError: there is no model yet to take a schema from.
        JoinError: the folder cannot be made or read, or holds what a joiner of before had not written yet.
    """
    path, before = folder / SCHEMA, folder / OWN / "state.db"
    try:
        if before.exists():
            raise JoinError(
                f"{before} is of the joiner of before, and may hold rankings that are in no stream any more: let the adrank that wrote it "
                f"write them (adrank join --drain), and remove {before}; what the log has stays readable beside what is written now"
            )
        if not path.exists():
            names = [each for each in model_names(models) if name in (None, each)]
            if not names:
                what = name or "any model"
                raise NoModelError(
                    f"{models} has no live version of {what} to take the log's schema from; train one, or name another --models"
                )
            if len(names) > 1:
                several = f"{len(names)} models are live in {models} ({', '.join(names)})"
                raise JoinError(f"{several}, and a new log takes the schema of one; name it with --name")
            _make(folder / OWN, OWN_MODE)
            write_file(path, load_bundle(current_path(models, names[0])).schema.to_toml().encode(), folder / OWN, first=True)
        _make(folder / OWN, OWN_MODE)
        for left in (folder / OWN).glob("*.tmp"):
            if time.time() - left.stat().st_mtime > ABANDONED_SECONDS:
                left.unlink(missing_ok=True)
        return LogFolder(folder, parse_schema(path.read_text("utf-8")), models)
    except (OSError, UnicodeDecodeError, SchemaError, BundleError) as error:
        raise JoinError(f"{folder} cannot be used as a log: {error}") from error


def wait_for_log(folder: Path, models: Path, name: str | None) -> LogFolder:
    """Open a log's folder as `open_log` does, but wait for a model where there is none yet.

    Raises:
        JoinError: the folder cannot be made or read.
    """
    warned = False
    while True:
        try:
            return open_log(folder, models, name)
        except NoModelError as error:
            if not warned:
                log.warning("%s; waiting for it", error)
            warned = True
            time.sleep(LOOK_SECONDS)


@contextmanager
def room(folder: Path) -> Iterator[None]:
    """Tell a full disk from what cannot be mended by waiting.

    Raises:
        NoRoomError: the disk is full.
        JoinError: the folder cannot be written.
    """
    try:
        yield
    except (OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise NoRoomError(f"the disk of {folder} is full: {error.strerror}") from error
        raise JoinError(f"the log {folder} cannot be written: {error}") from error


def write_parquet(log_: Path, path: Path, frame: pl.DataFrame) -> None:
    """Write a file of the log: when this returns it stands there whole, whatever happens next.

    Raises:
        OSError: it cannot be written; nothing of it is left behind.
    """
    data = io.BytesIO()
    frame.write_parquet(data, compression="zstd", statistics=True)
    write_file(path, data.getbuffer(), log_ / OWN)


def write_file(path: Path, data: bytes | memoryview, aside: Path | None = None, first: bool = False) -> None:
    """Write a file by one rename. Until then it is in the folder `aside`, or hidden beside it. With `first` the first writer's stays.

    Raises:
        OSError: it cannot be written; nothing of it is left behind.
    """
    _make(path.parent, OWN_MODE if path.parent.name == OWN else FOLDER_MODE)
    staged = (aside or path.parent) / f".{path.name}.{os.getpid()}.tmp"
    try:
        with open(os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, FILE_MODE), "wb") as file:  # noqa: PTH123  # a mode from the start
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if first:
            with suppress(FileExistsError):
                os.link(staged, path)
            staged.unlink()
        else:
            staged.replace(path)
    except OSError:
        staged.unlink(missing_ok=True)
        raise
    files.sync(path.parent)


def _make(folder: Path, mode: int) -> None:
    if not folder.is_dir():
        _make(folder.parent, FOLDER_MODE)
        folder.mkdir(mode, exist_ok=True)
        files.sync(folder.parent)
