"""A served graph in int8: its matrix products take bytes, everything between them stays float32.

The scales are fixed beforehand, from rows of the log, rather than worked out from each request: a candidate's score must not
depend on which others it is ranked with.
"""

import logging
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from features.encode import Feeds

from ..evaluate import Measures
from .onnx import OnnxFile, tables_of

AUC, SHARE = 0.0005, 0.005
"""How far AUC may move, and by which share log loss and the calibration ratio may."""


class Shown(CalibrationDataReader):  # type: ignore[misc]
    """Requests on which to see what values there are, as ONNX Runtime asks for them."""

    def __init__(self, requests: Iterable[Feeds]) -> None:
        self._requests: Iterator[Feeds] = iter(requests)

    def get_next(self) -> Feeds | None:
        """The next, None after the last."""
        return next(self._requests, None)


def quantised(graph: bytes, requests: Iterable[Feeds]) -> OnnxFile:
    """The graph with int8 weights, a scale an output column, in each product, and uint8 inputs that span what `requests` show."""
    model, tables = onnx.load_from_string(graph), tables_of(graph)
    large = [tensor for tensor in model.graph.initializer if tensor.name in tables]
    for tensor in large:  # an input for now: what looks at the requests writes the model into a file
        model.graph.initializer.remove(tensor)
        model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    given = {name: table for name, (_, table) in tables.items()}
    root, level = logging.getLogger(), logging.getLogger().level
    root.setLevel(logging.ERROR)  # it recommends steps that have been done, or that this graph does not need
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "int8.onnx"
            quantize_static(
                model,
                str(path),
                Shown({**feeds, **given} for feeds in requests),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["MatMul", "Gemm"],
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                # 7 bits: processors without VNNI add two products of bytes in 16 bits, which weights of 8 bits overflow.
                reduce_range=True,
                extra_options={"MatMulConstBOnly": True, "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]},
            )
            coarse = onnx.load(path)
    finally:
        root.setLevel(level)
    del coarse.graph.input[len(coarse.graph.input) - len(large) :]
    coarse.graph.initializer.extend(large)
    return OnnxFile(coarse.SerializeToString(), tables)


def moved(exact: Measures, coarse: Measures) -> dict[str, float]:
    """What int8 does to the measures that its gate is about: AUC as a difference, the others as a share."""
    shares = {name: _share(getattr(coarse, name), getattr(exact, name)) for name in ("log_loss", "calibration_ratio")}
    return {"auc": coarse.auc - exact.auc, **shares}


def _share(coarse: float, exact: float) -> float:
    return coarse / exact - 1 if exact else float("nan")


def refusal(moves: dict[str, float]) -> str | None:
    """Why int8 is not to be served, None where it may be."""
    allowed = {"auc": AUC, "log_loss": SHARE, "calibration_ratio": SHARE}
    beyond = [f"{name} moves by {move:+.2g}, {allowed[name]} is allowed" for name, move in moves.items() if not abs(move) <= allowed[name]]
    return "; ".join(beyond) or None
