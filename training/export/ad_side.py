"""A served graph in two: what it makes of an ad alone, which a service computes once an ad, and the rest.

A network's first layer, its sums over fields and the like are linear, or are computed side by side for the request and the ad, and only
then added. Knows no network: it follows each value back to the inputs that it is made of.
"""

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper
from onnx.utils import Extractor

from features.bundle import AD_ROWS, BundleError
from features.encode import Feeds

from .counters_apart import NUMBERS, effect_of, with_counters, without_counters
from .graph import open_graph
from .onnx import OnnxFile, tables_of

PREFIX = "side_"
PRODUCTS = ("MatMul", "Gemm")
"""Where none of these is the ad's alone, looking its values up is as much work as computing them."""
ADS, REQUEST = 1, 2
"""What a value depends on."""


def ad_side(graph: bytes, counters: Sequence[int] = ()) -> tuple[OnnxFile, OnnxFile] | None:
    """The graph `ad_* -> side_* (R, C, ...)`; and the rest, which takes such values of any ads `side_* (N, ...)`, and in place of `ad_*`
    which of them the candidates are, `AD_ROWS (R, C)`. None where it does not pay.

    The columns `counters` of `ad_numbers`, which change all the time, are the rest's (`counters_apart.py`). Graphs with a loop in them
    are left whole, and so are those whose values of ads are laid out in another way.
    """
    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(graph))
    depends = _depends(model)
    mixed = [node for node in model.graph.node if depends[node.output[0]] & REQUEST]
    cut = list(dict.fromkeys(name for node in mixed for name in node.input if depends.get(name) == ADS))
    shapes = [shape for name in cut if (shape := _by_candidate(model, name))]
    looped = any(attribute.type == AttributeProto.GRAPH for node in model.graph.node for attribute in node.attribute)
    alone = any(depends[output.name] == ADS for output in model.graph.output)
    if looped or alone or not cut or len(shapes) < len(cut):
        return None
    names = {name: f"{PREFIX}{number}" for number, name in enumerate(cut)}
    for node in mixed:
        node.input[:] = [names.get(name, name) for name in node.input]
    for (name, new), shape in zip(names.items(), shapes, strict=True):
        at = next(i for i, node in enumerate(model.graph.node) if name in node.output)
        model.graph.node.insert(at + 1, helper.make_node("Identity", [name], [new]))
        model.graph.value_info.append(helper.make_tensor_value_info(new, TensorProto.FLOAT, shape))
    inputs, outputs = [entry.name for entry in model.graph.input], [entry.name for entry in model.graph.output]
    of_ads = [name for name in inputs if name.startswith("ad_")]
    for node in filter(_sizes, model.graph.node):
        node.input[0] = of_ads[0]
    parts = Extractor(model)
    ads = parts.extract_model(of_ads, [*names.values()])
    if not any(node.op_type in PRODUCTS for node in ads.graph.node):
        return None
    rest = parts.extract_model([*(name for name in inputs if name not in of_ads), *names.values()], outputs)
    for node in filter(_sizes, rest.graph.node):
        node.input[0] = AD_ROWS
    rest = _gathering(rest, [*names.values()])
    numbers = next((entry for entry in model.graph.input if entry.name == NUMBERS), None)
    if counters and numbers is not None:
        effect = effect_of(open_graph(_file(ads, graph)), numbers.type.tensor_type.shape.dim[2].dim_value, counters)
        if effect is None:
            return None
        ads, rest = without_counters(ads, counters), with_counters(rest, numbers, counters, effect)
    return _file(ads, graph), _file(rest, graph)


def _gathering(rest: ModelProto, names: Sequence[str]) -> ModelProto:
    """The graph with values of many ads for those of the candidates, and the candidates' rows of them."""
    nodes = [helper.make_node("Gather", [name, AD_ROWS], [f"{name}_of_candidates"]) for name in names]
    for node in rest.graph.node:
        node.input[:] = [f"{name}_of_candidates" if name in names else name for name in node.input]
    nodes += rest.graph.node
    del rest.graph.node[:]
    rest.graph.node.extend(nodes)
    for entry in rest.graph.input:
        if entry.name in names:
            del entry.type.tensor_type.shape.dim[0]
            entry.type.tensor_type.shape.dim[0].dim_param = "N"
    rest.graph.input.append(helper.make_tensor_value_info(AD_ROWS, TensorProto.INT64, ["R", "C"]))
    return rest


def _depends(model: ModelProto) -> dict[str, int]:
    """What each value depends on; the number of requests or of candidates is nobody's."""
    found = {entry.name: ADS if entry.name.startswith("ad_") else REQUEST for entry in model.graph.input}
    for node in model.graph.node:
        of = 0
        for name in () if _sizes(node) else node.input:
            of |= found.get(name, 0)
        found.update(dict.fromkeys(node.output, of))
    return found


def _sizes(node: NodeProto) -> bool:
    """Whether it tells the number of requests, or of candidates, from a tensor of theirs."""
    end = next((attribute.i for attribute in node.attribute if attribute.name == "end"), 0)
    return node.op_type == "Shape" and (end == 1 or (end == 2 and node.input[0].startswith("ad_")))


def _by_candidate(model: ModelProto, name: str) -> list[str | int] | None:
    """The shape of a value that is `(R, C, ...)` of float32, fixed but for R and C; None of another."""
    ads = next(entry for entry in model.graph.input if entry.name.startswith("ad_")).type.tensor_type.shape
    kind = next((entry.type.tensor_type for entry in model.graph.value_info if entry.name == name), None)
    if kind is None or kind.elem_type != TensorProto.FLOAT or len(kind.shape.dim) < 2:
        return None
    rows, each = list(kind.shape.dim[:2]), [dim.dim_value for dim in kind.shape.dim[2:]]
    return ["R", "C", *each] if rows == list(ads.dim[:2]) and all(each) else None


def _file(model: ModelProto, whole: bytes) -> OnnxFile:
    held = {tensor.name for tensor in model.graph.initializer}
    return OnnxFile(model.SerializeToString(), {name: table for name, table in tables_of(whole).items() if name in held})


def check_ad_side(whole: bytes, parts: tuple[bytes, bytes], cases: Sequence[Feeds], tolerance: float) -> None:
    """Compare both graphs, one after the other, with the whole.

    Raises:
        BundleError: they differ.
    """
    session, ads, rest = map(open_graph, (whole, *parts))
    sides = [entry.name for entry in ads.get_outputs()]
    for feeds in cases:
        made = ads.run(sides, {name: values for name, values in feeds.items() if name.startswith("ad_")})
        kept = {name: values.reshape(-1, *values.shape[2:]) for name, values in zip(sides, made, strict=True)}
        rows = np.arange(made[0].shape[0] * made[0].shape[1]).reshape(made[0].shape[:2])
        others = {entry.name: feeds[entry.name] for entry in rest.get_inputs() if entry.name in feeds}
        for together, apart in zip(session.run(None, feeds), rest.run(None, {**others, **kept, AD_ROWS: rows}), strict=True):
            if not abs(together - apart).max() <= tolerance:
                raise BundleError("a graph and its halves, of ads and of the rest, give different probabilities; nothing was published")
