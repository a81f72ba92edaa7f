"""What a bundle has for requests that ask why: a graph of what its network says of its logits, with the same weights."""

import json
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from features.bundle import ATTENTION, CONTRIBUTIONS, EXPLAIN_MODEL, REST, BundleError
from features.encode import Feeds
from features.schema import Schema

from ..networks.contract import CLICK, Network, RequestTensors
from ..networks.fuse import fused
from .graph import Array, open_graph
from .onnx import request_graph

TOLERANCE = 1e-5
"""Largest difference between ONNX Runtime and torch, of the largest number there or of 1, whichever is more: see `export.TOLERANCE`."""


class Explaining(nn.Module):
    """What a network says of its logits, those of its outputs that it has: of the tensors of `Schema.tensors`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Contributions `(R, C, K + 1)`, at the end what is left of the logit, and attention `(R, C, T)`."""
        request, found = RequestTensors.of(tensors), []
        explained = self.network.explained(request)  # type: ignore[operator]  # a `Network`
        if explained.addends is not None:
            rest = self.network(request)[CLICK] - explained.addends.sum(-1)
            found.append(torch.cat([explained.addends, rest.unsqueeze(-1)], dim=-1))
        if explained.attention is not None:
            found.append(explained.attention)
        return tuple(found)


def explain_graph(network: Network, schema: Schema, cases: Sequence[Feeds]) -> tuple[dict[str, bytes], list[str]]:
    """The file of the graph and its outputs, none of either where the network has nothing to say; compared with torch on some requests.

    Raises:
        BundleError: ONNX Runtime and torch differ.
    """
    with torch.no_grad():
        additive = network.explained(RequestTensors.of(tensors_of(cases[0])))
    outputs = [name for name, values in ((CONTRIBUTIONS, additive.addends), (ATTENTION, additive.attention)) if values is not None]
    if not outputs:
        return {}, []
    names = {CONTRIBUTIONS: json.dumps([*additive.names, REST])} if additive.names else {}
    graph = request_graph(Explaining(fused(network, None, explaining=True)).eval(), schema, cases[0], outputs, names)
    session = open_graph(graph)
    inputs = [entry.name for entry in session.get_inputs()]
    for feeds in cases:
        if not all(map(_close, session.run(outputs, {name: feeds[name] for name in inputs}), explained(network, feeds))):
            raise BundleError("ONNX Runtime and torch explain a request differently; nothing was published")
    return {EXPLAIN_MODEL: graph}, outputs


def explained(network: Network, feeds: Feeds) -> list[Array]:
    """What torch says of a request: the outputs of the graph."""
    with torch.no_grad():
        return [values.numpy() for values in Explaining(network)(tensors_of(feeds))]


def tensors_of(feeds: Feeds) -> dict[str, Tensor]:
    """A request's arrays as tensors."""
    return {name: torch.from_numpy(values) for name, values in feeds.items()}


def _close(ours: Array, theirs: Array) -> bool:
    return bool(np.abs(ours - theirs).max() <= TOLERANCE * max(1.0, np.abs(theirs).max()))
