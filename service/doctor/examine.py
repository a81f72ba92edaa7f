"""All checks, one after the other; a check that cannot be made says why."""

from collections.abc import Callable, Mapping
from pathlib import Path
from time import time
from typing import Any

from features.memory import CGROUP, Room

from .configured import check_settings
from .finding import Finding
from .machine import check_provider, check_resources
from .port import check_port
from .repository import Repository
from .store import check_store


def examine(flags: Mapping[str, Any], cgroup: Path = CGROUP, clock: Callable[[], float] = time) -> list[Finding]:
    """What is found with these flags, in the order of areas. Blocks for some seconds."""
    settings, impossible, findings = check_settings(flags)
    provider = list(check_provider(settings))
    if any(finding.status == "problem" for finding in provider):  # the models may be good all the same
        settings = settings.model_copy(update={"device": "cpu"})
    skip = "ADRANK_REDIS is impossible, so there is no store to ask" if "redis" in impossible else None
    store, ads = check_store(settings, skip, clock)
    repository = Repository(settings, Room(cgroup))
    findings += [finding for finding in store if finding.area == "store"]
    findings += [*repository.check(), *provider, *check_resources(settings, repository.weight, ads, cgroup)]
    findings += [finding for finding in store if finding.area == "clock"]
    return [*findings, check_port(settings)]
