"""Settings of training from a TOML file, and those that are known to be good for a data set."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from features.files import read_toml

from .networks import NETWORKS
from .retrain.compare import Gate
from .retrain.data_checks import Enough
from .train_settings import TrainError, TrainSettings

FOLDER = Path(__file__).parent / "settings"
"""A file a data set, by the name in its schema, with a table a network."""


def known(data_set: str) -> Path | None:
    """The file of settings for a data set of that name, None where there is none."""
    return next((path for path in FOLDER.glob("*.toml") if path.stem == data_set), None)


def settings_in(path: Path, family: str) -> dict[str, str]:
    """What a file says for a network, as the texts of `--set`: those entries above all tables that it has, and the table `[family]`.

    Raises:
        TrainError: the file cannot be read, an entry is no setting, or is no text, number, truth value or list of whole numbers.
    """
    document = read_toml(path, TrainError)
    tables = {name: value for name, value in document.items() if isinstance(value, Mapping)}
    usual = {name: value for name, value in document.items() if name not in tables}
    if strange := sorted(set(tables) - set(NETWORKS)):
        raise TrainError(f"{path}: there is no network {strange[0]!r}; there are {', '.join(NETWORKS)}")
    if strange := sorted(set(usual) - {name for each in NETWORKS for name in names_of(each)}):
        raise TrainError(f"{path}: no network and no training has a setting {strange[0]!r}")
    kept = {name: value for name, value in usual.items() if name in names_of(family)}
    return {name: _text(path, name, value) for name, value in {**kept, **tables.get(family, {})}.items()}


def names_of(family: str) -> set[str]:
    """The settings that a training of a network has."""
    return {field.name for kind in (NETWORKS[family].settings, TrainSettings, Gate, Enough) for field in fields(kind)}


def _text(path: Path, name: str, value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list) and value and all(type(each) is int for each in value):
        return "-".join(map(str, value))
    if isinstance(value, str | int | float):
        return str(value)
    raise TrainError(f"{path}: {name} is {value!r}; it must be a text, a number, true, false, or whole numbers such as [400, 400]")
