"""Logistic regression: a weight for every value of every field (Richardson et al. 2007, https://dl.acm.org/doi/10.1145/1242572.1242643).

logit = w_0 + Σ_i w_i x_i. What the other networks have to beat. Where the paper's x are features made of an ad's history of clicks,
x are here the values themselves: a list's is the mean of its values' weights, a number's its own multiple of one weight, and the
history, where there is one, joins as one more field for each of its own: the mean over the behaviours.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .contract import CLICK, Explained, Fields, Network, RequestTensors
from .embeddings import Embeddings
from .interactions import each_field, first_order


@dataclass(frozen=True)
class LRSettings:
    """A logistic regression has no widths."""


class LR(Network):
    """A weight for every value: logistic regression (Richardson et al. 2007)."""

    settings = LRSettings
    embedding_l2 = 1e-5

    def __init__(self, fields: Fields, settings: LRSettings) -> None:
        super().__init__(fields, settings)
        self.first = Embeddings(fields, 1)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, request: RequestTensors) -> dict[str, Tensor]:
        """Logits `(R, C)`."""
        return {CLICK: first_order(self.first, request) + self.bias}

    def explained(self, request: RequestTensors) -> Explained:
        """Each field's weight."""
        return Explained.of(each_field(self.first, request))
