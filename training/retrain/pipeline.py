"""One retraining: a window of the log is checked and trained on, and the challenger goes live if it stands up to the live version.

Every run ends in a report. Only one run of a model is at work at a time; one that was interrupted leaves nothing behind.
"""

import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
from rich.progress import Progress

from features.bundle import MODEL, Bundle, check_name, clear_abandoned, current_path, load_bundle, publish
from features.errors import AdrankError
from features.repository import CURRENT
from features.vocabulary import Vocabulary

from ..datasets.log import end_of, is_log, open_log
from ..datasets.memory import Memory
from ..datasets.prepared import SPLITS, Prepared, open_prepared
from ..export.export import METRICS, check_asked, contents
from ..join.attribution import Attribution
from ..networks import NETWORKS
from ..report.files import PAGE as DRAWN
from ..report.files import tell_verdict
from ..train import Start, train
from ..train_settings import TrainSettings, overridden
from ..weights import sampling_of, settings_of, start_of
from . import compare, data_checks, gate
from .report import DONE, Report, brief

DAY = 86_400
REPORTS, LOCK = "reports", ".retrain.lock"
FACTS = "retrain"


class RetrainError(AdrankError, ValueError):
    """A retraining cannot be as asked for; the message says why."""


@dataclass(frozen=True)
class RetrainRequest:
    """What is to be retrained, on what, and how. Times are in seconds since 1970."""

    log: Path
    models: Path
    name: str
    since: int | None = None
    until: int | None = None
    days: int | None = None
    holdout: float = 0.1
    valid: float = 0.1
    """Shares of the rows: the newest is held out, the one before it stops the training and calibrates."""
    position_as: str | None = None
    attribution: Attribution | None = None
    """Default: that with which the log was written."""
    network: str | None = None
    """Default: the live version's, or else the model's name."""
    start: str = "warm"
    report: Path | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    """As texts: of training, of the network, of `data_checks.Limits` and of `compare.Gate`."""
    memory: Memory = field(default_factory=Memory)

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.start not in ("warm", "scratch"):
            raise RetrainError(f"--start {self.start}: it must be warm or scratch")
        if not (0 < self.holdout < 1 and 0 < self.valid < 1 and self.holdout + self.valid < 1):
            raise RetrainError(f"--holdout {self.holdout:g} and --valid {self.valid:g} are shares of the rows: above 0, together below 1")
        if self.days is not None and self.since is not None:
            raise RetrainError("--days and --since both say where the window begins; leave one out")
        if self.since is not None and self.until is not None and self.since >= self.until:
            raise RetrainError(f"the window is empty: --since {self.since} is not before --until {self.until}")

    @property
    def home(self) -> Path:
        """The model's folder."""
        return self.models / self.name


@dataclass(frozen=True)
class RetrainPlan:
    """An order, settled: what it starts from, with which settings."""

    champion: Bundle | None
    start: Start | None
    family: str
    network: Any
    loop: TrainSettings
    limits: data_checks.Limits
    gate: compare.Gate

    def as_dict(self) -> dict[str, Any]:
        """For the report and the manifest."""
        start = "scratch" if self.start is None else "warm"
        return {"network": self.family, "start": start, "seed": self.loop.seed}


def retrain(order: RetrainRequest, progress: Progress) -> Report:
    """Check, train, compare, and publish or refuse; the report, which has been written.

    Raises:
        RetrainError: the order is impossible, another run is at work, or the live version changed meanwhile.
        BundleError, DataError, TrainError, ReportError: as their makers say.
    """
    with _alone(order):
        clear_abandoned(order.models, order.name)
        _clear_reports(order)
        started = int(time.time())
        data, before = open_window(order)
        data = replace(data, memory=order.memory)
        plan = _plan(order, data)
        seen, past = data_checks.profile(data, data_checks.slices(data)), _past(data, before, plan.champion)
        version = plan.champion.version if plan.champion else None
        reasons = data_checks.violations(seen, past, plan.limits)
        report = Report(order.name, started, None, version, reasons, plan.as_dict(), seen, past, plan.limits, plan.gate)
        if not reasons:
            report = _challenge(order, plan, data, report, progress)
        report.write(order.report or _report_folder(order, started))
        return report


