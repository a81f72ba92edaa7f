"""The store: whether it is there, is one that adrank can rely on, may be used, and holds what the service needs."""

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from time import time
from typing import Any

from features.state import StoreError
from features.streams import EVENTS, SERVED

from ..settings import Settings
from ..store.check import Looked, Node, Queue, look
from ..store.redis import CHANGES, CHANGES_KEPT
from .finding import Finding, Status

OLDEST = 7
NEARLY_FULL = 0.8
IDLE_SECONDS = 60.0
CLOCK_SECONDS = 1.0
"""Beyond it, what is said about when things happened is off by more than people expect."""
Facts = Mapping[str, Any]


def check_store(settings: Settings, skip: str | None = None, clock: Callable[[], float] = time) -> tuple[list[Finding], int | None]:
    """What was found, the clock included, and how many ads there are, None where that is not known. `skip` says why not to ask."""
    if settings.redis.startswith("memory:"):
        skip = "the store is memory://, there is no server to ask"
    if skip:
        return [_found("server", "skipped", skip), Finding("clock", "store", "skipped", skip)], None
    try:
        looked = asyncio.run(look(settings.redis, clock))
    except (StoreError, ValueError) as error:
        said, _, fix = str(error).partition("; ")
        findings = [_found("server", "problem", f"{settings.store_name}: {said}", fix or "see that it runs and that its URL is right")]
        return [*findings, Finding("clock", "store", "skipped", "the store was not reached, so there is no clock to compare with")], None
    findings = [finding for node in looked.nodes for finding in _server(node)]
    findings += [*_rights(looked), *_contents(looked, settings), *check_clock(looked.nodes, settings.event_ahead_seconds)]
    return findings, looked.ads


def _server(node: Node) -> Iterator[Finding]:
    name = f" {node.name}" if node.name else ""
    if node.facts is None:
        yield _found(f"server{name}", "skipped", "the store's user may not ask INFO, so version, memory and role are unknown")
        return
    for check in (version, role, eviction, memory, persistence):
        finding = check(node.facts)
        yield _found(f"{finding.check}{name}", finding.status, finding.said, finding.fix)


def version(facts: Facts) -> Finding:
    """Redis from 7 on, or Valkey."""
    valkey, compatible = facts.get("valkey_version"), str(facts.get("redis_version", "0"))
    said = f"Valkey {valkey}" if valkey else f"Redis {compatible}"
    major = compatible.partition(".")[0]
    if major.isdecimal() and int(major) >= OLDEST:
        return _found("version", "ok", said)
    return _found("version", "problem", f"{said} is too old", f"adrank needs Redis {OLDEST} or later, or Valkey")


def role(facts: Facts) -> Finding:
    """A primary: a replica takes no writes, and lags."""
    if facts.get("role") == "master":
        return _found("role", "ok", f"primary, {facts.get('connected_slaves', 0)} replica(s)")
    primary = f"{facts.get('master_host')}:{facts.get('master_port')}"
    return _found("role", "problem", f"this server is a replica of {primary}, and takes no writes", "name the primary in ADRANK_REDIS")


def eviction(facts: Facts) -> Finding:
    """`noeviction`: all else takes ads, users or the log away when memory runs out."""
    policy, bounded = str(facts.get("maxmemory_policy", "unknown")), int(facts.get("maxmemory") or 0) > 0
    if policy == "noeviction":
        return _found("eviction", "ok", policy)
    lost = "users" if policy.startswith("volatile") else "users, ads and the log of what was served"
    when = "when memory runs out" if bounded else "as soon as maxmemory is set, which it is not"
    grave: Status = "problem" if bounded and not policy.startswith("volatile") else "warning"
    return _found("eviction", grave, f"maxmemory-policy is {policy}: {lost} vanish {when}", "set maxmemory-policy noeviction")


def memory(facts: Facts) -> Finding:
    """What is used of `maxmemory`."""
    used, most = int(facts.get("used_memory", 0)), int(facts.get("maxmemory") or 0)
    if not most:
        said = f"{_mb(used)} used, and maxmemory is not set"
        return _found("memory", "warning", said, "set it below what the machine has: else the system ends Redis when memory runs out")
    said = f"{_mb(used)} used of {_mb(most)}"
    if used >= NEARLY_FULL * most:
        return _found(
            "memory", "warning", f"{said}, and no write is taken when it is full", "raise maxmemory, or lower ADRANK_USER_TTL_SECONDS"
        )
    return _found("memory", "ok", said)


