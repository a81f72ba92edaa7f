"""A model in ONNX Runtime. The only module that knows it; knows nothing about features, users or HTTP."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as states

from features.encode import Feeds
from features.vocabulary import Numbers

from .errors import ScoringError

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
OUTPUT = "p_click"
SLICE = 512
"""Most candidates of one run: what the model keeps of them in between stays in the caches, however many a request has."""
# ONNX Runtime's exceptions share no base below Exception.
FAILURES = tuple(kind for kind in vars(states).values() if isinstance(kind, type) and issubclass(kind, Exception))


class Scorer:
    """Scores requests with one model. Safe to use from several threads at once."""

    def __init__(self, model: Path, device: str, threads: int) -> None:
        """Load a model onto `cpu` or `cuda`, `threads` threads to one request.

        Raises:
            ScoringError: the device is not available, or the file is not a model with the output `p_click`.
        """
        self.provider = PROVIDERS[device]
        if self.provider not in ort.get_available_providers():
            raise ScoringError(f"device {device} is not available: this onnxruntime lacks {self.provider}; install onnxruntime-gpu")
        try:
            self._session = ort.InferenceSession(str(model), _options(threads), providers=[self.provider])
        except FAILURES as error:
            raise ScoringError(f"{model} cannot be loaded: {error}") from error
        if self.provider not in self._session.get_providers():  # it falls back to the CPU by itself, many times slower
            raise ScoringError(f"device {device} is not available: {self.provider} did not start; see the log for the library it misses")
        self.inputs = tuple(entry.name for entry in self._session.get_inputs())
        if OUTPUT not in [entry.name for entry in self._session.get_outputs()]:
            raise ScoringError(f"{model} has no output {OUTPUT}")

    def score(self, feeds: Feeds) -> Numbers:
        """The probabilities `(R, C)` float32 of a click; more than `SLICE` candidates in slices of equal size. Blocks.

        Raises:
            ScoringError: a tensor is missing, the model failed, or what it gave has another shape.
        """
        candidates = next(tensor.shape[1] for name, tensor in feeds.items() if name.startswith("ad_"))
        slices = -(-candidates // SLICE)
        if slices <= 1:
            return self._run(feeds)
        edges = [candidates * i // slices for i in range(slices + 1)]
        return np.concatenate([self._run(_candidates(feeds, slice(*edge))) for edge in pairwise(edges)], axis=1)

    def _run(self, feeds: Feeds) -> Numbers:
        try:
            wanted = {name: feeds[name] for name in self.inputs}
            (scores,) = self._session.run([OUTPUT], wanted)
        except KeyError as error:
            raise ScoringError(f"the model takes {error.args[0]}, which its schema does not make") from error
        except FAILURES as error:
            raise ScoringError(f"the model failed: {error}") from error
        shape = next(tensor.shape[:2] for name, tensor in feeds.items() if name.startswith("ad_"))
        if scores.dtype != np.float32 or scores.shape != shape:
            raise ScoringError(f"the model gave {scores.dtype} {scores.shape}, expected float32 {shape}")
        answer: Numbers = scores
        return answer


def _candidates(feeds: Feeds, some: slice) -> Feeds:
    return {name: tensor[:, some] if name.startswith("ad_") else tensor for name, tensor in feeds.items()}


def _options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads  # by default as many as the host has, whatever the container may use
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # spinning takes the event loop's processor
    options.log_severity_level = 3
    return options
