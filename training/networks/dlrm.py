"""DLRM: an MLP for the numbers, and inner products of its output and all categories' vectors (Naumov et al. 2019, https://arxiv.org/abs/1906.00091).

The history, where there is one, joins as the means over the behaviours: of its numbers, and of the vectors of each of its categories.
Different from the paper: batch norm in both MLPs. Without numbers the bottom MLP is not there, and the top sees the products alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .contract import CLICK, Fields, MLPSettings, Network, RequestTensors
from .embeddings import Embeddings, numbers_of
from .interactions import PairwiseProducts
from .layers import MLP, Tower


@dataclass(frozen=True)
class DLRMSettings(MLPSettings):
    """Widths and dropout of a DLRM."""

    embedding: int = 16
    """Width of every category's vector, and of what the bottom MLP makes of the numbers."""
    bottom: tuple[int, ...] = (64,)
    """Widths of the bottom MLP's layers, before the last of them, which is as wide as an embedding."""
    dropout: float = 0.1
    """Share of the top MLP's activations that a training step leaves out."""


class DLRM(Network):
    """An MLP for the numbers; an MLP on the inner products of its output and the categories (Naumov et al. 2019)."""

    settings = DLRMSettings
    intercept_at = "top.bias"

    def __init__(self, fields: Fields, settings: DLRMSettings) -> None:
        super().__init__(fields, settings)
        width, categories, numbers = settings.embedding, fields.categories, fields.numbers
        if not categories.all:
            raise ValueError("dlrm multiplies categories' vectors, and this schema has only numbers; train deepfm instead")
        self.embed = Embeddings(categories, width)
        self.bottom = MLP(numbers, (*settings.bottom, width), 0.0) if numbers else None
        dense = int(numbers > 0)
        self.products = PairwiseProducts(categories.request, categories.count("ad") + dense)
        self.top = Tower(self.products.request, self.products.candidate + dense * width, settings.hidden, settings.dropout)

    def forward(self, request: RequestTensors) -> dict[str, Tensor]:
        """Logits `(R, C)`. The products of two of the request's fields are taken once a request."""
        u = self.embed.of_request(request)  # (R, Fu, D)
        vectors = [self.embed("ad", request.ad)] if "ad" in self.embed else []  # (R, C, Fa, D)
        dense = [] if self.bottom is None else [self.bottom(numbers_of(request))]  # (R, C, D)
        once, each = self.products(u, torch.cat([*(vector.unsqueeze(2) for vector in dense), *vectors], dim=2))
        return {CLICK: self.top(once, torch.cat([*dense, each], dim=-1))}
