"""The settings, one by one: those that there are not, those that cannot be, and those that do not go together."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

from ..settings import PREFIX, Settings, unknown_variables, usable_settings
from ..startup_checks import metrics_wrong, models_wrong, tokens_loose, tokens_wrong, traces_wrong
from ..store.url import parse_store_url
from .finding import Finding


def check_settings(flags: Mapping[str, Any]) -> tuple[Settings, frozenset[str], list[Finding]]:
    """The settings with defaults for those that cannot be, the names of these, and what was found."""
    settings, impossible = usable_settings(flags)
    findings = [_problem(name, wrong) for name, wrong in unknown_variables().items()]
    findings += [_problem(PREFIX + name.upper(), wrong, "the checks below take its default") for name, wrong in impossible.items()]
    findings += _together(settings)
    if not findings:
        given = sum(name.upper().startswith(PREFIX) for name in os.environ) + sum(value is not None for value in flags.values())
        findings = [Finding("settings", "values", "ok", f"{given} given by flags and variables, all of them possible")]
    return settings, frozenset(impossible), findings


def _problem(name: str, wrong: str, note: str = "") -> Finding:
    said, _, fix = wrong.partition("; ")
    return Finding("settings", name, "problem", said, "; ".join(filter(None, (fix, note))))


def _together(settings: Settings) -> Iterator[Finding]:
    checks = {"models": models_wrong, "tokens": tokens_wrong, "TMPDIR": metrics_wrong, "traces": traces_wrong}
    for name, check in checks.items():
        if wrong := check(settings):
            yield _problem(name, wrong)
    if loose := tokens_loose(settings):
        said, _, fix = loose.partition("; ")
        yield Finding("settings", "tokens", "warning", said, fix)
    if settings.redis.startswith("memory:"):
        said = "the store is memory://, so users and ads are gone when a process ends, and each worker has its own"
        yield Finding("settings", "redis", "warning", said, "name a Redis with ADRANK_REDIS for anything but a trial")
    if parse_store_url(settings.redis).login.password and "ADRANK_REDIS" not in {name.upper() for name in os.environ}:
        said = "the store's password stands on the command line, where every user of this machine can read it"
        yield Finding("settings", "redis", "warning", said, "put the URL into the variable ADRANK_REDIS")
