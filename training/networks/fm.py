"""Factorisation machine: what two values have to say together is the product of their vectors (Rendle 2010, https://doi.org/10.1109/ICDM.2010.127).

Eq. 1: logit = w_0 + Σ_i w_i x_i + Σ_{i<j} ⟨v_i, v_j⟩ x_i x_j. The fields are DeepFM's, which has it inside: a list's vector is the
mean of its values', a number's its own multiple of one, and the history joins as the mean over the behaviours.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .contract import CLICK, Explained, Fields, Network, RequestTensors
from .embeddings import Embeddings
from .interactions import each_field, each_pair, first_order, inner_products


@dataclass(frozen=True)
class FMSettings:
    """The width of a factorisation machine."""

    embedding: int = 16
    """Width of every value's vector."""


class FM(Network):
    """A weight for every value and the inner product of every pair: factorisation machine (Rendle 2010)."""

    settings = FMSettings
    embedding_l2 = 1e-5

    def __init__(self, fields: Fields, settings: FMSettings) -> None:
        super().__init__(fields, settings)
        self.first, self.second = Embeddings(fields, 1), Embeddings(fields, settings.embedding)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, request: RequestTensors) -> dict[str, Tensor]:
        """Logits `(R, C)`. The request side's sums are computed once a request."""
        u, a = self.second.of_request(request), self.second("ad", request.ad)
        return {CLICK: first_order(self.first, request) + inner_products(u, a) + self.bias}

    def explained(self, request: RequestTensors) -> Explained:
        """Each field's weight and each pair's product."""
        return Explained.of(each_field(self.first, request), each_pair(self.first.names, self.second.of_all(request)))
