"""Train and publish: the road of `adrank train`, with the gate that a version has to pass to become the live one."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.progress import Progress

from features.bundle import MODEL, Bundle, check_publishable, current_path, load_bundle, publish
from features.repository import CURRENT

from ..checkpoint import Checkpoint
from ..datasets.prepared import Prepared
from ..export.export import check_asked, contents
from ..networks import NETWORKS
from ..report.files import tell_verdict
from ..train import Trained, train
from ..train_settings import TrainError, TrainSettings, overridden
from ..weights import start_of
from . import gate as gates
from .compare import Gate
from .data_checks import Enough


@dataclass(frozen=True)
class GateVerdict:
    """What came of a training, and whether its version is live."""

    trained: Trained
    live: bool
    reasons: list[str]
    """Why it is not, a sentence each; where it is live all the same, what there was against it."""

    @property
    def refused(self) -> bool:
        """Whether it was to be live, and is not."""
        return bool(self.reasons) and not self.live

    def as_dict(self, path: Path) -> dict[str, Any]:
        """For JSON; `path` is the version's bundle."""
        metrics = {split: measures.as_dict() for split, measures in self.trained.metrics.items()}
        verdict = {"bundle": str(path), "live": self.live, "refused": self.refused, "reasons": self.reasons}
        return {**verdict, "metrics": metrics, "calibration": [each.line(head) for head, each in self.trained.calibrations.items()]}


def train_and_publish(  # noqa: PLR0913, PLR0917  # the whole road, from data to a live version
    data: Prepared,
    family: str,
    models: Path,
    name: str,
    given: Mapping[str, str],
    progress: Progress,
    promote: str = "always",
    checkpoint: Checkpoint | None = None,
) -> tuple[Path, GateVerdict]:
    """Train a network with the settings `given` as texts, and publish it; the bundle's folder, and whether it is live.

    A version that is not fit to be live is published all the same: it can be looked at, and promoted. The `checkpoint` is gone then.

    Raises:
        CheckpointError: see `Checkpoint`.
        TrainError: there is no such network or setting, or the network cannot be built for this schema.
        DataError: the data set cannot be read.
        BundleError: ONNX Runtime disagrees with torch, or the repository cannot be written or its live version not read.
    """
    if family not in NETWORKS:
        raise TrainError(f"there is no network {family!r}; there are {', '.join(NETWORKS)}")
    network, loop, gate, enough = overridden(given, NETWORKS[family].settings(), TrainSettings(), Gate(), Enough())
    check_asked(family, loop, data.schema)
    check_publishable(models, name)
    champion = _live(models, name) if promote == "if-better" else None
    start = replace(start_of(load_bundle(Path(loop.init_from))), embeddings_only=True) if loop.init_from else None
    trained = train(data, family, network, loop, progress, start, checkpoint)
    task = progress.add_task("exporting", total=1)
    files, facts = contents(data, trained, progress)
    reasons, measured = gates.flaws(trained, enough), dict[str, Any]()
    if not reasons and promote in ("gate", "if-better"):
        reasons, measured = gates.violations(champion, data, trained, files[MODEL], gate, progress)
    if champion and (now := _live(models, name)) and now.version != champion.version:
        reasons.append(f"the live version was {champion.version} and is {now.version} now, so the comparison is void")
    live = promote == "always" or (promote != "never" and not reasons)
    verdict = ("Made live" if live else "Not made live") + (f" (--promote {promote})" if promote in ("always", "never") else "")
    tell_verdict(files, verdict, live, reasons)
    path = publish(models, name, files, {**facts, "gate": {"promote": promote, "reasons": reasons, **measured}}, make_current=live)
    if checkpoint:
        checkpoint.remove()
    progress.update(task, completed=1)
    return path, GateVerdict(trained, live, reasons if promote != "never" else [])


def _live(models: Path, name: str) -> Bundle | None:
    return load_bundle(current_path(models, name)) if (models / name / CURRENT).exists() else None