def persistence(facts: Facts) -> Finding:
    """An append-only file that can be written."""
    if str(facts.get("aof_last_write_status", "ok")) != "ok" or str(facts.get("rdb_last_bgsave_status", "ok")) != "ok":
        return _found(
            "persistence", "problem", "Redis could not write its data to disk the last time", "see its log, and its disk's free space"
        )
    if str(facts.get("aof_enabled", 0)) == "1":
        return _found("persistence", "ok", "appendonly")
    said = "appendonly is off: a restart loses what came after the last snapshot, if there is one"
    return _found("persistence", "warning", said, "set appendonly yes")


def _rights(looked: Looked) -> Iterator[Finding]:
    for part, commands in looked.denied.items():
        grave: Status = "problem" if part == "adrank serve" else "warning"
        fix = "grant it what docs/redis.md lists, with ACL SETUSER"
        yield _found("permissions", grave, f"{part} may not: {', '.join(commands)}", fix)
    if not looked.denied:
        yield _found("permissions", "ok", "all commands that adrank gives")
    if looked.unwritable and all(node.facts is None or node.facts.get("role") == "master" for node in looked.nodes):
        yield _found("writes", "problem", f"nothing can be written: {looked.unwritable}", "free memory or disk of Redis, then writes go on")


def _contents(looked: Looked, settings: Settings) -> Iterator[Finding]:
    if looked.ads is None:
        yield _found("ads", "skipped", "the store's user may not count them")
    elif looked.ads:
        yield _found("ads", "ok", f"{looked.ads:,}")
    else:
        said = "the store has no ads, so every candidate is ranked as an unknown one"
        yield _found("ads", "warning", said, "load them with adrank load or POST /v1/events, or name another database in ADRANK_REDIS")
    if looked.queues is None:
        yield _found("streams", "skipped", "the store's user may not read them")
        return
    yield from stream(SERVED, looked.queues[SERVED], settings.log_kept, "ADRANK_LOG_KEPT")
    yield from stream(EVENTS, looked.queues[EVENTS], settings.events_kept, "ADRANK_EVENTS_KEPT")
    yield _found(CHANGES, "ok", f"{looked.queues[CHANGES].length:,} changes kept, about {CHANGES_KEPT:,} at most")


def stream(name: str, queue: Queue, most: int, setting: str) -> Iterator[Finding]:
    """A stream that the joiner reads: how full it is, and whether somebody reads it."""
    said = f"{queue.length:,} of {most:,} entries" + (f", the oldest {queue.oldest:,.0f} s old" if queue.oldest is not None else "")
    if queue.length >= most:
        yield _found(name, "problem", f"{said}: it is full, and what comes now is not kept", f"run adrank join, or raise {setting}")
    elif queue.length >= NEARLY_FULL * most:
        yield _found(name, "warning", f"{said}: it is nearly full", f"see whether adrank join keeps up, or raise {setting}")
    elif not queue.has_joiner and queue.length:
        yield _found(
            name, "warning", f"{said}, and no joiner has ever read it", "run adrank join, or set ADRANK_LOG_SHARE=0 if nobody trains"
        )
    elif queue.length and queue.idle is not None and queue.idle > IDLE_SECONDS:
        yield _found(name, "warning", f"{said}, and the joiner last read {queue.idle:,.0f} s ago", "see whether adrank join runs")
    else:
        yield _found(name, "ok", said + (", read by a joiner" if queue.has_joiner else ", no joiner yet"))


def check_clock(nodes: Sequence[Node], most: float) -> Iterator[Finding]:
    """Compare this machine's clock with that of each server; events further ahead than `most` seconds are refused."""
    for node in nodes:
        name = f"store {node.name}".strip()
        if node.ahead is None:
            yield Finding("clock", name, "skipped", "the store's user may not ask TIME")
            continue
        off = abs(node.ahead)
        said = f"this machine is {off:,.3f} s {'behind' if node.ahead > 0 else 'ahead of'} the store"
        fix = "let a time service such as chrony keep the clocks of both machines"
        if off > most:
            yield Finding("clock", name, "problem", f"{said}; events further ahead than {most:g} s are refused", fix)
        elif off > CLOCK_SECONDS:
            yield Finding("clock", name, "warning", f"{said}; windows of the joiner are off by as much", fix)
        else:
            yield Finding("clock", name, "ok", said)


def _found(check: str, status: Status, said: str, fix: str = "") -> Finding:
    return Finding("store", check, status, said, fix)


def _mb(count: float) -> str:
    return f"{count / 2**20:,.0f} MB"
