"""A model in ONNX Runtime. The only module that knows it; knows nothing about features, users or HTTP."""

import copy
import functools
import itertools
import json
import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as states

from features.bundle import AD_ROWS, ATTENTION, CONTRIBUTIONS, MOST_GRAPH_BYTES
from features.encode import Block, Feeds
from features.files import read
from features.graph_file import GraphFileError, graph_facts
from features.schema import Schema
from features.vocabulary import Numbers

from ..errors import DeviceError, RuntimeTooOldError, ScoringError
from .tiles import TILE, Shape, candidates_of, fill, runs, shape_of, shapes, take_apart

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
CUDA_OPTIONS = {"use_tf32": "0"}  # tensor cores round float32 to 10 bits, and the goldens would not hold
CUDA_GRAPHS = {"enable_cuda_graph": "1", **CUDA_OPTIONS}
INSTALL = (
    "pip install 'adrank[gpu]', then pip uninstall onnxruntime, which hides it, and "
    "pip install --force-reinstall --no-deps onnxruntime-gpu; it needs an NVIDIA GPU with its driver, CUDA 13 and cuDNN 9"
)
OUTPUT, PREFIX = "p_click", "p_"
TYPES = {"tensor(int64)": np.int64, "tensor(float)": np.float32}
SLICE = 512
"""Most candidates of one run: what the model keeps of them in between stays in the caches, however many a request has."""
IDENTITY = (
    b'\x08\x08:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r"
)
"""A model in ONNX that gives back the one number that it takes: what a device can be tried with where there is no bundle."""
WARM_SHAPES = ((1, 1), (1, 100), (50, 100), (50, 1_000))
# ONNX Runtime's exceptions share no base below Exception.
FAILURES: tuple[type[Exception], ...] = (
    RuntimeError,
    *(kind for kind in vars(states).values() if isinstance(kind, type) and issubclass(kind, Exception)),
)
MISFITS: tuple[type[Exception], ...] = (TypeError, ValueError, *FAILURES)

log = logging.getLogger(__name__)


