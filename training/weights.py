"""The weights in a bundle, and what else a training needs to go on from it."""

import io
from collections.abc import Collection
from dataclasses import fields, replace
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor, nn

from features.bundle import Bundle, BundleError

from .networks import NETWORKS, build
from .networks.contract import Fields
from .tables import file_of, is_large
from .tenure import IDLE, parse_idle
from .train import Start, heads_of
from .train_settings import TrainError, TrainSettings

WEIGHTS, CALIBRATION = "weights.npz", "calibration.json"


def packed(network: nn.Module, tables: Collection[str] = ()) -> bytes:
    """The weights of a network as an .npz, by the names of its state; of what is in the files `tables`, the file's name."""
    packing, weights = io.BytesIO(), {name: value.numpy() for name, value in network.state_dict().items()}
    for name, value in network.state_dict().items() if tables else ():
        if is_large(value) and (file := file_of(weights[name])) in tables:
            weights[name] = np.array(file)
    np.savez(packing, allow_pickle=False, **weights)
    return packing.getvalue()


def start_of(bundle: Bundle) -> Start:
    """The network of a bundle as it was trained, to go on from.

    Raises:
        BundleError: the bundle has no weights, or they do not fit its network.
    """
    if WEIGHTS not in bundle.files:
        raise BundleError(f"bundle {bundle.path} was published without {WEIGHTS}, so no training can go on from it; use --start scratch")
    try:
        family, (settings, loop) = bundle.manifest["network"], settings_of(bundle)
        network = build(family, Fields.of(bundle.schema, bundle.vocabularies, heads_of(family, loop.heads)), settings)
        with (bundle.path / WEIGHTS).open("rb") as file, np.load(file, allow_pickle=False) as weights:
            state = network.state_dict()
            network.load_state_dict({name: _weights(bundle, weights[name], state.get(name)) for name in weights.files})
        idle = parse_idle((bundle.path / IDLE).read_bytes()) if IDLE in bundle.files else {}
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, BadZipFile) as error:
        raise BundleError(
            f"bundle {bundle.path}: {WEIGHTS} or {IDLE} cannot be used: {' '.join(str(error).split())}; use --start scratch"
        ) from error
    return Start(network.eval(), bundle.vocabularies, sampling_of(bundle), idle=idle)


def _weights(bundle: Bundle, packed: np.ndarray[Any, Any], like: Tensor | None) -> Tensor:
    """What was packed; where that is the name of one of the bundle's files, what is in there."""
    if packed.dtype.kind != "U" or like is None:
        return torch.from_numpy(packed)
    if str(packed) not in bundle.files:
        raise ValueError(f"there is no file {str(packed)[:64]!r}")
    return torch.from_numpy(np.memmap(bundle.path / str(packed), np.float32, "c", shape=tuple(like.shape)))


def sampling_of(bundle: Bundle) -> float:
    """The share of non-clicks in the rows that a bundle was trained on."""
    return float(bundle.manifest.get("negative_sampling", 1.0))


def settings_of(bundle: Bundle) -> tuple[Any, TrainSettings]:
    """The settings that a bundle was trained with, those of the network and those of the loop; threads and workers are the machine's own.

    Raises:
        BundleError: the manifest does not tell them, or tells what this program does not know.
    """
    try:
        settings = {name: tuple(value) if isinstance(value, list) else value for name, value in bundle.manifest["settings"].items()}
        for name in settings.pop("by_data", ()):  # what followed that log's size follows the next one's
            del settings[name]
        kinds: tuple[Any, Any] = (NETWORKS[bundle.manifest["network"]].settings, TrainSettings)
        network, loop = (kind(**{f.name: settings[f.name] for f in fields(kind) if f.name in settings}) for kind in kinds)
    except (KeyError, TypeError, AttributeError, TrainError) as error:
        raise BundleError(f"bundle {bundle.path}: its manifest does not tell how it was trained: {error!r}") from error
    return network, replace(loop, threads=0, workers=1, shard_rows=0)
