"""What an ONNX file says of itself: its format, its opset, and the files beside it that hold its weights.

Reads the protocol buffers of onnx.proto as far as that takes, since the service does without the library onnx.
"""

from collections.abc import Iterator
from dataclasses import dataclass

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
IR_VERSION, GRAPH, OPSETS, FUNCTIONS = 1, 7, 8, 25
"""Fields of a ModelProto."""
DOMAIN, VERSION = 1, 2
"""Of an OperatorSetIdProto."""
EXTERNAL_DATA = 13
"""Of a TensorProto."""
KEY, VALUE = 1, 2
"""Of a StringStringEntryProto."""
GRAPH_PARTS, FUNCTION_PARTS = {1: "node", 5: "tensor", 15: "sparse"}, {7: "node", 11: "attribute"}
PARTS = {
    "graph": GRAPH_PARTS,
    "function": FUNCTION_PARTS,
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
"""Which fields of what hold what, down to every tensor."""
DEEPEST = 100
RUNTIMES = (("1.20", 10, 21), ("1.21", 10, 22), ("1.23", 11, 23), ("1.24", 13, 25), ("1.25", 13, 26))
"""From which version on onnxruntime takes which format and opset, as tried with each version up to `TRIED`."""
TRIED = "1.31"


class GraphFileError(ValueError):
    """The file is no ONNX model."""


@dataclass(frozen=True, slots=True)
class GraphFacts:
    """The format's version, that of the ONNX operators, and the files that hold tensors."""

    ir: int
    opset: int
    external: frozenset[str] = frozenset()

    @property
    def needs(self) -> str:
        """The versions of onnxruntime that take it, in words."""
        first = self._first()
        return f"onnxruntime >= {first}" if first else f"an onnxruntime later than {TRIED}"

    def _first(self) -> str | None:
        return next((version for version, ir, opset in RUNTIMES if self.ir <= ir and self.opset <= opset), None)

    def refusal(self, installed: str) -> str | None:
        """Why the installed onnxruntime may not take it, and what to do; None where it is known to."""
        first = self._first()
        if first and _numbers(first) <= _numbers(installed):
            return None
        what = f"its graph is ONNX IR {self.ir}, opset {self.opset}, which needs {self.needs}, and this is {installed}"
        return f"{what}; install that, or publish it again as IR {RUNTIMES[0][1]}, opset {RUNTIMES[0][2]} at most"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())


def graph_facts(data: bytes | memoryview) -> GraphFacts:
    """What an ONNX file says of itself.

    Raises:
        GraphFileError: it is not one.
    """
    ir, opset, external = 0, 0, set[str]()
    for field, value in _fields(memoryview(data)):
        if field == IR_VERSION and isinstance(value, int):
            ir = value
        elif field == OPSETS and isinstance(value, memoryview):
            entry = dict(_fields(value))
            if bytes(entry.get(DOMAIN, b"")) in (b"", b"ai.onnx") and isinstance(version := entry.get(VERSION), int):
                opset = version
        elif field in (GRAPH, FUNCTIONS) and isinstance(value, memoryview):
            external |= {name for tensor in _tensors("graph" if field == GRAPH else "function", value, 0) for name in _location(tensor)}
    if not ir or not opset:
        raise GraphFileError("it is no ONNX model: it tells neither its format nor its opset")
    return GraphFacts(ir, opset, frozenset(external))


def _tensors(kind: str, data: memoryview, depth: int) -> Iterator[memoryview]:
    if depth > DEEPEST:
        raise GraphFileError(f"it is no ONNX model of ours: graphs lie in each other more than {DEEPEST} deep")
    if kind == "tensor":
        yield data
        return
    for field, value in _fields(data):
        if isinstance(value, memoryview) and (inner := PARTS[kind].get(field)):
            yield from _tensors(inner, value, depth + 1)


def _location(tensor: memoryview) -> Iterator[str]:
    """The file that holds a tensor, if it is another one."""
    for field, value in _fields(tensor):
        if field == EXTERNAL_DATA and isinstance(value, memoryview):
            entry = dict(_fields(value))
            if bytes(entry.get(KEY, b"")) == b"location":
                yield bytes(entry.get(VALUE, b"")).decode("utf-8", "replace")


def _fields(data: memoryview) -> Iterator[tuple[int, "int | memoryview"]]:
    """The fields of a message: numbers, and the bytes of what has a length."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == VARINT:
            number, at = _varint(data, at)
            yield tag >> 3, number
            continue
        if kind == BYTES:
            size, at = _varint(data, at)
        elif kind in (FIXED64, FIXED32):
            size = 8 if kind == FIXED64 else 4
        else:
            raise GraphFileError("it is no ONNX model: its bytes are no protocol buffers")
        if at + size > len(data):
            raise GraphFileError("it is no ONNX model, or it is cut short")
        if kind == BYTES:
            yield tag >> 3, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    number = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        number |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return number, at
    raise GraphFileError("it is no ONNX model, or it is cut short")
