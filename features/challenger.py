"""A version that challenges the live one: the file `models/<name>/challenger`, which services follow, and the decision beside it."""

import contextlib
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

import orjson

from . import files
from .bundle import BundleError, check_name, load_bundle, locked, released, replace_file

CHALLENGER, VERDICT = "challenger", "challenger.verdict"
MOST_BYTES = 65_536
Mode = Literal["shadow", "canary"]


@dataclass(frozen=True, slots=True)
class CanaryBounds:
    """What a challenger may do before it is stopped, judged once `min_requests` were scored by it and as many by the live version."""

    error_share: float = 0.01
    """Of its requests, at most."""
    p99_ratio: float = 1.5
    """Its own p99 of scoring a request, against the live version's, at most."""
    p_click_ratio: tuple[float, float] = (0.5, 2.0)
    """Its mean p(click), against the live version's."""
    min_requests: int = 200
    max_seconds: float = 0.25
    """Of one run. A request that waits so long for its canary is ranked by the live version; more such runs than `error_share` stop it."""


@dataclass(frozen=True, slots=True)
class Challenger:
    """A version that scores a share of a model's requests: in `shadow`, where nobody sees it, or as a `canary`, live for some users."""

    version: int
    mode: Mode
    share: float
    bounds: CanaryBounds = field(default_factory=CanaryBounds)
    since: str = field(default_factory=lambda: datetime.now(UTC).isoformat())
    """When it was announced, which tells it from the same version announced again."""

    @property
    def mark(self) -> str:
        """A name for this announcement, which may be one of a file."""
        return hashlib.blake2b(self.since.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()

    def takes(self, name: str, user_id: str) -> bool:
        """Whether the user falls to it: always the same answer, and of a larger share the same users and more."""
        digest = hashlib.blake2b(f"{name}/{self.version}/{user_id}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return int.from_bytes(digest) < self.share * 2**64


@dataclass(frozen=True, slots=True)
class CanaryDecision:
    """Why a challenger was stopped: a word for metrics, and the numbers."""

    reason: Literal["errors", "late", "p99", "p_click"]
    detail: str


def challenge(models: Path, name: str, challenger: Challenger) -> None:
    """Check a version and let it challenge the live one, in place of another that does.

    Raises:
        BundleError: there is no such version, it is damaged, it or none is live, or the repository cannot be written.
    """
    home = models / check_name(name)
    try:
        with locked(home):
            _check(challenger)
            load_bundle(home / str(challenger.version))
            if released(home)[-1:] in ([], [challenger.version]):
                raise BundleError(
                    f"{name} {challenger.version} cannot challenge the live version: {'it' if released(home) else 'none'} is live"
                )
            (home / VERDICT).unlink(missing_ok=True)
            replace_file(home / CHALLENGER, json.dumps(asdict(challenger)).encode())
    except OSError as error:
        raise BundleError(f"cannot write in {home}: {error.strerror or error}; the challenger is as it was") from error


def withdraw(home: Path) -> bool:
    """Let no version challenge the live one; whether one did. Only while `locked`."""
    there = (home / CHALLENGER).exists()
    (home / CHALLENGER).unlink(missing_ok=True)
    (home / VERDICT).unlink(missing_ok=True)
    return there


def read_challenger(home: Path) -> Challenger | None:
    """The challenger of a model, None where there is none.

    Raises:
        BundleError: the file is not one that `challenge` wrote.
    """
    path = home / CHALLENGER
    try:
        document = _document(path)
        if document is None:
            return None
        bounds = document.pop("bounds")
        low, high = bounds.pop("p_click_ratio")
        return _check(Challenger(**document, bounds=CanaryBounds(**bounds, p_click_ratio=(low, high))))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{path} does not name a challenger: {error!r}; announce it again with adrank promote", "challenger") from error


def read_decision(home: Path, challenger: Challenger) -> CanaryDecision | None:
    """Why the challenger was stopped, None while it is not."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        document = _document(home / VERDICT) or {}
        if document.pop("since", None) == challenger.since:
            return CanaryDecision(document["reason"], str(document["detail"]))
    return None


def write_decision(home: Path, challenger: Challenger, decision: CanaryDecision) -> None:
    """Tell all services that the challenger is to be stopped, unless another challenges by now.

    Raises:
        OSError: the repository cannot be written.
    """
    with locked(home), contextlib.suppress(BundleError):
        if read_challenger(home) == challenger:
            replace_file(home / VERDICT, json.dumps({"since": challenger.since, **asdict(decision)}).encode())


def _document(path: Path) -> dict[str, Any] | None:
    try:
        document = orjson.loads(files.read(path, MOST_BYTES))
    except FileNotFoundError:
        return None
    if not isinstance(document, Mapping):
        raise TypeError("it is not an object")
    return dict(document)


def _check(challenger: Challenger) -> Challenger:
    """The challenger itself.

    Raises:
        BundleError: a number is out of its range.
    """
    bounds, (low, high) = challenger.bounds, challenger.bounds.p_click_ratio
    right = {
        "the version is a whole number": type(challenger.version) is int and challenger.version >= 0,
        "the mode is shadow or canary": challenger.mode in get_args(Mode),
        "the share is above 0 and at most 1": 0 < challenger.share <= 1,
        "the share of errors is between 0 and 1": 0 <= bounds.error_share <= 1,
        "the ratio of p99 is above 0": 0 < bounds.p99_ratio < math.inf,
        "the ratios of p(click) are two numbers, the lower first": 0 <= low < high < math.inf,
        "the requests before it is judged are 1 or more": type(bounds.min_requests) is int and bounds.min_requests >= 1,
        "the seconds of a run are above 0 and at most 60": 0 < bounds.max_seconds <= 60,
        "it says since when": isinstance(challenger.since, str),
    }
    wrong = [rule for rule, holds in right.items() if not holds]
    if wrong:
        raise BundleError(f"this is no challenger: {wrong[0]}")
    return challenger
