"""The models that are loaded: bundles checked against their digests, their contract and their goldens, and warmed up."""

import logging
import time
from collections.abc import Collection, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from features.bundle import AD_SIDES, AD_VECTOR, CUDA_MODEL, INT8_MODEL, MODEL, REQUEST_VECTOR, Bundle, check_files, read_bundle
from features.encode import Feeds
from features.schema import Schema

from ..errors import NotReadyError, UnknownModelError
from ..ranking.ad_side import AdSide
from ..ranking.scorer import Scorer, TiledScorer, Towers
from ..settings import Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Model:
    """A bundle with its model in memory. `loaded` in seconds since 1970."""

    bundle: Bundle
    scorer: Scorer
    loaded: float
    precision: str = "float32"
    towers: Towers | None = None
    """What ads can be searched by, where the network has vectors."""
    ads: AdSide | None = None
    """Where it keeps what it makes of ads alone."""

    @property
    def name(self) -> str:
        """The name that requests call it by."""
        return self.bundle.name

    def facts(self) -> dict[str, str]:
        """What an answer says about the model that made it."""
        return {"name": self.bundle.name, "version": str(self.bundle.version), "schema": self.bundle.fingerprint}


class Models:
    """The models by name, why others were refused, and which one is for requests that name none."""

    def __init__(self, loaded: Mapping[str, Model], refused: Mapping[str, str], default: str | None = None) -> None:
        self.loaded, self.refused, self.default = dict(loaded), dict(refused), default

    @property
    def ready(self) -> bool:
        """Whether a request that names no model can be ranked."""
        return self.default in self.loaded

    def label(self, name: str | None) -> str:
        """The name as a label of metrics: that of a loaded model, whatever the caller asks for."""
        wanted = name or self.default
        return wanted if wanted is not None and wanted in self.loaded else "none"

    def get(self, name: str | None) -> Model:
        """The model of that name, or the default.

        Raises:
            UnknownModelError: there is none of that name.
            NotReadyError: the default is not loaded, or none at all is.
        """
        if name is not None and name in self.loaded:
            return self.loaded[name]
        if name is not None and self.loaded:
            raise UnknownModelError(f"no such model is loaded; there are: {', '.join(sorted(self.loaded))}")
        if self.loaded and self.default is None:
            raise NotReadyError(f"no model is set for requests that name none; name one in options.model: {', '.join(sorted(self.loaded))}")
        if self.default is None or self.default not in self.loaded:
            raise NotReadyError("no model is loaded; /readyz says why")
        return self.loaded[self.default]


def load_model(path: Path, settings: Settings, beside: Executor, others: Collection[Bundle] = (), notes: Path | None = None) -> Model:
    """Load and check a version, and warm it up. Blocks for a second or more; to be called in a thread of low priority.

    `beside`, of usual priority, makes the scorer: threads that one of low priority starts have a low priority for ever. `others` are in
    memory, and what the bundle has in common with them is not kept twice. `notes`: see `files.digest`.

    Raises:
        BundleError: it is not what was published, or not for this program.
        ScoringError: it cannot be scored with.
    """
    bundle = read_bundle(path, check_files(path, notes), others)
    schema, graph = bundle.schema, graph_of(bundle, settings)
    scorer = beside.submit(_open, bundle, graph, settings).result()
    bundle.check_goldens(scorer.score, graph)
    for behaviours, candidates in scorer.warm_up(schema.history_length):
        scorer.score(_blank(schema, behaviours, candidates))
    ads = AdSide(scorer.ad_side, settings.ad_side_mib * 2**20) if _halves(bundle, graph, settings) else None
    towers = beside.submit(_towers, bundle).result()
    return Model(bundle, scorer, time.time(), "int8" if graph == INT8_MODEL else "float32", towers, ads)


def _towers(bundle: Bundle) -> Towers | None:
    if not {REQUEST_VECTOR, AD_VECTOR} <= bundle.files:
        return None
    return Towers(bundle.path / REQUEST_VECTOR, bundle.path / AD_VECTOR, bundle.schema)


def _open(bundle: Bundle, graph: str, settings: Settings) -> Scorer:
    if settings.device == "cuda":
        return TiledScorer(bundle.path / graph, settings.device, bundle.schema.history_length)
    ads, rest = _halves(bundle, graph, settings) or (None, graph)
    return Scorer(bundle.path / rest, settings.device, settings.intra_op_threads, bundle.path / ads if ads else None)


def _halves(bundle: Bundle, graph: str, settings: Settings) -> tuple[str, str] | None:
    """The files of a graph in two, of ads and of the rest, where it is served so."""
    halves = AD_SIDES.get(graph) if settings.device == "cpu" and settings.ad_side_mib else None
    return halves if halves and bundle.files.issuperset(halves) else None


def graph_of(bundle: Bundle, settings: Settings) -> str:
    """The file of a bundle to score with. Where int8 did not pass its gate, float32 goes on: slower, but right."""
    if settings.device == "cuda":
        return CUDA_MODEL if CUDA_MODEL in bundle.files else MODEL
    if settings.precision == "int8" and INT8_MODEL not in bundle.files:
        refused = bundle.manifest.get("int8", {}).get("refused", "it was not asked for; train with --set int8=true")
        log.warning("model %s version %d has no int8 graph (%s), so it is scored in float32", bundle.name, bundle.version, refused)
    return INT8_MODEL if settings.precision == "int8" and INT8_MODEL in bundle.files else MODEL


def _blank(schema: Schema, behaviours: int, candidates: int) -> Feeds:
    rows = {"user": (1,), "history": (1, behaviours), "ad": (1, candidates)}
    return {
        name: np.zeros((*rows[part], *((width,) if width else ())), np.int64 if name.endswith("_ids") else np.float32)
        for name, (part, width) in schema.tensors.items()
    }
