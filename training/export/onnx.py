"""A torch module as an ONNX graph, by torch's dynamo exporter; large tables lie beside it."""

import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from onnxscript import ir
from torch import nn

from features.bundle import Contents
from features.encode import Feeds
from features.schema import Schema

from ..tables import Table, file_of, is_large

IR, OPSET = 10, 20
"""The format and the operators of what is exported, whatever torch and onnx would choose by themselves: what onnxruntime 1.20 takes."""
SIZED = {"user": 1, "history": 2, "ad": 2}
"""The first axes of a part's tensors, R and then T or C, that may be of any size."""


class OnnxFile(bytes):
    """An ONNX file, and the large tables that it leaves to files beside it."""

    tables: Mapping[str, tuple[str, Table]]
    """The file's name and what it holds, by the tensor's name."""

    def __new__(cls, data: bytes, tables: Mapping[str, tuple[str, Table]]) -> "OnnxFile":
        """Of an ONNX file's bytes."""
        graph = super().__new__(cls, data)
        graph.tables = tables
        return graph


def tables_of(graph: object) -> Mapping[str, tuple[str, Table]]:
    """A graph's large tables, none of what is none that was just exported."""
    return graph.tables if isinstance(graph, OnnxFile) else {}


def table_files(graphs: Iterable[bytes]) -> dict[str, Contents]:
    """The files of the large tables of all of them, by name."""
    return {file: table.data for graph in graphs for file, table in tables_of(graph).values()}


def request_graph(
    module: nn.Module, schema: Schema, sample: Feeds, outputs: Sequence[str], facts: Mapping[str, str] | None = None
) -> OnnxFile:
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
) -> OnnxFile:
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
    tables = laid_beside(program.model.graph.initializers)
    model = program.model_proto
    model.ir_version = IR
    for name, value in (facts or {}).items():
        model.metadata_props.add(key=name, value=value)
    return OnnxFile(model.SerializeToString(), tables)


def laid_beside(tensors: Mapping[str, ir.Value]) -> dict[str, tuple[str, Table]]:
    """The large ones of a model's tensors that it only gathers from; it has their places instead."""
    tables = {}
    for name, tensor in tensors.items():
        value, gathered = tensor.const_value, all((use.node.op_type, use.idx) == ("Gather", 0) for use in tensor.uses())
        if value is not None and gathered and is_large(table := np.ascontiguousarray(value.numpy())):
            tables[name] = file, _ = file_of(table), table
            tensor.const_value = ir.ExternalTensor(file, 0, table.nbytes, value.dtype, shape=ir.Shape(table.shape), name=name)
    return tables
