"""A torch module as an ONNX graph, by torch's dynamo exporter."""

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from features.encode import Feeds
from features.schema import Schema

IR, OPSET = 10, 20
"""The format and the operators of what is exported, whatever torch and onnx would choose by themselves: what onnxruntime 1.20 takes."""
SIZED = {"user": 1, "history": 2, "ad": 2}
"""The first axes of a part's tensors, R and then T or C, that may be of any size."""


def request_graph(
    module: nn.Module, schema: Schema, sample: Feeds, outputs: Sequence[str], facts: Mapping[str, str] | None = None
) -> bytes:
    """The graph of a module that takes `tensors` of a request by name, such as a `sample`; `facts` are what it is to say of itself."""
    tensors = {name: torch.from_numpy(values) for name, values in sample.items()}
    shapes = {name: dict.fromkeys(range(SIZED[schema.tensors[name][0]]), torch.export.Dim.DYNAMIC) for name in sample}
    return exported(module, {"tensors": tensors}, {"tensors": shapes}, list(sample), outputs, facts)


def exported(
    module: nn.Module,
    arguments: dict[str, Any],
    shapes: dict[str, Any],
    inputs: list[str],
    outputs: Sequence[str] = ("p_click",),
    facts: Mapping[str, str] | None = None,
) -> bytes:
    """The ONNX graph of a module called with `arguments` by name; `shapes` says which of their axes are of any size."""
    for chatty in ("torch.onnx", "onnxscript"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter warns of its own internals
        program = torch.onnx.export(
            module,
            kwargs=arguments,
            dynamo=True,
            external_data=False,
            dynamic_shapes=shapes,
            opset_version=OPSET,
            input_names=inputs,
            output_names=list(outputs),
            verbose=False,
        )
    assert program is not None  # noqa: S101  # it is only without dynamo
    model = program.model_proto
    model.ir_version = IR
    for name, value in (facts or {}).items():
        model.metadata_props.add(key=name, value=value)
    graph: bytes = model.SerializeToString()
    return graph