def _challenge(order: RetrainRequest, plan: RetrainPlan, data: Prepared, report: Report, progress: Progress) -> Report:
    trained = train(data, plan.family, plan.network, plan.loop, progress, plan.start)
    files, facts = contents(data, trained, progress)
    found = gate.compared(plan.champion, data, trained, files[MODEL], progress)
    reasons = [*gate.diverged(trained.epochs), *gate.against(found, trained, plan.gate)]
    training = {**report.training, "settings": trained.settings, "epochs": [epoch.line() for epoch in trained.epochs]}
    training["calibration"] = "; ".join(each.line(head) for head, each in trained.calibrations.items())
    training |= {f"ids of {name}": line for name, line in trained.tenure.counts.items()}
    report = replace(report, reasons=reasons, training=training, comparison=found, warnings=_warnings(order, plan, data))
    verdict = f"Refused: {order.name} stays as it is" if reasons else f"Made live, in place of {report.champion or 'no version'}"
    tell_verdict(files, verdict, not reasons, reasons)
    if reasons:
        return replace(report, trained_page=bytes(files.get(DRAWN, b"")).decode())
    if (now := _live(order)) != report.champion:
        raise RetrainError(f"the live version of {order.name} was {report.champion} and is {now} now: the comparison is void; run it again")
    seen = {**report.window.as_dict(), "held_out_from": data.held_out_from}
    facts[FACTS] = {**plan.as_dict(), "champion": report.champion, "window": seen, "comparison": brief(found)}
    return replace(report, published=int(publish(order.models, order.name, files, facts).name))


def open_window(order: RetrainRequest) -> tuple[Prepared, Iterable[pl.DataFrame]]:
    """The window, in slices of time, and the rows of a window as long just before it, none where the log does not say.

    A prepared data set in place of a log is taken as it is.

    Raises:
        DataError: there is no such log, or no row in the window.
        RetrainError: a prepared data set has no window to choose.
    """
    if not is_log(order.log):
        if any(given is not None for given in (order.since, order.until, order.days, order.position_as)):
            raise RetrainError(f"{order.log} is not a log, so it has no window: leave out --since, --until, --days and --position-as")
        return open_prepared(order.log), ()
    until = order.until
    since = order.since
    if order.days is not None:
        until = end_of(order.log) if until is None else until
        since = until - order.days * DAY
    shares = (1 - order.holdout - order.valid, order.valid, order.holdout)
    if since is None:
        return open_log(order.log, since, until, shares, order.position_as, order.attribution), ()
    begin = min(since, 2 * since - (end_of(order.log) if until is None else until))
    both = open_log(order.log, begin, until, position_as=order.position_as, settings=order.attribution)
    return both.cut(since, until, shares), both.between(begin, since)


def _plan(order: RetrainRequest, data: Prepared) -> RetrainPlan:
    champion = load_bundle(current_path(order.models, order.name)) if (order.home / CURRENT).exists() else None
    if champion and METRICS not in champion.files:
        raise RetrainError(f"the live version {champion.path} has no {METRICS}, so nothing can be compared with it; adrank train makes one")
    family = order.network or (champion.manifest.get("network") if champion else order.name)
    if family not in NETWORKS:
        raise RetrainError(f"there is no network {family!r}; name one with --model: {', '.join(NETWORKS)}")
    same = champion if champion and champion.manifest.get("network") == family else None
    base = settings_of(same) if same else (NETWORKS[family].settings(), TrainSettings())
    network, loop, limits, gate = overridden(order.settings, *base, data_checks.Limits(), compare.Gate())
    check_asked(family, loop, data.schema)
    warm = champion is not None and order.start == "warm"
    if warm and (changed := [f.name for f in fields(network) if same is None or getattr(network, f.name) != getattr(base[0], f.name)]):
        what = f"--set {changed[0]}" if same else f"--model {family}"
        raise RetrainError(f"{what}: a warm start goes on with the live version's network as it is; leave it out, or use --start scratch")
    if warm and champion and champion.schema.canonical() != data.schema.canonical():
        raise RetrainError(
            f"the fields of {order.log / 'schema.toml'} are not those of the live version {champion.path}, "
            "so its weights do not fit; use --start scratch"
        )
    return RetrainPlan(champion, start_of(champion) if warm and champion else None, family, network, loop, limits, gate)


