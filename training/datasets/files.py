"""The files that a source is made of: one file, the part files of a folder, or standard input; compressed or not.

What a file is, its first bytes say, not its name. Knows nothing about columns: `rows.py` and `json_lines.py` read texts.
"""

import bz2
import gzip
import io
import lzma
import os
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, Literal, TextIO, cast
from urllib.parse import unquote

from .prepared import DataError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

Form = Literal["csv", "json", "parquet"]
STANDARD_INPUT = Path("-")
PACKINGS: Mapping[bytes, Any] = {
    b"\x1f\x8b": gzip.GzipFile,
    b"\x28\xb5\x2f\xfd": zstd.ZstdFile,
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\x00": lzma.LZMAFile,
}
"""How a compressed file opens, by its first bytes."""
ENDINGS = ("", ".gz", ".zst", ".bz2", ".xz")
"""What a file of a published data set may be called beyond its name."""
FOREIGN = {
    b"PK\x03\x04": "a zip archive or a workbook: unpack it, or save it as CSV",
    b"ORC": "ORC: write it as parquet",
    b"Obj\x01": "Avro: write it as parquet",
    b"\xff\xfe": "UTF-16: convert it to UTF-8",
    b"\xfe\xff": "UTF-16: convert it to UTF-8",
    b"SQLite format 3": "a SQLite database: export the table as CSV",
}
TABLE_FORMATS = {"_delta_log": "Delta", ".hoodie": "Hudi"}
"""Folders whose part files alone are not the table: some of them are there for older versions of it."""
NO_VALUE = "__HIVE_DEFAULT_PARTITION__"
DAMAGED = (EOFError, zlib.error, lzma.LZMAError, zstd.ZstdError, gzip.BadGzipFile)
COPY = re.compile(r"(.+?)(?:\.gz|\.zst|\.bz2|\.xz|~|\.bak|\.orig|\.old|\.tmp|\.copy)")
"""What a part is called that was packed, or kept from before, beside its own file."""
PEEK = 4096


@dataclass(frozen=True)
class SourceFile:
    """A file of a source: what it is called in messages, what it holds, and the columns that the names of its folders tell."""

    path: Path
    name: str
    form: Form = "csv"
    partitions: Mapping[str, str] = field(default_factory=dict)

    def open(self) -> IO[bytes]:
        """The content, decompressed."""
        unpack = self._unpack()
        return cast("IO[bytes]", unpack(self.path)) if unpack else self.path.open("rb")

    @property
    def is_packed(self) -> bool:
        """Whether the file is compressed as a whole."""
        return self._unpack() is not None

    def _unpack(self) -> Any:
        with self.path.open("rb") as file:
            start = file.read(8)
        return next((unpack for magic, unpack in PACKINGS.items() if start.startswith(magic)), None)

    @contextmanager
    def text(self, encoding: str = "utf-8-sig") -> Iterator[TextIO]:
        """The content as text, with its ends of line as they are.

        Raises:
            DataError: it cannot be read, is damaged or cut short, or is not text in that encoding.
        """
        with self._reading():
            try:
                with self.open() as raw, io.TextIOWrapper(raw, encoding=encoding, newline="") as file:
                    yield file
            except UnicodeDecodeError as error:
                line = self.undecodable(encoding)
                raise DataError(f"{self.name}, line {line}: not text in {encoding.removesuffix('-sig')}") from error

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except DAMAGED as error:
            raise DataError(f"{self.name} is damaged or was cut short: {error}; copy or write it again") from error
        except OSError as error:
            raise DataError(f"cannot read {self.name}: {error.strerror or error}") from error

    def undecodable(self, encoding: str) -> int:
        """The first line that is no text in that encoding, 0 where all are.

        Raises:
            DataError: it cannot be read, or is damaged.
        """
        with self._reading(), self.open() as file:
            for number, line in enumerate(file, 1):
                try:
                    line.decode(encoding)
                except UnicodeDecodeError:
                    return number
        return 0

    def start(self) -> bytes:
        """The first bytes of the content.

        Raises:
            DataError: it cannot be read, or is damaged.
        """
        with self._reading(), self.open() as file:
            return file.read(PEEK)


def one_file(path: Path, name: str = "") -> SourceFile:
    """The text at `path`, or at `path` with the ending of a compression.

    Raises:
        DataError: it is a folder.
    """
    found = next((known for ending in ENDINGS if _is_file(known := path.with_name(path.name + ending))), path) if path.name else path
    if is_folder(found):
        raise DataError(f"{found} is a folder; expected a file")
    return SourceFile(found, name or str(found))


