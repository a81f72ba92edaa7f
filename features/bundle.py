"""A bundle: everything a prediction needs, in `models/<name>/<version>/`, published whole or not at all.

`models/<name>/current` is a file that holds the live version, and `releases.jsonl` beside it holds those that were live before.
What a bundle is called is told by its folder alone, so that a copy, a link or a renamed folder is as good as what was published; what it
is, by the digests of its files. Knows nothing about torch or ONNX Runtime: what scores the goldens is passed in.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from . import files
from .encode import AdTable, Block, Encoder, Features, Feeds, Request, encode_request
from .errors import AdrankError
from .graph_file import GraphFacts, GraphFileError, graph_facts
from .repository import CURRENT, NAME, model_names
from .schema import Schema, SchemaError, parse_schema
from .vocabulary import Numbers, Vocabularies, fingerprint, parse_vocabularies

MODEL, SCHEMA, VOCABULARIES, GOLDENS, MANIFEST = "model.onnx", "schema.toml", "vocabularies.json", "goldens.json", "manifest.json"
CUDA_MODEL, INT8_MODEL = "model.cuda.onnx", "model.int8.onnx"
"""The same weights for an accelerator, where that takes another graph, and in int8, where that was asked for and passed its gate."""
AD_DEVIATIONS = "ad_deviations.npy"
"""How far the logit of each ad may be off for want of impressions, float32 by its id: what `Thompson` explores by."""
AD_SIDES = {MODEL: ("model.ads.onnx", "model.rest.onnx"), INT8_MODEL: ("model.int8.ads.onnx", "model.int8.rest.onnx")}
AD_ROWS = "ad_rows"
"""By graph the same in two, where that pays: what it makes of ads alone, and the rest, which is given that of any ads, and by this name
which of them the candidates are (`training/export/ad_side.py`)."""
EXPLAIN_MODEL = "explain.onnx"
CONTRIBUTIONS, ATTENTION, REST = "contributions", "attention", "rest"
"""The same weights for requests that ask why, where the network can say, its outputs `(R, C, K)` and `(R, C, T)`, and what is last of K.
The graph says the names of the K itself. The manifest's `explains` says which outputs it has; older bundles do not."""
REQUEST_VECTOR, AD_VECTOR = "request_vector.onnx", "ad_vector.onnx"
"""Of networks with vectors: the graph of a request's, `vector (R, K)` of its tensors but the ads', and of ads', `(R, C, K)` of theirs."""
GOLDEN_TOLERANCE = 1e-5
"""float32 sums in another order, on another CPU, move a probability by about 1e-7 a layer; a wrong input moves it far more."""
INT8_TOLERANCE = 5e-3
"""A value that float32 leaves on the other side of a rounding moves a byte by one step; a processor that saturates moves far more."""
RELEASES, LOCK, STAGING = "releases.jsonl", ".lock", ".publishing-"
RELEASES_KEPT = 100
REQUIRED = frozenset({MODEL, SCHEMA, VOCABULARIES, GOLDENS})
MOST_BYTES = 2**33
"""Of a file of a bundle. What is larger, or is no file at all, is refused before it is read."""
MOST_GRAPH_BYTES = 2**31
"""Of an ONNX file, as protocol buffers have it."""
MOST_GOLDENS_BYTES, MOST_MANIFEST_BYTES, MOST_CURRENT_BYTES = 2**26, 2**24, 64

Score = Callable[[Feeds], Numbers]
Contents = bytes | memoryview
"""Of a file."""


class BundleError(AdrankError, RuntimeError):
    """A bundle cannot be published or used; the message says which and why, `code` in a word what is wrong, for those who may not know
    more.
    """

    def __init__(self, message: str, code: str = "unusable") -> None:
        super().__init__(message)
        self.code = code


TIMES = ("history_ts", "ts")
"""What goldens of schemas without ages leave out, so that programs that do not know of ages read them."""


@dataclass(frozen=True, slots=True)
class Golden:
    """A request with values as they come from outside, the ads that it names, and the probabilities it must give."""

    user_id: str
    user: Features
    context: Features
    history: Sequence[str]
    candidates: Sequence[str]
    ads: Mapping[str, Features]
    p_click: Sequence[float]
    p_click_int8: Sequence[float] = field(default_factory=list)
    history_ts: Sequence[float] = field(default_factory=list)
    """When the behaviours were, where the schema has ages; the request was at `ts`."""
    ts: float = 0.0

    def feeds(self, encoder: Encoder) -> Feeds:
        """Encode the request just as the service does."""
        table = AdTable(encoder)
        if self.ads:
            rows = [encoder.encode_one("ad", features, ad_id) for ad_id, features in self.ads.items()]
            table.put(list(self.ads), Block(np.concatenate([row.ids for row in rows]), np.concatenate([row.numbers for row in rows])))
        user_id, user, context, history = self.user_id, self.user, self.context, self.history
        request = Request(user_id, user, context, history, self.candidates, history_ts=self.history_ts, ts=self.ts)
        return encode_request(table, request)[0]


