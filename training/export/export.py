"""A trained network to a published bundle: the ONNX graph, proof that ONNX Runtime agrees with torch, goldens, one rename.

The graph takes the tensors of `Schema.tensors` and gives `p_click (R, C)`, calibration included; R, C and T are dynamic.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from rich.progress import Progress
from torch import Tensor, nn

from features.ages import UNKNOWN_TIME
from features.bundle import (
    AD_DEVIATIONS,
    AD_SIDES,
    AD_VECTOR,
    CUDA_MODEL,
    GOLDENS,
    INT8_MODEL,
    MODEL,
    REQUEST_VECTOR,
    SCHEMA,
    VOCABULARIES,
    Bundle,
    BundleError,
    Contents,
    Golden,
    goldens_json,
    publish,
)
from features.encode import Encoder, Features, Feeds
from features.schema import AGES, Schema, Side

from ..calibrate import Calibration, sampled_heads
from ..datasets.ads import catalogue
from ..datasets.encoded import Rows, encode_split
from ..datasets.fields import check_fields
from ..datasets.prepared import Prepared, column_of
from ..deviations import npy
from ..evaluate import Measures, measure
from ..networks import NETWORKS
from ..networks.contract import CLICK, RequestTensors
from ..networks.fuse import TILE, fused, is_tiled
from ..report.files import report_files
from ..retrain.drift import REFERENCE, make_reference
from ..segments import segment_field
from ..tenure import IDLE
from ..train import Trained
from ..train_settings import TrainError, TrainSettings
from ..weights import CALIBRATION, WEIGHTS, packed
from .ad_side import ad_side, check_ad_side
from .explain import explain_graph, tensors_of
from .graph import by_head, chunks, feeds_of, open_graph
from .int8 import moved, quantised, refusal
from .onnx import OnnxFile, request_graph, table_files
from .retrieval import AD_VECTORS, AdVectors, RequestVectors, ad_vectors

Scores = tuple[np.ndarray[Any, np.dtype[np.float32]], ...]
TOLERANCE = 1e-5
"""Largest difference of a probability between ONNX Runtime and torch. Both compute in float32, 6e-8 a rounding, but sum in
another order: over sums of a few hundred terms that comes to about 1e-6, while a wrong operator is off by far more."""
SIZES = (1, 2, 7, 64)
"""Requests, candidates and behaviours that are tried: the sizes that exporters specialise on, an odd one, a large one."""
SAMPLE = (3, 31, 41)
"""Requests, behaviours and candidates of the request that is traced: no size derived from them, such as the number of tiles, is 1."""
FEW = (SAMPLE, (1, 1, 1), (7, 2, 3))
"""Requests, behaviours and candidates of which the graphs beside the scoring one are tried."""
GOLDEN_ROWS = 8
SHOWN_ROWS = 16_384
"""Rows of the train split that int8 scales are taken from."""
METRICS = "metrics.json"


class ServedNetwork(nn.Module):
    """A network as it is served: logits to calibrated, sampling-corrected probabilities."""

    def __init__(
        self, network: nn.Module, calibration: Calibration, schema: Schema, others: Mapping[str, Calibration] | None = None
    ) -> None:
        """`calibration` is the click's, `others` those of the further heads."""
        super().__init__()
        self.network = network
        self.calibration = calibration
        self.others = dict(others or {})
        self.scale = calibration.scale
        self.shift = calibration.shift + calibration.sampling
        self.schema = schema

    @property
    def names(self) -> list[str]:
        """The outputs of the graph, `p_click` first."""
        return [f"p_{head}" for head in (CLICK, *self.others)]

    def forward(self, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """The probabilities `(R, C)` of each head, the click first, of the tensors of `Schema.tensors`.

        Of what comes after a click a sampled log keeps all, so p(head given click) is the same there: p(head) is as far from
        what the log says as p(click) is.
        """
        logits = self.network(RequestTensors.of(tensors))
        p_click = torch.sigmoid(logits[CLICK] * self.scale + self.shift)
        found = [torch.sigmoid(logits[head] * c.scale + c.shift) for head, c in self.others.items()]
        if found and self.calibration.sampling:
            on_log = torch.sigmoid(logits[CLICK] * self.scale + self.calibration.shift)
            found = [p * (p_click / on_log) for p in found]
        return p_click, *found


def score(served: ServedNetwork, feeds: Feeds) -> np.ndarray[Any, np.dtype[np.float32]]:
    """What torch says to a request's tensors: p(click) `(R, C)`."""
    return all_scores(served, feeds)[0]


def to_onnx(served: ServedNetwork, tile: int | None = TILE) -> OnnxFile:
    """The graph of the fused network, through torch's dynamo exporter; `tile` as `networks.fuse` takes it."""
    served = ServedNetwork(fused(served.network, tile), served.calibration, served.schema, served.others).eval()
    return request_graph(served, served.schema, random_feeds(served.schema, {}, *SAMPLE), served.names)


def random_feeds(schema: Schema, sizes: dict[str, int], requests: int, behaviours: int, candidates: int, seed: int = 0) -> Feeds:
    """Tensors of a random request; ids below the vocabularies' `sizes` (3 where not given), so 0 and 1 occur too."""
    random = np.random.default_rng(seed)
    axes = {"user": (requests,), "history": (requests, behaviours), "ad": (requests, candidates)}
    feeds: Feeds = {}
    for name, (part, width) in schema.tensors.items():
        if name == AGES:
            feeds[name] = np.exp2(random.uniform(0, 31, axes[part])).astype(np.float32)
            continue
        shape = (*axes[part], width)
        if name.endswith("_numbers"):
            feeds[name] = random.standard_normal(shape).astype(np.float32)
            continue
        slots = schema.layouts[part].ids
        high = np.array([sizes.get(slot.field.vocabulary, 3) for slot in slots for _ in range(slot.field.length)])
        feeds[name] = random.integers(0, high, shape)
        if part == "history":
            feeds[name][..., 0] = np.maximum(feeds[name][..., 0], 1)
    return feeds


def verify(graph: bytes, served: ServedNetwork, sizes: dict[str, int]) -> float:
    """Compare ONNX Runtime with torch over shapes, histories and orders; the largest difference seen.

    Raises:
        BundleError: they differ by more than `TOLERANCE`, or padding or order changes a score.
    """
    session = open_graph(graph)
    worst = 0.0
    for case, feeds, expected in _cases(served, sizes):
        off = max(float(np.abs(ours - theirs).max()) for ours, theirs in zip(session.run(served.names, feeds), expected, strict=True))
        worst = max(worst, off)
        if not off <= TOLERANCE:
            raise BundleError(f"ONNX Runtime and torch differ by {off:.2g} for {case}, {TOLERANCE} is allowed; nothing was published")
    return worst


def all_scores(served: ServedNetwork, feeds: Feeds) -> Scores:
    """What torch says to a request's tensors: the probabilities `(R, C)` of each head."""
    with torch.no_grad():
        return tuple(p.numpy() for p in served(tensors_of(feeds)))


def _cases(served: ServedNetwork, sizes: dict[str, int]) -> Iterator[tuple[str, Feeds, Scores]]:
    schema = served.schema
    full = max(schema.history_length, 1)
    for requests in SIZES:
        for candidates in SIZES:
            for behaviours in (*SIZES, full) if schema.history else (1,):
                feeds = random_feeds(schema, sizes, requests, behaviours, candidates, seed=candidates)
                yield f"R={requests}, C={candidates}, T={behaviours}", feeds, all_scores(served, feeds)
    feeds = random_feeds(schema, sizes, 3, full, 33)
    expected = all_scores(served, feeds)
    order = np.random.default_rng(1).permutation(33)
    permuted = {name: array[:, order] if name.startswith("ad_") else array for name, array in feeds.items()}
    yield "candidates permuted", permuted, tuple(p[:, order] for p in expected)
    padded = {
        name: np.pad(array, ((0, 0), (0, 9), (0, 0))[: array.ndim]) if name.startswith("history_") else array
        for name, array in feeds.items()
    }
    yield "padding added", padded, expected
    empty = {name: np.zeros_like(array) if name.startswith("history_") else array for name, array in feeds.items()}
    yield "an empty history", empty, all_scores(served, empty)


def make_goldens(data: Prepared, served: ServedNetwork, encoder: Encoder) -> list[Golden]:
    """Real requests of the valid split, the values as they come from outside, with torch's scores."""
    frame = next(data.frames("valid")).head(5_000)
    ads, users = data.table("ad"), data.table("user")
    chosen = frame.sample(min(GOLDEN_ROWS, len(frame)), seed=1)
    some_ads = chosen["ad_id"].unique(maintain_order=True).to_list()
    goldens = []
    for i, row in enumerate(chosen.iter_slices(1)):
        history = row["history"][0].to_list() if encoder.schema.history_length and row["history"][0] is not None and i else []
        named = sorted({*some_ads, *history})
        features = {
            ad_id: _features(found, encoder.schema, "ad") for ad_id in named if (found := _row(ads, chosen, "ad_id", ad_id)) is not None
        }
        user_id = row["user_id"][0]
        user_row = _row(users, row, "user_id", user_id)
        user = {} if user_row is None else _features(user_row, encoder.schema, "user")
        golden = Golden(user_id, user, _features(row, encoder.schema, "context"), history, some_ads, features, [])
        if encoder.schema.history_ages:
            golden = replace(golden, history_ts=_times(row, len(history)), ts=float(row["ts"][0]))
        goldens.append(replace(golden, p_click=score(served, golden.feeds(encoder))[0].tolist()))
    return goldens


def _times(row: pl.DataFrame, count: int) -> list[float]:
    """When the behaviours of a row were, as far as it has so many."""
    times = row["history_ts"][0]
    known = [UNKNOWN_TIME if ts is None else float(ts) for ts in times] if times is not None else []
    return known if len(known) == count else []


def _row(table: pl.DataFrame | None, rows: pl.DataFrame, key: str, value: str) -> pl.DataFrame | None:
    found = (rows if table is None else table).filter(pl.col(key) == value).head(1)
    return found if len(found) else None


def _features(row: pl.DataFrame, schema: Schema, side: Side) -> Features:
    features: dict[str, Any] = {}
    for field in schema.side(side):
        column = column_of(row, field)
        if column is None or field.name in ("user_id", "ad_id") or column[0] is None:
            continue
        features[field.name] = column[0].to_list() if isinstance(column[0], pl.Series) else column[0]
    return features


def check_asked(family: str, loop: TrainSettings, schema: Schema) -> None:
    """Check, before hours of training, what is asked for beside the network: int8 only of networks that gain by it, a field to report by.

    Raises:
        TrainError: this network does not.
        DataError: there is no such field.
    """
    if loop.int8 and not NETWORKS[family].int8_pays:
        raise TrainError(f"--set int8=true: int8 makes {family} no faster and less exact; leave it out")
    if loop.segment:
        segment_field(schema, loop.segment)


def export(data: Prepared, trained: Trained, models: Path, name: str, progress: Progress) -> Path:
    """Export, verify and publish; the folder of the new version.

    Raises:
        BundleError: ONNX Runtime disagrees with torch, or the repository cannot be written.
    """
    return publish(models, name, *contents(data, trained, progress))


def contents(data: Prepared, trained: Trained, progress: Progress) -> tuple[dict[str, Contents], dict[str, Any]]:
    """A bundle's files, verified, and the facts for its manifest. Where the settings ask for int8, such a graph too, if it passes.

    Raises:
        BundleError: ONNX Runtime disagrees with torch.
    """
    encoder = trained.encoder
    others = {head: calibration for head, calibration in trained.calibrations.items() if head != CLICK}
    served = ServedNetwork(trained.network, trained.calibration, encoder.schema, others).eval()
    graphs: dict[str, bytes] = {MODEL: to_onnx(served)}
    if is_tiled(trained.network):
        graphs[CUDA_MODEL] = to_onnx(served, tile=None)  # tiles are for a processor's cache
    sizes = {vocabulary: v.size for vocabulary, v in encoder.vocabularies.categories.items()}
    difference = max(verify(graph, served, sizes) for graph in graphs.values())
    goldens = make_goldens(data, served, encoder)
    facts: dict[str, Any] = {"network": trained.family, "settings": trained.settings, "onnx_difference": difference}
    facts |= {"negative_sampling": data.negative_sampling, "calibration": asdict(trained.calibration)}
    if trained.settings["int8"]:
        coarse, facts["int8"] = _int8(data, trained, graphs[MODEL], progress)
        if facts["int8"]["refused"] is None:
            graphs[INT8_MODEL] = coarse
            session = open_graph(coarse)
            goldens = [replace(golden, p_click_int8=session.run(["p_click"], golden.feeds(encoder))[0][0].tolist()) for golden in goldens]
    graphs |= ad_sides(graphs, [random_feeds(encoder.schema, sizes, *shape) for shape in FEW], encoder.counter_columns)
    metrics: dict[str, Any] = {split: m.as_dict() for split, m in trained.metrics.items()}
    if others:
        metrics["heads"] = {head: {split: m.as_dict() for split, m in found.items()} for head, found in trained.head_metrics.items()}
        facts["heads"] = {head: asdict(calibration) for head, calibration in others.items()}
    explaining, facts["explains"] = explain_graph(trained.network, encoder.schema, [random_feeds(encoder.schema, sizes, *s) for s in FEW])
    retrieval = _retrieval(data, trained, sizes)
    tables = table_files([*graphs.values(), *explaining.values(), *retrieval.values()])
    files: dict[str, Contents] = {
        **graphs,
        **explaining,
        SCHEMA: encoder.schema.to_toml().encode(),
        VOCABULARIES: encoder.vocabularies.to_json().encode(),
        GOLDENS: goldens_json(goldens),
        CALIBRATION: json.dumps(asdict(trained.calibration)).encode(),
        WEIGHTS: packed(trained.network, tables),
        METRICS: json.dumps(metrics, indent=1).encode(),
        **({IDLE: trained.tenure.to_json()} if trained.settings["evict_after"] else {}),
        REFERENCE: (reference := make_reference(data, encoder.vocabularies)),
        **({} if trained.ad_deviations is None else {AD_DEVIATIONS: npy(trained.ad_deviations)}),
        **retrieval,
        **tables,
        **report_files(data, trained, json.loads(reference), progress),
    }
    facts["libraries"] = {library: version(library) for library in ("numpy", "torch", "onnx", "onnxruntime")}
    return files, facts


def ad_sides(graphs: Mapping[str, bytes], cases: Sequence[Feeds], counters: Sequence[int] = ()) -> dict[str, bytes]:
    """The graphs in two, by file, where that pays, verified on some requests; `counters` are those columns of `ad_numbers`.

    Raises:
        BundleError: ONNX Runtime does not make the same of them.
    """
    halves: dict[str, bytes] = {}
    for file in AD_SIDES.keys() & graphs.keys():
        if parts := ad_side(graphs[file], counters):
            check_ad_side(graphs[file], parts, cases, TOLERANCE)
            halves |= dict(zip(AD_SIDES[file], parts, strict=True))
    return halves


def _retrieval(data: Prepared, trained: Trained, sizes: dict[str, int]) -> dict[str, bytes]:
    """The vectors of the data set's ads, and the graphs that give a request's and an ad's, where the network has such."""
    ads = catalogue(data, trained.encoder) if trained.network.retrieves else None  # encoded anew: not for networks without vectors
    if ads is None:
        return {}
    table = ad_vectors(trained.network, *ads)
    if table is None:  # of no ads
        return {}
    network, schema = fused(trained.network), trained.encoder.schema
    graphs = {}
    for file, module in ((REQUEST_VECTOR, RequestVectors(network).eval()), (AD_VECTOR, AdVectors(network).eval())):
        cases = [random_feeds(schema, sizes, *shape) for shape in FEW]
        cases = [
            {each: values for each, values in case.items() if (schema.tensors[each][0] == "ad") == (file == AD_VECTOR)} for case in cases
        ]
        graphs[file] = request_graph(module, schema, cases[0], ("vector",))
        session = open_graph(graphs[file])
        for feeds in cases:
            if not np.abs(session.run(None, feeds)[0] - module(tensors_of(feeds)).detach().numpy()).max() <= TOLERANCE:
                raise BundleError(f"ONNX Runtime and torch give different vectors by {file}; nothing was published")
    return {AD_VECTORS: table, **graphs}


def _int8(data: Prepared, trained: Trained, graph: bytes, progress: Progress) -> tuple[bytes, dict[str, Any]]:
    """The graph in int8, and how it does on test beside the graph itself."""
    shown, judged = encode_split(data, "train", trained.encoder), trained.held_out
    some = np.random.default_rng(1).permutation(len(shown))[:SHOWN_ROWS]
    schema = trained.encoder.schema
    coarse = quantised(graph, (feeds_of(schema, shown, chunk) for chunk in chunks(np.sort(some))))
    found = (scores(each, schema, data.negative_sampling, judged, progress)[CLICK] for each in (graph, coarse))
    measured = [measure(judged.labels, p, judged.users) for p in found]
    moves = moved(*measured)
    return coarse, {"moved": moves, "refused": refusal(moves)}


def evaluate_bundle(bundle: Bundle, data: Prepared, split: str, progress: Progress, graph: str = MODEL) -> Measures:
    """Measure a bundle, by one of its graphs, on a split as it would serve it, its rows encoded with its own vocabularies.

    Raises:
        DataError: the split is absent or does not fit the bundle's schema.
    """
    rows, scored = scores_of(bundle, data, split, progress, graph)
    return measure(rows.labels, scored[CLICK], rows.users)


def scores_of(
    bundle: Bundle, data: Prepared, split: str, progress: Progress, graph: str = MODEL
) -> tuple[Rows, dict[str, np.ndarray[Any, np.dtype[np.float64]]]]:
    """The rows of a split as a bundle encodes them, and what one of its graphs gives for them `(N,)`, by head, to compare with labels.

    Raises:
        DataError: the split is absent, or does not fit the bundle's schema or lacks a field of it.
    """
    check_fields(data, bundle.schema, data.files(split))
    rows = encode_split(replace(data, schema=bundle.schema), split, bundle.encoder)
    return rows, scores(bundle.path / graph, bundle.schema, data.negative_sampling, rows, progress)


def scores(
    graph: Contents | Path, schema: Schema, negative_sampling: float, rows: Rows, progress: Progress
) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    """What a graph gives for encoded rows `(N,)` by head as it serves them, and as they are when a share of non-clicks was kept of them.

    It is the rows that say how they were sampled: what the graph was trained on plays no part.
    """
    served = by_head(open_graph(graph), schema, rows, progress.track(chunks(np.arange(len(rows))), description="scoring"))
    return sampled_heads(served, negative_sampling)