@contextmanager
def source_files(source: Path) -> Iterator[list[SourceFile]]:
    """The files of a source in the order of their names, all of one form. `-` is standard input; what can be read only once, as that and a
    pipe can, is copied to a temporary file.

    Raises:
        DataError: the source cannot be read, is of a form that is not known, or mixes forms.
    """
    if source == STANDARD_INPUT or source.is_fifo():
        with tempfile.NamedTemporaryFile(prefix="adrank-") as copy:
            name = _copied(source, copy)
            yield [_seen(SourceFile(Path(copy.name), name))]
    else:
        yield _folder(source) if is_folder(source) else [_seen(SourceFile(source, str(source)))]


def _copied(source: Path, copy: IO[bytes]) -> str:
    """The name of a source that can be read only once, and is in the copy now."""
    if source != STANDARD_INPUT:
        with source.open("rb") as pipe:
            shutil.copyfileobj(pipe, copy)
    elif sys.stdin is None:
        raise DataError("standard input is closed: there is nothing to read")
    else:
        shutil.copyfileobj(sys.stdin.buffer, copy)
    copy.flush()
    return "standard input" if source == STANDARD_INPUT else str(source)


def _folder(source: Path) -> list[SourceFile]:
    """Hidden files, and those that a writer keeps for itself, such as _SUCCESS, are no parts; nor are empty ones."""
    try:
        for name, kind in TABLE_FORMATS.items():
            if (source / name).exists():
                raise DataError(
                    f"{source} is a table of {kind}, whose files alone may be of older versions: write it as plain parquet first"
                )
        parts = [path for path in _all_within(source) if path.stat().st_size]
        parts.sort(key=lambda path: _natural(path.relative_to(source)))
    except OSError as error:
        raise DataError(f"cannot read {source}: {error.strerror or error}") from error
    if not parts:
        raise DataError(f"{source} is a folder without part files: nothing in it has any content")
    files = [_seen(SourceFile(path, str(path), partitions=_partitions(path.relative_to(source)))) for path in parts]
    for one, other in pairwise(files):
        if one.form != other.form:
            raise DataError(
                f"{source} mixes forms: {one.name} is {one.form}, {other.name} is {other.form}; name one file, or clear the folder"
            )
    return files


def _all_within(source: Path) -> Iterator[Path]:
    """Every part, also behind links, each once; what cannot be read is told, for its rows would be missing without a word."""

    def refuse(error: OSError) -> None:
        raise DataError(f"cannot read {error.filename}: {error.strerror}")

    seen = dict[Path, Path]()
    for folder, folders, names in os.walk(source, onerror=refuse, followlinks=True):
        folders[:] = [name for name in folders if not _is_hidden(name)]
        parts = [Path(folder, name) for name in names if not _is_hidden(name)]
        for path in (Path(folder), *parts):
            if (first := seen.setdefault(path.resolve(), path)) != path:
                raise DataError(f"{path} is {first} once more, whose rows would count twice: take the link away")
        copies = {name: found[1] for name in names if (found := COPY.fullmatch(name)) and found[1] in names}
        for name, of in copies.items():
            raise DataError(f"{Path(folder, name)} looks like {of} once more, whose rows would count twice: take one of them away")
        for path in parts:
            if not path.is_file():
                raise DataError(f"{path} is no file, or a link to none: take it out of the folder")
            yield path


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "_"))


def _natural(path: Path) -> list[list[tuple[int, str]]]:
    """A key that puts part-2 before part-10."""
    return [[(int(n or 0), text) for n, text in re.findall(r"(\d{1,18})|(\D+|\d)", part)] for part in path.parts]


def _partitions(path: Path) -> dict[str, str]:
    """The columns in the names of folders such as day=2025-11-01."""
    pairs = [part.partition("=") for part in path.parts[:-1]]
    return {name: "" if value == NO_VALUE else unquote(value) for name, equals, value in pairs if name and equals}


def _seen(file: SourceFile) -> SourceFile:
    """The file with the form that its content has."""
    start = file.start()
    for magic, wrong in FOREIGN.items():
        if start.startswith(magic):
            raise DataError(f"{file.name} is {wrong}")
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if re.match(rb"\[\s*(\{|$)", text):
        raise DataError(f"{file.name} is one JSON array; write it as JSON lines, one object a line")
    form: Form = "parquet" if start.startswith(b"PAR1") else "json" if text.startswith(b"{") else "csv"
    if form == "csv" and b"\0" in text.partition(b"\n")[0]:
        raise DataError(f"{file.name} is no text: its first line has bytes of 0; if it is UTF-16, convert it to UTF-8")
    if form == "parquet" and file.is_packed:
        raise DataError(f"{file.name} is parquet that was compressed once more: decompress it")
    return SourceFile(file.path, file.name, form, file.partitions)


def is_folder(path: Path) -> bool:
    """Whether it is there and is one."""
    try:
        return path.is_dir()
    except OSError:
        return False  # reading it says what is wrong


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False