@dataclass(frozen=True)
class Bundle:
    """A bundle whose digests and fingerprint have been checked."""

    path: Path
    name: str
    version: int
    fingerprint: str
    schema: Schema
    vocabularies: Vocabularies
    manifest: Mapping[str, Any]

    @property
    def files(self) -> frozenset[str]:
        """Names of its files, each checked against its digest."""
        return frozenset(self.manifest["files"])

    def checked(self, file: str) -> Path:
        """The path of one of its files, found to be what was published once more, for one that is opened long after the others.

        Raises:
            BundleError: it is not, or cannot be read.
        """
        try:
            _check_file(self.path, file, self.manifest["files"])
        except OSError as error:
            raise _unreadable(self.path, error) from error
        return self.path / file

    @cached_property
    def encoder(self) -> Encoder:
        """The encoder of this bundle's schema and vocabularies."""
        return Encoder(self.schema, self.vocabularies)

    @cached_property
    def ad_deviations(self) -> Numbers | None:
        """By the id of an ad, how far its logit may be off; None where that is not told.

        Raises:
            BundleError: it cannot be read, or has not a number for each id.
        """
        if AD_DEVIATIONS not in self.files:
            return None
        size = next(self.vocabularies.categories[each.vocabulary].size for each in self.schema.side("ad") if each.name == "ad_id")
        try:
            found: Numbers = np.load(self.path / AD_DEVIATIONS, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise BundleError(f"bundle {self.path}: {AD_DEVIATIONS} cannot be read: {error}") from error
        if found.dtype != np.float32 or found.shape != (size,) or not np.isfinite(found).all() or found.min() < 0:
            raise BundleError(f"bundle {self.path}: {AD_DEVIATIONS} lacks a number of at least 0 for each of {size} ids; publish it again")
        return found

    @property
    def goldens(self) -> list[Golden]:
        """The requests that the model must score as training did.

        Raises:
            BundleError: there are none, or they cannot be read.
        """
        try:
            goldens = [Golden(**golden) for golden in json.loads(files.read(self.path / GOLDENS, MOST_GOLDENS_BYTES))]
        except (OSError, TypeError, ValueError, RecursionError) as error:
            raise BundleError(f"bundle {self.path}: {GOLDENS} cannot be read: {error}", "goldens") from error
        if not any(golden.candidates for golden in goldens):
            what = "has no request with candidates, so nothing shows that the model scores as it did in training"
            raise BundleError(f"bundle {self.path}: {GOLDENS} {what}; publish it again with rows in the valid split", "goldens")
        return goldens

    @property
    def graphs(self) -> Mapping[str, GraphFacts]:
        """What its ONNX files say of themselves, by name, as far as the manifest tells; one that was published before it did has none."""
        graphs = self.manifest.get("graphs")
        if not isinstance(graphs, Mapping):
            return {}
        return {file: GraphFacts(int(each["ir"]), int(each["opset"])) for file, each in graphs.items()}

    def check_goldens(self, score: Score, graph: str = MODEL) -> None:
        """Score the goldens with one of the graphs, and compare.

        Raises:
            BundleError: a golden cannot be encoded, or a probability is off by more than the graph's tolerance.
        """
        allowed = INT8_TOLERANCE if graph == INT8_MODEL else GOLDEN_TOLERANCE
        for i, golden in enumerate(self.goldens):
            expected = golden.p_click_int8 if graph == INT8_MODEL else golden.p_click
            try:
                scores = score(golden.feeds(self.encoder))[0]
            except ValueError as error:  # a FieldError, or a tensor of another shape
                raise BundleError(f"bundle {self.path}: golden {i} cannot be encoded: {error}", "goldens") from error
            if len(expected) != len(scores):  # one number would be held against all
                counts = f"{len(expected)} probabilities for {len(scores)} candidates"
                raise BundleError(f"bundle {self.path}: golden {i} has {counts} of {graph}; publish it again", "goldens")
            off = np.abs(scores - np.array(expected)).max(initial=0)
            if not off <= allowed:
                raise BundleError(f"bundle {self.path}: golden {i} is off by {off:.2g}, {allowed} is allowed; publish it again", "goldens")


def new_version() -> int:
    """A version for a bundle made now: UTC time as yyyymmddhhmmss."""
    return int(datetime.now(UTC).strftime("%Y%m%d%H%M%S"))


def check_name(name: str) -> str:
    """The name itself.

    Raises:
        BundleError: it could not be a folder of the repository.
    """
    if not NAME.fullmatch(name):
        raise BundleError(f"{name!r} is not a model name: up to 64 of a-z, 0-9, - and _, starting with a letter or digit")
    return name


def check_publishable(models: Path, name: str) -> None:
    """See that a model can be published, before hours are spent on it. Makes nothing.

    Raises:
        BundleError: the repository, or where it is to be made, is not a folder that this user may write.
    """
    there = models / check_name(name)
    try:
        while not there.exists() and there != there.parent:
            there = there.parent
        can = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    except OSError:
        can = False
    if not can:
        raise BundleError(f"cannot publish {name} in {models}: {there} is not a folder that may be written; name another with --models")


def publish(models: Path, name: str, contents: Mapping[str, Contents], facts: Mapping[str, Any], make_current: bool = True) -> Path:
    """Write files, by their names, as a new version, by one rename, so that a reader sees all or none; and make it current, if so told.

    `facts` join the manifest. The schema and the vocabularies among the files give the fingerprint.

    Raises:
        BundleError: the repository cannot be written; nothing of the bundle is left behind.
    """
    home = models / check_name(name)
    try:
        home.mkdir(parents=True, exist_ok=True)
        with _staging(home) as staged:
            for file, data in contents.items():
                if (size := memoryview(data).nbytes) > MOST_BYTES:
                    raise BundleError(f"{file} has {size:,} bytes, and a bundle's file at most {MOST_BYTES:,}; nothing was published")
                _write(staged / file, data)
            schema = parse_schema(str(contents[SCHEMA], "utf-8"))
            print_ = fingerprint(schema, parse_vocabularies(str(contents[VOCABULARIES], "utf-8"), schema))
            documents = {
                "fingerprint": print_,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                **facts,
                "graphs": _graphs(contents),
                "files": {file: hashlib.sha256(data).hexdigest() for file, data in contents.items()},
            }
            with locked(home):
                version = _free_version(home)
                manifest = {"name": name, "version": version, **documents}
                _write(staged / MANIFEST, json.dumps(manifest, indent=1).encode())
                files.sync(staged)
                staged.rename(home / str(version))
                if make_current:
                    _make_current(home, version)
    except OSError as error:
        raise BundleError(f"cannot publish {name} in {models}: {error.strerror or error}; nothing was published") from error
    return home / str(version)


def _graphs(contents: Mapping[str, Contents]) -> dict[str, dict[str, int]]:
    """Format and opset of each graph; what is no graph is found out by whoever loads it."""
    documents = {}
    for file, data in contents.items():
        if file.endswith(".onnx"):
            with contextlib.suppress(GraphFileError):
                facts = graph_facts(data)
                documents[file] = {"ir": facts.ir, "opset": facts.opset}
    return documents


def _make_current(home: Path, version: int) -> None:
    try:
        release(home, version, released(home))
    except OSError:
        shutil.rmtree(home / str(version), ignore_errors=True)
        raise


@contextlib.contextmanager
def _staging(home: Path) -> Iterator[Path]:
    """A folder to write a version into. It is locked, so that one whose publisher was killed can be told by its lock."""
    with locked(home):
        _clear_abandoned(home)
        staging = Path(tempfile.mkdtemp(prefix=STAGING, dir=home))
        handle = os.open(staging, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        staged = staging / "bundle"
        staged.mkdir()
        yield staged
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        os.close(handle)


def clear_abandoned(models: Path, name: str) -> None:
    """Remove what publishers of a model that were killed have left.

    Raises:
        BundleError: the repository cannot be written.
    """
    home = models / check_name(name)
    try:
        with locked(home):
            _clear_abandoned(home)
    except OSError as error:
        raise BundleError(f"cannot write to {home}: {error.strerror or error}") from error


def _clear_abandoned(home: Path) -> None:
    for left in home.glob(".*-*"):
        if left.is_file():  # of `replace_file`, which is used only while `locked`
            left.unlink(missing_ok=True)
    for staging in home.glob(f"{STAGING}*"):
        try:
            handle = os.open(staging, os.O_RDONLY)
        except FileNotFoundError:  # its publisher has just finished
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(staging, ignore_errors=True)
        except BlockingIOError:  # its publisher is at work
            pass
        finally:
            os.close(handle)


def _free_version(home: Path) -> int:
    version = new_version()
    while (home / str(version)).exists():
        version += 1
    return version


def _write(path: Path, data: Contents) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def locked(home: Path) -> Iterator[None]:
    """Hold a model's lock: of those that change which version is live, one at a time.

    Raises:
        OSError: it cannot be made, or another process has held it for `files.LOCK_SECONDS`.
    """
    with files.exclusive(home / LOCK):
        yield


def replace_file(path: Path, data: bytes) -> None:
    """Write a file of a model whole or not at all, by one rename. Only while `locked`."""
    staged = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        _write(staged, data)
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it is there; only a power cut could still undo it
        files.sync(path.parent)


def release(home: Path, version: int, before: Sequence[int]) -> None:
    """Make a version the live one, `before` the versions to go back to, the last one first. Only while `locked`."""
    replace_file(home / CURRENT, f"{version}\n".encode())
    lines = [json.dumps({"version": each}) for each in (*before, version)]
    # `current` alone says what is live, and `released` makes up for a list that was not written after it.
    with contextlib.suppress(OSError):
        replace_file(home / RELEASES, "".join(f"{line}\n" for line in lines[-RELEASES_KEPT:]).encode())


def released(home: Path) -> list[int]:
    """The versions that were live one after the other and were not rolled back, the one that is live now last, if there is one."""
    versions = []
    with contextlib.suppress(OSError):
        for line in files.read(home / RELEASES).splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a crash cut it short
                versions.append(int(json.loads(line)["version"]))
    try:
        live = int(files.read(home / CURRENT, MOST_CURRENT_BYTES).decode("ascii"))
    except (OSError, ValueError):
        return versions
    while versions and live in versions and versions[-1] != live:
        versions.pop()
    return versions if live in versions else [*versions, live]


def current_path(models: Path, name: str) -> Path:
    """Folder of the live version.

    Raises:
        BundleError: there is none.
    """
    path = models / check_name(name) / CURRENT
    try:
        version = int(files.read(path, MOST_CURRENT_BYTES).decode("ascii"))
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} does not name a version: {error}; name one with adrank promote --version", "no_version") from error
    return models / name / str(version)


def read_manifest(path: Path) -> dict[str, Any]:
    """What a bundle says of itself, unchecked.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON, or no object.
    """
    manifest = json.loads(files.read(path / MANIFEST, MOST_MANIFEST_BYTES))
    if not isinstance(manifest, dict):
        raise ValueError(f"{MANIFEST} is no object")
    return manifest


def load_bundle(path: Path) -> Bundle:
    """Read a bundle and check it: every digest, then that its fingerprint is what this code makes of it.

    Raises:
        BundleError: it is not whole, was changed, or was made by other feature code.
    """
    return read_bundle(path, check_files(path))


def check_files(path: Path, notes: Path | None = None) -> dict[str, Any]:
    """The manifest of a bundle whose files are those that it lists. `notes`: see `files.digest`.

    Raises:
        BundleError: it is not whole, or was changed.
    """
    try:
        manifest = read_manifest(path)
        called(path, manifest)
        for file in dict(manifest["files"]):
            _check_file(path, file, manifest["files"], notes)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _unreadable(path, error) from error
    return manifest


def _check_file(path: Path, file: str, digests: Mapping[str, str], notes: Path | None = None) -> None:
    if Path(file).name != file or _digest(path, file, digests, notes) != digests[file]:
        what = f"{file} is not what was published (its digest differs)"
        raise BundleError(f"bundle {path}: {what}; copy it again or publish it again", "damaged")


def called(path: Path, manifest: Mapping[str, Any]) -> tuple[str, int]:
    """The name and version of a bundle: those of its folders, or those that it was published as where it lies somewhere else.

    Raises:
        KeyError, ValueError, TypeError: it lies somewhere else, and the manifest does not tell.
    """
    place = Path(os.path.abspath(path))  # noqa: PTH100  # links are what they are called, not what they lead to
    if place.name.isascii() and place.name.isdecimal() and NAME.fullmatch(place.parent.name):
        return place.parent.name, int(place.name)
    return str(manifest["name"]), int(manifest["version"])


def _digest(path: Path, file: str, listed: Collection[str], notes: Path | None) -> str:
    """The digest of a file; for a graph, once it is sure that all of its weights lie in files with a digest."""
    if not file.endswith(".onnx"):
        return files.digest(path / file, MOST_BYTES, notes)
    data = files.read(path / file, MOST_GRAPH_BYTES)
    with contextlib.suppress(GraphFileError):  # whoever loads it finds that out
        beside = graph_facts(data).external
        if outside := sorted(beside - set(listed)):
            what = f"{file} has weights in {', '.join(outside[:3])}, which no digest of {MANIFEST} covers"
            raise BundleError(f"bundle {path}: {what}; publish it with its weights inside, or list that file", "external_data")
        if led := sorted(each for each in beside if not (path / each).resolve().is_relative_to(path.resolve())):
            what = f"{file} has weights in {led[0]}, which is a link to a file outside of the bundle"
            raise BundleError(f"bundle {path}: {what}; put the file itself there", "external_data")
    return hashlib.sha256(data).hexdigest()


def read_bundle(path: Path, manifest: Mapping[str, Any], others: Collection[Bundle] = ()) -> Bundle:
    """The bundle whose files have been checked. What its vocabularies have in common with those of the others is in memory once.

    Raises:
        BundleError: it lacks a file or has no goldens, or was made by other feature code.
    """
    digests = manifest["files"]
    if lacks := sorted(REQUIRED - set(digests)):
        raise BundleError(f"bundle {path}: {MANIFEST} does not list all of its files: it lacks {', '.join(lacks)}", "incomplete")
    same = [each for each in others if all(each.manifest["files"][file] == digests[file] for file in (SCHEMA, VOCABULARIES))]
    try:
        schema = parse_schema(files.read(path / SCHEMA, MOST_MANIFEST_BYTES).decode())
        text = "" if same else files.read(path / VOCABULARIES, MOST_BYTES).decode()
        vocabularies = same[0].vocabularies if same else parse_vocabularies(text, schema, [each.vocabularies for each in others])
        ours, theirs = same[0].fingerprint if same else fingerprint(schema, vocabularies), manifest.get("fingerprint")
    except (OSError, ValueError, TypeError, SchemaError) as error:
        raise _unreadable(path, error) from error
    if theirs != ours:
        fix = "train it again with this version"
        raise BundleError(f"bundle {path}: made with feature contract {theirs}, this program has {ours}; {fix}", "other_contract")
    bundle = Bundle(path, *called(path, manifest), ours, schema, vocabularies, manifest)
    _ = bundle.goldens
    return bundle


def _unreadable(path: Path, error: Exception) -> BundleError:
    if isinstance(error, FileNotFoundError | NotADirectoryError) and error.filename == str(path / MANIFEST):
        return BundleError(_no_bundle(path), "missing")
    code = "missing" if isinstance(error, FileNotFoundError) else "not_a_file" if isinstance(error, files.NotAFileError) else "unreadable"
    return BundleError(f"bundle {path} cannot be read: {error if isinstance(error, OSError) else repr(error)}", code)


def _no_bundle(path: Path) -> str:
    """What a folder without a manifest is, and what may have been meant."""
    said = f"bundle {path} cannot be read: there is no {MANIFEST}"
    with contextlib.suppress(OSError, BundleError):
        if path.name == CURRENT and path.is_file():
            name = path.parent.name
            return f"{path} says which version of {name} is live, it is none; name {current_path(path.parent.parent, name)}"
        if (path / CURRENT).exists():
            return f"{path} is a model, not one of its versions; its live one is {current_path(path.parent, path.name)}"
        if path.is_dir() and (there := version_numbers(path)):
            return f"{path} is a model, not one of its versions, and none is live; there are {_some(there)}: name {path / str(there[-1])}"
        if there := version_numbers(path.parent):
            return f"{path.parent.name} has no version {path.name}; there are {_some(there)}; adrank models lists them"
        if path.is_dir() and (names := model_names(path)):
            return f"{path} is a model repository, not a bundle; name a version, such as {current_path(path, names[0])}"
    return f"{said}; a bundle is a version's folder, such as models/din/20261122101500; adrank models lists them"


def _some(versions: Sequence[int]) -> str:
    shown = ", ".join(map(str, versions[-5:]))
    return shown if len(versions) <= 5 else f"{len(versions)}, the newest {shown}"


def version_numbers(home: Path) -> list[int]:
    """The versions of a model that are in the repository, the newest last.

    Raises:
        OSError: there is no such folder, or it cannot be read.
    """
    return sorted(int(path.name) for path in home.iterdir() if path.name.isascii() and path.name.isdecimal() and path.is_dir())


def goldens_json(goldens: Sequence[Golden]) -> bytes:
    """The goldens as the contents of `goldens.json`."""
    rows = [{name: value for name, value in asdict(golden).items() if value or name not in TIMES} for golden in goldens]
    return json.dumps(rows, ensure_ascii=False).encode()
