"""`adrank bench`: what a running service does under load, closed loop first, then at a constant rate."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from service.settings import Settings

from .load import LoadError, Target, ask, measure
from .measured import LoadPlan, Measured
from .traffic import bodies, draw

Rate = float | Literal["half"] | None


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked of the service; without a `rate` it is a closed loop alone, `half` is half of what that one reached."""

    target: Target
    candidates: int
    form: str = "ids"
    connections: int = 8
    rate: Rate = None
    seconds: float = 10.0
    warm_up: float = 2.0
    seed: int = 0


def run(settings: Settings, load: Load, quiet: bool = False) -> list[Measured]:
    """Draw requests from the store, and measure; `quiet` shows no progress.

    Raises:
        StoreError: the store does not answer.
        LoadError: the store lacks users or ads, or the service does not rank.
    """
    requests = [load.target.request(body) for body in bodies(draw(settings, load.candidates), load.candidates, load.form, load.seed)]
    check(load.target, requests[0])
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    # Drawn from the generator's own loop, once a second: a thread that draws would delay requests at any time.
    with Progress(*columns, console=Console(stderr=True, quiet=quiet), auto_refresh=False) as progress:
        return loops(load, requests, progress)


def check(target: Target, request: bytes) -> None:
    """Ask once.

    Raises:
        LoadError: the service refuses the request, with the reason that it gives.
    """
    status, body = ask(target, request)
    if status != 200:
        try:
            detail = json.loads(body)["detail"]
        except (ValueError, KeyError, TypeError):
            detail = body[:200].decode("utf-8", "replace")
        raise LoadError(f"the service at {target.host} port {target.port} answers with status {status}: {detail}")


def loops(load: Load, requests: Sequence[bytes], progress: Progress) -> list[Measured]:
    """The closed loop, unless a number is asked for as the rate, and the open one, if a rate is asked for."""
    measured = []
    rate = load.rate
    if rate is None or rate == "half":
        plan = LoadPlan(None, load.seconds, load.warm_up, load.connections)
        measured.append(measure(load.target, requests, plan, _ticker(progress, "closed loop", plan)))
        rate = measured[0].requests_per_second / 2 if rate == "half" else None
    if rate and not any(m.interrupted for m in measured):
        plan = LoadPlan(rate, load.seconds, load.warm_up, load.connections)
        measured.append(measure(load.target, requests, plan, _ticker(progress, f"open loop, {rate:,.0f} a second", plan)))
    return measured


def _ticker(progress: Progress, what: str, plan: LoadPlan) -> Callable[[float], None]:
    task = progress.add_task(what, total=plan.warm_up + plan.seconds)

    def tick(seconds: float) -> None:
        progress.update(task, completed=seconds, refresh=True)

    return tick


def as_dict(load: Load, measured: Sequence[Measured]) -> dict[str, Any]:
    """As plain values."""
    loops = [{**m.as_dict(), "candidates_per_s": round(m.requests_per_second * load.candidates)} for m in measured]
    return {"candidates": load.candidates, "form": load.form, "seed": load.seed, "loops": loops}


def show(load: Load, measured: Sequence[Measured], console: Console) -> None:
    """A table, and below it what the reader must not miss."""
    table = Table("", *(m.as_dict()["loop"] for m in measured), title=f"{load.candidates} candidates, {load.connections} connections")
    columns = [_figures(load, m) for m in measured]
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    console.print(table)
    for m in measured:
        for remark in _remarks(m):
            console.print(f"{m.as_dict()['loop']} loop: {remark}")


def _figures(load: Load, measured: Measured) -> dict[str, str]:
    values = measured.as_dict()
    times = {f"{name}, ms": f"{values[key]:.2f}" for name, key in (("p50", "p50_ms"), ("p90", "p90_ms"), ("p99", "p99_ms"))}
    return {
        "asked a second": "as many as are answered" if measured.plan.rate is None else f"{measured.plan.rate:,.0f}",
        "answered a second": f"{measured.requests_per_second:,.0f}",
        "candidates a second": f"{measured.requests_per_second * load.candidates:,.0f}",
        **times,
        "p99.9, ms": f"{values['p99.9_ms']:.2f}",
        "longest, ms": f"{values['max_ms']:.2f}",
        "errors": str(measured.errors),
        "degraded": str(measured.degraded),
    }


def _remarks(measured: Measured) -> list[str]:
    values, remarks = measured.as_dict(), []
    if measured.interrupted:
        remarks.append("interrupted; these are the figures until then.")
    if measured.late:
        late = f"the generator was late itself, by {values['delay_p99_ms']} ms at p99"
        remarks.append(f"{late}: the latencies are partly its own. Give it a processor.")
    if measured.errors:
        parts = [f"{count} x {status}" for status, count in sorted(measured.statuses.items()) if status != "200"]
        parts += [f"{count} {what}" for what, count in (("broken off", measured.broken), ("unanswered", measured.unanswered)) if count]
        remarks.append(f"not ranked: {', '.join(parts)}; the percentiles are of those that were ranked or not answered at all.")
    return remarks


def write(document: object, target: Path | None) -> None:
    """JSON to a file, or to standard output for `-`.

    Raises:
        LoadError: the file cannot be written.
    """
    if target is None:
        return
    text = json.dumps(document, indent=1) + "\n"
    if str(target) == "-":
        sys.stdout.write(text)
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    except OSError as error:
        raise LoadError(f"cannot write {target}: {error.strerror}") from error