class Scorer:
    """Scores requests with one model. Safe to use from several threads at once."""

    def __init__(self, model: Path, device: str, threads: int, ads: Path | None = None) -> None:
        """Load a model onto `cpu` or `cuda`, `threads` threads to one request. `ads` is the graph that makes of ads what the model takes
        instead, if it does.

        Raises:
            ScoringError: the device is not available, or the file is not a model with the output `p_click`.
        """
        self.provider, self.threads = PROVIDERS[device], threads
        _check_there(device)
        self._session = _open(model, self.provider, _options(threads))
        self._ads = None if ads is None else _open(ads, self.provider, _options(threads))
        if self.provider not in self._session.get_providers():  # it falls back to the CPU by itself, many times slower
            raise DeviceError(f"device {device} is not available: {self.provider} did not start, the log says what it misses; {INSTALL}")
        self.inputs = tuple(entry.name for entry in self._session.get_inputs())
        given = [entry.name for entry in self._session.get_outputs()]
        if OUTPUT not in given:
            raise ScoringError(f"{model} has no output {OUTPUT}")
        others = sorted(name for name in given if name.startswith(PREFIX) and name != OUTPUT)
        self.heads = tuple(name.removeprefix(PREFIX) for name in (OUTPUT, *others))
        """What the model predicts, the click first."""
        self._outputs: tuple[str, ...] = (OUTPUT,)

    @functools.cached_property
    def whole(self) -> "Scorer":
        """The same model, which gives all of its heads: `(R, C, H)` where there are more than the click."""
        whole = copy.copy(self)
        whole._outputs = tuple(PREFIX + head for head in self.heads)
        return whole

    def score(self, feeds: Feeds) -> Numbers:
        """The probabilities `(R, C)` float32 of a click, of `whole` `(R, C, H)`; more than `SLICE` candidates in equal slices. Blocks.

        Raises:
            ScoringError: a tensor is missing, the model failed, or what it gave has another shape.
        """
        slices = [self.run(some) for some in self.slices(feeds)]
        return slices[0] if len(slices) == 1 else np.concatenate(slices, axis=1)

    @property
    def none(self) -> Numbers:
        """The scores of no candidates, `(0,)` or `(0, H)`."""
        return np.zeros((0, *self._last_axis), np.float32)

    @property
    def _last_axis(self) -> tuple[int, ...]:
        return (len(self._outputs),) if len(self._outputs) > 1 else ()

    def slices(self, feeds: Feeds) -> list[Feeds]:
        """The request as requests of at most `SLICE` candidates, all about as large."""
        candidates = candidates_of(feeds)
        count = -(-candidates // SLICE)
        if count <= 1:
            return [feeds]
        edges = [candidates * i // count for i in range(count + 1)]
        return [_candidates(feeds, slice(*edge)) for edge in pairwise(edges)]

    def warm_up(self, history_length: int) -> list[tuple[int, int]]:
        """Behaviours and candidates of requests to score before the first real one: first runs of a size allocate."""
        return [(max(1, min(behaviours, history_length)), candidates) for behaviours, candidates in WARM_SHAPES]

    def ad_side(self, feeds: Feeds) -> Feeds:
        """What the model makes of the ads `(R, C)` of some tensors alone: `(R * C, ...)`. Raises as `score` does."""
        assert self._ads is not None  # noqa: S101  # it has such a graph, or nobody asks
        outputs = [entry.name for entry in self._ads.get_outputs()]
        made = _run(self._ads, outputs, [entry.name for entry in self._ads.get_inputs()], feeds)
        return {name: values.reshape(-1, *values.shape[2:]) for name, values in zip(outputs, made, strict=True)}

    def run(self, feeds: Feeds) -> Numbers:
        """The probabilities of one slice, which may have what `ad_side` gives, and the rows `AD_ROWS`; raises as `score` does."""
        if self._ads is not None and AD_ROWS not in feeds:
            requests, candidates = feeds["ad_ids"].shape[:2]
            feeds = {**feeds, **self.ad_side(feeds), AD_ROWS: np.arange(requests * candidates).reshape(requests, candidates)}
        scores = together(_run(self._session, self._outputs, self.inputs, feeds))
        shape = *next(tensor.shape[:2] for name, tensor in feeds.items() if name.startswith("ad_")), *self._last_axis
        if scores.dtype != np.float32 or scores.shape != shape:
            raise ScoringError(f"the model gave {scores.dtype} {scores.shape}, expected float32 {shape}")
        return scores


class ExplainGraph:
    """A model's graph of what its logits are made of, on the CPU in one thread."""

    def __init__(self, graph: Path) -> None:
        """Load it.

        Raises:
            ScoringError: it is no such graph, or does not say what its contributions are called.
        """
        self._session = _open(graph, PROVIDERS["cpu"], _options(1))
        self._inputs = [entry.name for entry in self._session.get_inputs()]
        outputs = [entry.name for entry in self._session.get_outputs()]
        self.attends = ATTENTION in outputs
        try:
            metadata = self._session.get_modelmeta().custom_metadata_map
            self.names: list[str] = json.loads(metadata[CONTRIBUTIONS]) if CONTRIBUTIONS in outputs else []
        except (KeyError, ValueError) as error:
            raise ScoringError(f"{graph} does not say what its contributions are called") from error

    def run(self, feeds: Feeds) -> dict[str, Numbers]:
        """Contributions `(R, C, K)` and attention `(R, C, T)`, what there is of them. Blocks.

        Raises:
            ScoringError: a tensor is missing, or the model failed.
        """
        try:
            outputs = [entry.name for entry in self._session.get_outputs()]
            return dict(zip(outputs, self._session.run(outputs, {name: feeds[name] for name in self._inputs}), strict=True))
        except KeyError as error:
            raise ScoringError(f"the model takes {error.args[0]}, which its schema does not make") from error
        except FAILURES as error:
            raise ScoringError(f"the model failed: {error}") from error


class Towers:
    """The graphs of a request's and of ads' vectors, of a network that has such, on the CPU in one thread."""

    def __init__(self, request: Path, ad: Path, schema: Schema) -> None:
        """Load them.

        Raises:
            ScoringError: they are no such graphs.
        """
        self._request, self._ad = (_open(graph, PROVIDERS["cpu"], _options(1)) for graph in (request, ad))
        self._inputs = [entry.name for entry in self._request.get_inputs()]
        self._of_ads = {entry.name: entry.name.endswith("_ids") for entry in self._ad.get_inputs()}
        layout = schema.layouts["ad"]
        self.width = self.vectors(Block(np.zeros((1, layout.width), np.int64), np.zeros((1, layout.number_width), np.float32))).shape[-1]

    def request(self, feeds: Feeds) -> Numbers:
        """The vector `(K,)` of one request.

        Raises:
            ScoringError: the model failed.
        """
        return self._run(self._request, {name: feeds[name] for name in self._inputs})

    def vectors(self, ads: Block) -> Numbers:
        """The vectors `(n, K)` of encoded ads; raises as `request` does."""
        return self._run(self._ad, {name: (ads.ids if ids else ads.numbers)[None] for name, ids in self._of_ads.items()})

    def _run(self, session: ort.InferenceSession, feeds: Feeds) -> Numbers:
        try:
            vectors: Numbers = session.run(["vector"], feeds)[0][0]
        except MISFITS as error:
            raise ScoringError(f"the model's tower failed: {error}") from error
        return vectors


class TiledScorer(Scorer):
    """Scores requests together, in runs of a few fixed shapes at fixed addresses, so that CUDA replays what it recorded of each.

    All runs are of one thread: ONNX Runtime keeps what is recorded by thread. Everything but the provider is the same on the CPU.
    """

    def __init__(self, model: Path, device: str, history_length: int) -> None:
        """Load a model onto `cpu` or `cuda`, for histories of that length.

        Raises:
            ScoringError: as for `Scorer`, or the model's inputs are not those of a schema.
        """
        super().__init__(model, device, 1)
        self._device, self._history_length = device, history_length
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="score")  # ends when nothing holds the scorer any more
        self._thread.submit(int).result()  # starts it now, with the priority of whoever makes the scorer
        self._bound: dict[Shape, Bound] = {}
        self._numbers = itertools.count(1)

    @functools.cached_property
    def whole(self) -> "TiledScorer":
        """See `Scorer`; in the same thread, with tensors of its own."""
        whole = copy.copy(self)
        whole._outputs, whole._bound = tuple(PREFIX + head for head in self.heads), {}
        return whole

    def submit(self, requests: Sequence[Feeds]) -> "Future[list[Numbers]]":
        """Begin to score requests `(1, ...)` together: the probabilities `(1, C)` of each, or the `ScoringError` of all."""
        return self._thread.submit(self._score_all, requests)

    def score(self, feeds: Feeds) -> Numbers:
        """See `Scorer`."""
        count = next(iter(feeds.values())).shape[0]
        requests = [{name: tensor[row : row + 1] for name, tensor in feeds.items()} for row in range(count)]
        return np.concatenate(self.submit(requests).result())

    def warm_up(self, history_length: int) -> list[tuple[int, int]]:
        """See `Scorer`: every shape."""
        return [(shape.behaviours, shape.tiles * TILE) for shape in shapes(history_length)]

    def _score_all(self, requests: Sequence[Feeds]) -> list[Numbers]:
        scores: list[Numbers] = [np.empty((1, candidates_of(feeds), *self._last_axis), np.float32) for feeds in requests]
        try:
            for run in runs(requests):
                bound = self._shaped(shape_of(run, requests, self._history_length))
                fill(bound.inputs, run, requests)
                take_apart(bound.run(), run, [each[0] for each in scores])
        except KeyError as error:
            raise ScoringError(f"the model takes {error.args[0]}, which its schema does not make") from error
        except MISFITS as error:
            raise ScoringError(f"the model failed: {error}") from error
        return scores

    def _shaped(self, shape: Shape) -> "Bound":
        if shape not in self._bound:
            self._bound[shape] = Bound(self._session, shape, self._device, next(self._numbers), self._outputs)
        return self._bound[shape]


class Bound:
    """One shape's tensors, on the host to be filled and on the device to be read, which stay where they are."""

    def __init__(self, session: ort.InferenceSession, shape: Shape, device: str, number: int, outputs: Sequence[str]) -> None:
        """Allocate them; `number`, from 1, is the shape's own, under which CUDA records its run."""
        axes = {"user": (shape.tiles,), "history": shape, "ad": (shape.tiles, TILE)}
        self.inputs: Feeds = {}
        self._session, self._binding, self._options = session, session.io_binding(), ort.RunOptions()
        self._options.add_run_config_entry("gpu_graph_id", str(number))
        self._values = {}
        for entry in session.get_inputs():
            axis = axes[entry.name.partition("_")[0]]
            size = (*axis, *entry.shape[len(axis) :])  # ages have no axis of columns
            self.inputs[entry.name] = np.zeros(size, TYPES[entry.type])
            self._values[entry.name] = ort.OrtValue.ortvalue_from_shape_and_type(size, TYPES[entry.type], device, 0)
            self._binding.bind_ortvalue_input(entry.name, self._values[entry.name])
        self._outputs = [ort.OrtValue.ortvalue_from_shape_and_type((shape.tiles, TILE), np.float32, device, 0) for _ in outputs]
        for name, output in zip(outputs, self._outputs, strict=True):
            self._binding.bind_ortvalue_output(name, output)

    def run(self) -> Numbers:
        """The scores `(tiles, TILE)` of what `inputs` hold, or `(tiles, TILE, H)`; good until the next run."""
        for name, value in self._values.items():
            value.update_inplace(self.inputs[name])
        self._session.run_with_iobinding(self._binding, self._options)
        return together([output.numpy() for output in self._outputs])


def _run(session: ort.InferenceSession, outputs: Sequence[str], inputs: Sequence[str], feeds: Feeds) -> list[Numbers]:
    try:
        found: list[Numbers] = session.run(outputs, {name: feeds[name] for name in inputs})
    except KeyError as error:
        raise ScoringError(f"the model takes {error.args[0]}, which its schema does not make") from error
    except MISFITS as error:
        raise ScoringError(f"the model failed: {error}") from error
    return found


def together(heads: Sequence[Numbers]) -> Numbers:
    """One head as it is, several side by side in a last axis."""
    return heads[0] if len(heads) == 1 else np.stack(heads, axis=-1)


def try_device(device: str) -> str:
    """Start the provider of `cpu` or `cuda` on the smallest of models; what there is, in a few words.

    Raises:
        DeviceError: it is not available, or does not start.
    """
    _check_there(device)
    provider = PROVIDERS[device]
    if device == "cuda":
        ort.preload_dlls()
    try:
        session = ort.InferenceSession(IDENTITY, _options(1), providers=[provider], enable_fallback=0)
        session.run(None, {"x": np.zeros(1, np.float32)})
    except FAILURES as error:
        raise DeviceError(f"device {device} is not available: {provider} does not start ({error}); {INSTALL}") from error
    if provider not in session.get_providers():
        raise DeviceError(f"device {device} is not available: {provider} did not start; {INSTALL}")
    return f"onnxruntime {ort.__version__}, {provider}"


def _check_there(device: str) -> None:
    if PROVIDERS[device] not in ort.get_available_providers():
        raise DeviceError(f"device {device} is not available: this onnxruntime lacks {PROVIDERS[device]}; {INSTALL}")


def _candidates(feeds: Feeds, some: slice) -> Feeds:
    return {name: tensor[:, some] if name.startswith("ad_") else tensor for name, tensor in feeds.items()}


def _open(model: Path, provider: str, options: ort.SessionOptions) -> ort.InferenceSession:
    try:
        if provider == PROVIDERS["cuda"]:
            ort.preload_dlls()  # CUDA and cuDNN where pip has put them
            try:
                return ort.InferenceSession(str(model), options, providers=[(provider, CUDA_GRAPHS)], enable_fallback=0)
            except FAILURES as error:  # a graph with a loop, or with a step that only the CPU has
                log.warning("%s is run step by step, without CUDA graphs: %s", model, error)
                return ort.InferenceSession(str(model), options, providers=[(provider, CUDA_OPTIONS)], enable_fallback=0)
        return ort.InferenceSession(str(model), options, providers=[provider])
    except FAILURES as error:
        raise (too_new(model) or ScoringError(f"{model} cannot be loaded: {error}")) from error


def too_new(model: Path) -> RuntimeTooOldError | None:
    """Which onnxruntime a graph needs, if this one is older; None where that is not what is wrong with it."""
    try:
        facts = graph_facts(read(model, MOST_GRAPH_BYTES))
    except (OSError, GraphFileError):
        return None
    refusal = facts.refusal(ort.__version__)
    return RuntimeTooOldError(f"{model} cannot be loaded: {refusal}", facts.needs) if refusal else None


def _options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads  # by default as many as the host has, whatever the container may use
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # spinning takes the event loop's processor
    options.log_severity_level = 3
    return options
