"""Where a training stands, in a file: one that was killed goes on from there, and ends with the same weights to the last bit.

Knows nothing about networks or epochs: `fit.py` says what a training changes as it runs. No pickle is ever run: torch reads tensors and
plain values alone.
"""

import contextlib
import copy
import hashlib
import json
import os
import pickle
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from features.errors import AdrankError

from .datasets.encoded import Rows

FILE, MINUTES = "checkpoint.pt", 5.0


class CheckpointError(AdrankError, ValueError):
    """A checkpoint cannot be read, written, or gone on from; the message says why."""


class Checkpoint:
    """The checkpoint of one training, written anew every few minutes, and removed by whoever sees the training end well."""

    training: Mapping[str, Any] = {}
    """What the training is of, by `identity`: a checkpoint of another one is refused."""

    def __init__(self, folder: Path, minutes: float = MINUTES, resume: bool = False, ours: bool = False) -> None:
        """In a folder that is made when it is needed, of one training at a time; `resume`: go on from what is there.

        `ours`: nobody has chosen the folder, so it goes with the checkpoint, and the one around it, if there is nothing else in them.

        Raises:
            CheckpointError: nothing is there to go on from.
        """
        self.path, self.seconds, self.resume, self.ours = folder / FILE, 60 * minutes, resume, ours
        self._written = time.monotonic()
        if resume and not self.path.exists():
            raise CheckpointError(f"there is no checkpoint in {folder}; leave out --resume to begin, or say --checkpoint DIR")

    def due(self) -> bool:
        """Whether it is time to write."""
        return time.monotonic() - self._written >= self.seconds

    def write(self, values: Mapping[str, Any], tensors: Sequence[Any]) -> None:
        """Replace the checkpoint, all at once: values for JSON, and whatever holds tensors.

        Raises:
            CheckpointError: it cannot be written; the one of before is as it was.
        """
        part = self.path.with_name(f".{self.path.name}.part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                torch.save({"values": json.dumps({"training": self.training, **values}), "tensors": list(tensors)}, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(self.path)
        except (OSError, RuntimeError) as error:  # torch has an error of its own for what a file refuses
            with contextlib.suppress(OSError):
                part.unlink()
            why = " ".join(str(error.__context__ if isinstance(error.__context__, OSError) else error).split())
            raise CheckpointError(f"{self.path} cannot be written: {why}; make room, or say --checkpoint DIR") from error
        self._written = time.monotonic()

    def read(self) -> tuple[dict[str, Any], list[Any]]:
        """What was written last.

        Raises:
            CheckpointError: it is damaged, or of another training.
        """
        try:
            with zipfile.ZipFile(self.path) as file:
                if damaged := file.testzip():  # torch compares no sums
                    raise zipfile.BadZipFile(f"{damaged} is damaged")
            found = torch.load(self.path, map_location="cpu", weights_only=True)
            values, tensors = json.loads(found["values"]), found["tensors"]
            wrong = _differences(values.pop("training"), json.loads(json.dumps(self.training)))
        except (OSError, zipfile.BadZipFile, RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
            why = " ".join(str(error).split())
            raise CheckpointError(f"{self.path} cannot be gone on from: {why}; train without --resume") from error
        if wrong:
            raise CheckpointError(f"{self.path} is of another training: {', and '.join(wrong)}; train as it was, or without --resume")
        return values, tensors

    def of_rank(self, rank: int, steps: int) -> "Checkpoint":
        """What another process than rank 0 writes, of the rows of tables that it owns, after so many steps; rank 0's says which counts."""
        other = copy.copy(self)
        other.path = self.path.with_name(f"{FILE}.{rank}.{steps}")
        return other

    def only(self) -> None:
        """Remove what the same process wrote before."""
        for old in self.path.parent.glob(f"{self.path.stem}.*"):
            if old != self.path:
                old.unlink()

    def remove(self) -> None:
        """Leave nothing of it behind, nor of folders that are ours; one that a user has chosen stays."""
        for path in (*self.path.parent.glob(f"{FILE}*"), *self.path.parent.glob(f".{FILE}*.part")):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # there is something else in it
            for folder in self.path.parents[:2] if self.ours else ():
                folder.rmdir()


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    if there["network"] != here["network"]:
        return [f"it trains {there['network']}, this one {here['network']}"]
    names = sorted({*there["settings"], *here["settings"]})
    pairs = [(name, there["settings"].get(name), here["settings"].get(name)) for name in names]
    wrong = [f"its {name} is {before}, here it is {now}" for name, before, now in pairs if before != now]
    return wrong + [f"its {what} is another" for what in ("schema", "data") if there[what] != here[what]]


def identity(network: str, settings: Mapping[str, Any], schema: str, splits: Sequence[Rows]) -> dict[str, Any]:
    """What a training is of, for JSON: its network, its settings, and the digests of its schema and of its splits as they are encoded."""
    return {"network": network, "settings": settings, "schema": hashlib.sha256(schema.encode()).hexdigest(), "data": digest_of(splits)}


def digest_of(splits: Sequence[Rows]) -> str:
    """That of splits as they are encoded."""
    data = hashlib.sha256()
    for rows in splits:
        _add(data, rows.mapped.digest if rows.mapped else rows)
    return data.hexdigest()


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, np.ndarray):
        digest.update(f"{value.dtype}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value))
    elif is_dataclass(value):
        _add(digest, tuple(getattr(value, each.name) for each in fields(value)))
    elif isinstance(value, dict | tuple):
        for each in value.items() if isinstance(value, dict) else value:
            _add(digest, each)
    else:
        digest.update(repr(value).encode())


def changing(modules: Sequence[nn.Module]) -> list[dict[str, Tensor]]:
    """All tensors of modules that a step may change, by name: weights and buffers, those too that no bundle has."""
    return [{**dict(module.named_parameters()), **dict(module.named_buffers())} for module in modules]


@torch.no_grad()
def put_back(modules: Sequence[nn.Module], saved: Sequence[Mapping[str, Tensor]]) -> None:
    """Give the modules the tensors that `changing` had of them."""
    for now, before in zip(changing(modules), saved, strict=True):
        for name, value in now.items():
            value.copy_(before[name])
