"""What the machine gives: the device, processors and their features, memory, open files."""

import resource
from collections.abc import Iterator
from pathlib import Path

from features.memory import CGROUP, Room

from ..errors import DeviceError
from ..ranking.scorer import try_device
from ..settings import Settings, processors
from ..startup_checks import device_wrong
from .finding import Area, Finding, Status

CPUINFO = Path("/proc/cpuinfo")
INT8_FEATURES = ("avx512_vnni", "avx_vnni", "amx_int8")
WORKER_BYTES = 100 * 2**20
"""A worker without models and ads, as measured."""
AD_BYTES = 700
"""An ad of a few fields takes 350, as measured, and twice that while the catalogue is read anew."""
AD_SIDE_BYTES = 1_700
"""What a DeepFM of a first layer of 400 units keeps of an ad, where that is kept (`ad_side_mib`)."""
FILES = 4_096


def check_provider(settings: Settings) -> Iterator[Finding]:
    """Whether the device is there and starts, and what the processor can do."""
    try:
        wrong = device_wrong(settings)
        said = try_device("cpu") if settings.device == "cpu" else "CUDAExecutionProvider starts"
    except DeviceError as error:
        wrong = str(error)
    if wrong:
        what, _, fix = wrong.partition("; ")
        yield Finding("provider", settings.device, "problem", what, fix)
    else:
        yield Finding("provider", settings.device, "ok", said)
    yield check_features(settings)


def check_features(settings: Settings, cpuinfo: Path = CPUINFO) -> Finding:
    """Whether int8 is fast here: that takes VNNI or AMX."""
    try:
        flags = next((line.split() for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), [])
    except OSError:
        flags = []
    has = [feature for feature in INT8_FEATURES if feature in flags]
    said = f"for int8 the processor has {', '.join(has)}" if has else "the processor has neither VNNI nor AMX, which make int8 fast"
    if settings.precision == "int8" and settings.device == "cpu" and not has:
        return Finding("provider", "processor", "warning", said, "measure int8 against float32 here, or set ADRANK_PRECISION=float32")
    return Finding("provider", "processor", "ok", said)


def check_resources(settings: Settings, weight: int, ads: int | None, cgroup: Path = CGROUP) -> Iterator[Finding]:
    """Threads, memory and open files against what this process may use; `weight` is what the models take, in bytes."""
    yield check_threads(settings, cgroup)
    yield check_memory(settings, weight, ads or 0, Room(cgroup).limit)
    yield check_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def check_threads(settings: Settings, cgroup: Path = CGROUP) -> Finding:
    """Whether more is scored at once than there are processors."""
    usable, limit = processors(cgroup)
    if settings.device != "cpu":
        return _found("threads", "ok", f"{usable} processor(s) by {limit}; scoring is on {settings.device}")
    at_once = settings.threads or max(1, usable // settings.workers)
    busy = settings.workers * at_once * settings.intra_op_threads
    parts = f"{settings.workers} worker(s) x {at_once} request(s) x {settings.intra_op_threads} thread(s)"
    said = f"{parts} = {busy} threads score, on {usable} processor(s) by {limit}"
    if busy <= usable:
        return _found("threads", "ok", said)
    fix = f"lower --workers to {usable} at most, and leave ADRANK_THREADS and ADRANK_INTRA_OP_THREADS at their defaults"
    return _found("threads", "problem" if busy > 2 * usable else "warning", f"{said}, so answers wait for each other", fix)


def check_memory(settings: Settings, weight: int, ads: int, limit: int | None) -> Finding:
    """Whether models, ads and what a model keeps of them fit into the limit, and twice the models, as while one is swapped for another."""
    kept = ads * AD_SIDE_BYTES if settings.device == "cpu" else 0
    kept = kept if kept <= settings.ad_side_mib * 2**20 else 0
    live = settings.workers * (WORKER_BYTES + weight + kept + ads * AD_BYTES)
    swapping = live + settings.workers * (weight + kept)
    said = f"about {live / 2**20:,.0f} MB, and {swapping / 2**20:,.0f} MB while a model is swapped"
    if limit is None:
        return _found("memory", "ok", f"{said}; no limit but the machine's")
    said = f"{said}; the limit is {limit / 2**20:,.0f} MB"
    if live > limit:
        return _found("memory", "problem", f"{said}, so processes will be killed", "raise the limit, or lower --workers")
    if swapping > limit:
        return _found("memory", "warning", f"{said}, so a swap may get a process killed", "raise the limit, or lower --workers")
    return _found("memory", "ok", said)


def check_files(limit: int) -> Finding:
    """Each connection is an open file."""
    if limit == resource.RLIM_INFINITY or limit >= FILES:
        return _found("open files", "ok", "no limit" if limit == resource.RLIM_INFINITY else f"{limit:,}")
    said = f"at most {limit:,} files may be open, and each connection is one"
    return _found("open files", "problem" if limit < FILES // 32 else "warning", said, f"raise it to {FILES:,} or more, with ulimit -n")


def _found(check: str, status: Status, said: str, fix: str = "") -> Finding:
    area: Area = "resources"
    return Finding(area, check, status, said, fix)
