"""The folder of a log: its schema, its lock, and files that stand there whole or not at all."""

import fcntl
import io
import logging
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import polars as pl

from features.bundle import SCHEMA, BundleError, current_path, load_bundle
from features.errors import AdrankError
from features.repository import model_names
from features.schema import Schema, SchemaError, parse_schema

from .state import NO_ROOM, NoRoomError

LOOK_SECONDS = 0.5
FILE_MODE, FOLDER_MODE, STATE_MODE = 0o640, 0o750, 0o700
"""Users and what they did are for the joiner, and its group to train on; what it holds is its own."""

log = logging.getLogger(__name__)


class JoinError(AdrankError, RuntimeError):
    """The joiner cannot work; the message says why and what to do."""


class NoModelError(JoinError):
    """There is no model yet to take a log's schema from."""


@dataclass(frozen=True)
class LogWriter:
    """The folder of a log, and its fields."""

    folder: Path
    schema: Schema
    models: Path

    @property
    def state(self) -> Path:
        """Where the joiner keeps what it holds."""
        return self.folder / ".join" / "state.db"

    @property
    def id(self) -> str:
        """What the log is known by, wherever its folder is moved: made when it is first asked for.

        Raises:
            JoinError: it cannot be read or written.
            NoRoomError: the disk is full.
        """
        path = self.folder / ".join" / "id"
        try:
            if not path.exists():
                write_file(path, uuid.uuid4().hex.encode())
            return path.read_text("ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            if isinstance(error, OSError) and error.errno in NO_ROOM:
                raise NoRoomError(f"the disk of {self.folder} is full: {error.strerror}") from error
            raise JoinError(f"the log {self.folder} cannot be written: {error}") from error

    @property
    def place(self) -> str:
        """Where the log is, for a person."""
        return f"{self.folder.resolve()} on {socket.gethostname()}"

    def first_part(self) -> int:
        """A number above those of the files that are there, for a state that is new."""
        return 1 + max((int(path.stem) for path in self.folder.rglob("*.parquet") if path.stem.isdecimal()), default=0)


def open_log(folder: Path, models: Path, name: str | None) -> LogWriter:
    """Open a log's folder, or make it, with the schema of the live version of a model: `name`, or the repository's only one.

    Raises:
        NoModelError: there is no model yet to take a schema from.
        JoinError: the folder cannot be made or read.
    """
    path = folder / SCHEMA
    try:
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
            write_file(path, load_bundle(current_path(models, names[0])).schema.to_toml().encode())
        return LogWriter(folder, parse_schema(path.read_text("utf-8")), models)
    except (OSError, UnicodeDecodeError, SchemaError, BundleError) as error:
        raise JoinError(f"{folder} cannot be used as a log: {error}") from error


def wait_for_log(folder: Path, models: Path, name: str | None) -> LogWriter:
    """Open a log's folder as `open_log` does, but wait for a model where there is none yet.

    Raises:
        JoinError: the folder cannot be made or read.
    """
    told = False
    while True:
        try:
            return open_log(folder, models, name)
        except NoModelError as error:
            if not told:
                log.warning("%s; waiting for it", error)
            told = True
            time.sleep(LOOK_SECONDS)


@contextmanager
def only_joiner(folder: Path) -> Iterator[None]:
    """Hold the log's lock, so that nobody else joins into it.

    Raises:
        JoinError: somebody does, or the folder cannot be written.
    """
    try:
        _make(folder)
        (folder / ".join").mkdir(STATE_MODE, exist_ok=True)
        for path in (folder / ".join", *(folder / ".join").iterdir()):  # of before they had modes of their own
            path.chmod(path.stat().st_mode & (0o777 if path.is_dir() else 0o666) & STATE_MODE)
        file = os.fdopen(os.open(folder / ".join" / "lock", os.O_RDWR | os.O_CREAT, STATE_MODE & 0o666), "ab")
    except OSError as error:
        raise JoinError(f"the log {folder} cannot be written: {error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise JoinError(f"another joiner writes to {folder}; one log has one joiner, so stop that one first") from error
        yield


def hour_folder(log: Path, hour: int) -> Path:
    """The folder of an hour since 1970, UTC."""
    at = datetime.fromtimestamp(hour * 3600, UTC)
    return log / f"day={at:%Y-%m-%d}" / f"hour={at:%H}"


def write_parquet(folder: Path, number: int, frame: pl.DataFrame) -> None:
    """Write a file of the log: when this returns it stands there whole, whatever happens next.

    Raises:
        OSError: it cannot be written; nothing of it is left behind.
    """
    data = io.BytesIO()
    frame.write_parquet(data, compression="zstd", statistics=True)
    write_file(folder / f"{number:08}.parquet", data.getbuffer())


def write_file(path: Path, data: bytes | memoryview) -> None:
    """Write a file by one rename. Its name until then ends in `.tmp`, which no reader looks for.

    Raises:
        OSError: it cannot be written; nothing of it is left behind.
    """
    _make(path.parent)
    staged = path.with_name(f".{path.name}.tmp")
    try:
        with open(os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, FILE_MODE), "wb") as file:  # noqa: PTH123  # a mode from the start
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    except OSError:
        staged.unlink(missing_ok=True)
        raise
    sync(path.parent)


def _make(folder: Path) -> None:
    if not folder.is_dir():
        _make(folder.parent)
        folder.mkdir(FOLDER_MODE, exist_ok=True)
        sync(folder.parent)


def sync(folder: Path) -> None:
    """Make the names in a folder last."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
