"""Deep & Cross Network: products of features of a stated degree beside an MLP (Wang et al. 2017, https://arxiv.org/abs/1708.05123).

Different from the paper: a number scales a vector of its own instead of joining the input as it is, and the history, where there is
one, joins as one more field for each of its own: the mean over the behaviours.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .contract import CLICK, Fields, MLPSettings, Network, RequestTensors
from .crosses import VectorCross
from .embeddings import Embeddings, beside, flat
from .layers import SplitMLP


@dataclass(frozen=True)
class DCNSettings(MLPSettings):
    """Widths, depth and dropout of a DCN."""

    crosses: int = 3
    """Cross layers: the products have one factor more than this at most."""


class DCN(Network):
    """Cross layers, a vector of weights each, beside an MLP (Wang et al. 2017)."""

    settings = DCNSettings
    intercept_at = "last.bias"

    def __init__(self, fields: Fields, settings: DCNSettings) -> None:
        super().__init__(fields, settings)
        if settings.crosses < 1:
            raise ValueError(f"crosses is {settings.crosses}; DCN needs at least 1 cross layer")
        request, candidate = fields.request * settings.embedding, fields.count("ad") * settings.embedding
        self.embed = Embeddings(fields, settings.embedding)
        self.cross = VectorCross(request + candidate, settings.crosses)
        self.deep = SplitMLP(request, candidate, settings.hidden, settings.dropout)
        self.last = nn.Linear(request + candidate + settings.hidden[-1], 1)

    def forward(self, request: RequestTensors) -> dict[str, Tensor]:
        """Logits `(R, C)`."""
        u, a = flat(self.embed.of_request(request)), self.embed("ad", request.ad).flatten(2)
        both = torch.cat([self.cross(beside(u, a)), self.deep(u, a)], dim=-1)  # eq. 5
        return {CLICK: self.last(both).squeeze(-1)}
