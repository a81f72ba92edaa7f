"""What a repository has, for people: every model with its versions, which is live, what challenges it, and how it did in training."""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import files
from .bundle import BundleError, current_path, read_manifest, version_numbers
from .challenger import read_challenger, read_decision
from .repository import NAME

METRICS = "metrics.json"
TOLD = ("auc", "log_loss", "calibration_ratio")
"""Of the test split."""


@dataclass(frozen=True, slots=True)
class Listed:
    """A version, as far as it tells of itself: nothing is checked. `role` is live, shadow, canary, stopped (a challenger), or nothing."""

    name: str
    version: int
    role: str
    network: str | None
    created: str | None
    """UTC."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    wrong: str | None = None
    """Why it cannot be read."""


@dataclass(frozen=True, slots=True)
class Listing:
    """All versions, by name, the newest first; and what is wrong with models as such, by name."""

    versions: list[Listed]
    wrong: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {"versions": [asdict(each) for each in self.versions], "wrong": dict(self.wrong)}


def list_models(models: Path) -> Listing:
    """What a repository has.

    Raises:
        BundleError: it is not there, or cannot be read.
    """
    versions, wrong = list[Listed](), dict[str, str]()
    try:
        homes = sorted(models.iterdir())
    except OSError as error:
        why = f"there is no model repository {models}: {error.strerror or error}"
        raise BundleError(f"{why}; train a model into it, or name another with --models") from error
    for home in homes:
        if NAME.fullmatch(home.name) and (home.is_dir() or not home.is_file()):
            try:
                versions += _versions(models, home, wrong)
            except OSError as error:
                wrong[home.name] = f"it cannot be read: {error.strerror or error}"
    return Listing(versions, wrong)


def _versions(models: Path, home: Path, wrong: dict[str, str]) -> list[Listed]:
    there, roles = version_numbers(home), dict[int, str]()
    try:
        if (home / "current").exists() or (home / "current").is_symlink():
            roles[int(current_path(models, home.name).name)] = "live"
        if challenger := read_challenger(home):
            role = "stopped" if read_decision(home, challenger) else f"{challenger.mode} {challenger.share:.3g}"
            roles.setdefault(challenger.version, role)
    except BundleError as error:
        wrong[home.name] = str(error)
    for gone in roles.keys() - set(there):
        wrong[home.name] = f"version {gone} is {roles[gone]}, and not there; promote another with adrank promote --version"
    return [_listed(home, version, roles.get(version, "")) for version in reversed(there)]


def _listed(home: Path, version: int, role: str) -> Listed:
    path = home / str(version)
    try:
        manifest = read_manifest(path)
    except (OSError, ValueError, RecursionError) as error:
        return Listed(home.name, version, role, None, None, wrong=f"its manifest cannot be read: {error}")
    network = manifest.get("network")
    return Listed(home.name, version, role, None if network is None else str(network), _created(manifest), _metrics(path))


def _created(manifest: Mapping[str, Any]) -> str | None:
    return created if isinstance(created := manifest.get("created"), str) else None


def _metrics(path: Path) -> dict[str, float]:
    with contextlib.suppress(OSError, ValueError, RecursionError, AttributeError):
        test = json.loads(files.read(path / METRICS)).get("test", {})
        return {key: float(test[key]) for key in TOLD if isinstance(test.get(key), int | float)}
    return {}


def table(listing: Listing) -> str:
    """Aligned lines, as wide as they need to be, so that nothing is cut; what is wrong comes after."""
    heads = ("model", "version", "role", "network", "created", "AUC", "log loss", "p(click) / clicks")
    rows = [heads, *(_row(each) for each in listing.versions)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [f"{each.name} {each.version}: {each.wrong}" for each in listing.versions if each.wrong]
    lines += [f"{name}: {why}" for name, why in listing.wrong.items()]
    return "\n".join(lines) if listing.versions or listing.wrong else "no model has been published yet; train one with adrank train"


def _row(each: Listed) -> tuple[str, ...]:
    numbers = (f"{each.metrics[key]:.5f}" if key in each.metrics else "-" for key in TOLD)
    return (each.name, str(each.version), each.role or "-", each.network or "-", (each.created or "-")[:19], *numbers)
