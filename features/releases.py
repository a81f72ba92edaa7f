"""Which version of a model is live: promote one, roll back to the one before. Running services follow within seconds."""

from collections.abc import Sequence
from pathlib import Path

from .bundle import BundleError, check_name, load_bundle, locked, release, released, version_numbers
from .challenger import withdraw


def versions(models: Path, name: str) -> list[int]:
    """The versions of a model that are in the repository, the newest last.

    Raises:
        BundleError: there is no such model.
    """
    home = models / check_name(name)
    try:
        return version_numbers(home)
    except OSError as error:
        raise BundleError(f"there is no model {name} in {models}: {error.strerror or error}") from error


def promote(models: Path, name: str, version: int | None = None) -> int:
    """Check a version and make it the live one; by default the newest, if that is not live.

    Raises:
        BundleError: there is no such version, it is damaged, or the repository cannot be written.
    """
    home = _home(models, name)
    try:
        with locked(home):
            before = released(home)
            chosen = newest(models, name, before[-1:]) if version is None else version
            load_bundle(home / str(chosen))
            if before[-1:] != [chosen]:
                release(home, chosen, before)
            withdraw(home)
    except OSError as error:
        raise BundleError(f"cannot promote {name} in {models}: {error.strerror or error}; the live version is as it was") from error
    return chosen


def rollback(models: Path, name: str) -> int:
    """Make the version that was live before the live one again; twice goes back two. Versions that are gone or damaged are passed over.

    Raises:
        BundleError: none that was live before is left, or the repository cannot be written.
    """
    home, passed_over = _home(models, name), list[str]()
    try:
        with locked(home):
            _, *before = reversed(released(home) or [0])
            for i, version in enumerate(before, 1):
                try:
                    load_bundle(home / str(version))
                except BundleError as error:
                    passed_over.append(str(error))
                    continue
                release(home, version, list(reversed(before[i:])))
                withdraw(home)
                return version
    except OSError as error:
        raise BundleError(f"cannot roll back {name} in {models}: {error.strerror or error}; the live version is as it was") from error
    why = f" that can be used ({'; '.join(passed_over)})" if passed_over else ""
    raise BundleError(f"no earlier version of {name} in {models} was live before{why}; promote one with --version")


def stop(models: Path, name: str) -> None:
    """Let no version challenge the live one.

    Raises:
        BundleError: none does, or the repository cannot be written.
    """
    home = _home(models, name)
    try:
        with locked(home):
            if not withdraw(home):
                raise BundleError(f"no version of {name} in {models} challenges the live one")
    except OSError as error:
        raise BundleError(f"cannot write in {home}: {error.strerror or error}; the challenger is as it was") from error


def newest(models: Path, name: str, live: Sequence[int]) -> int:
    """The newest version, if it is newer than the live one.

    Raises:
        BundleError: the live version is the newest.
    """
    there = versions(models, name)
    if not there:
        raise BundleError(f"model {name} in {models} has no version; train one")
    if live and there[-1] <= live[0]:
        raise BundleError(f"model {name} in {models} has no version newer than {live[0]}, which is live; name another with --version")
    return there[-1]


def _home(models: Path, name: str) -> Path:
    versions(models, name)  # a lock makes no folder for a name that is not there
    return models / name