def _past(data: Prepared, before: Iterable[pl.DataFrame], champion: Bundle | None) -> data_checks.PastLog:
    earlier = data_checks.profile(data, {"before": before})
    varied = {path: seen.varied for path, seen in earlier.fields.items()} if earlier.total else {}
    rate = None
    if champion is not None:
        seen_before = champion.manifest.get(FACTS, {}).get("window", {}).get("fields")
        varied |= {path: bool(seen["varied"]) for path, seen in seen_before.items()} if seen_before else _varied(champion)
        measured = json.loads((champion.path / METRICS).read_text("utf-8"))
        clicks, rows = (sum(measured[split][what] for split in SPLITS if split in measured) for what in ("clicks", "rows"))
        rate = data_checks.click_rate(clicks, rows, sampling_of(champion))
    return data_checks.PastLog(earlier.total or None, rate, varied)


def _varied(champion: Bundle) -> dict[str, bool]:
    """Which fields varied in a training that did not note it: those whose vocabulary, theirs alone, has several values."""
    users = [each.vocabulary for each in champion.schema.fields]
    sizes = {name: len(v.values) for name, v in champion.vocabularies.categories.items() if isinstance(v, Vocabulary)}
    alone = [each for each in champion.schema.fields if each.vocabulary in sizes and users.count(each.vocabulary) == 1]
    return {each.path: sizes[each.vocabulary] > 1 for each in alone}


def _warnings(order: RetrainRequest, plan: RetrainPlan, data: Prepared) -> list[str]:
    if plan.champion is None:
        return ["there was no live version to compare with"]
    warnings = []
    rows, served = 0, 0
    for frame in data_checks.slices(data, ("test",))["test"]:
        rows += len(frame)
        if {"model", "version"} <= set(frame.columns):
            served += len(frame.filter(pl.col("model") == order.name, pl.col("version") == plan.champion.version))
    if served:
        warnings.append(
            f"{served / rows:.0%} of the rows that were held out were served by the live version, which chose what was shown: "
            "of ads that it would not have shown, they tell nothing (selection bias)"
        )
    trained_until = plan.champion.manifest.get(FACTS, {}).get("window", {}).get("held_out_from")
    begin = data.held_out_from
    if trained_until is not None and begin is not None and begin < trained_until:
        moments = (f"{datetime.fromtimestamp(ts, UTC):%Y-%m-%d %H:%M:%S} UTC" for ts in (trained_until, begin))
        warnings.append("the live version was trained on rows up to {}, and the held-out rows begin at {}: it knows some".format(*moments))
    return warnings


def _live(order: RetrainRequest) -> int | None:
    return int(current_path(order.models, order.name).name) if (order.home / CURRENT).exists() else None


def _clear_reports(order: RetrainRequest) -> None:
    """Remove reports that were not finished."""
    for folder in (order.home / REPORTS).glob("[0-9]*"):
        if not (folder / DONE).exists():
            shutil.rmtree(folder, ignore_errors=True)


def _report_folder(order: RetrainRequest, started: int) -> Path:
    """A new folder, named by the time."""
    version = int(f"{datetime.fromtimestamp(started, UTC):%Y%m%d%H%M%S}")
    while (folder := order.home / REPORTS / str(version)).exists():
        version += 1
    return folder


@contextmanager
def _alone(order: RetrainRequest) -> Iterator[None]:
    """Hold the model's lock, which the kernel lets go of when this process ends, however it ends."""
    try:
        order.home.mkdir(parents=True, exist_ok=True)
        file = (order.home / LOCK).open("ab+", buffering=0)  # nothing is left over to be written when it is closed
    except OSError as error:
        raise RetrainError(f"cannot write to {order.home}: {error.strerror or error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            by = file.read().decode("utf-8", "replace").strip()
            raise RetrainError(f"{order.name} is being retrained already, by {by}; wait for it, or end it") from error
        try:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC\n".encode())
        except OSError as error:
            raise RetrainError(f"cannot write to {order.home / LOCK}: {error.strerror or error}") from error
        yield
