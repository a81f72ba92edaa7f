"""DCN-V2: cross layers with a matrix each, or a mixture of matrices of low rank (Wang et al. 2021, https://arxiv.org/abs/2008.13535).

Different from the paper: a number scales a vector of its own instead of joining the input as it is, and the history, where there is
one, joins as one more field for each of its own: the mean over the behaviours.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .contract import CLICK, Fields, MLPSettings, Network, RequestTensors
from .crosses import MatrixCross, MixtureCross
from .embeddings import Embeddings
from .layers import MLP


@dataclass(frozen=True)
class DCNV2Settings(MLPSettings):
    """Widths, depth and structure of a DCN-V2."""

    structure: str = "parallel"
    """`parallel`: the MLP beside the cross layers; `stacked`: upon them."""
    crosses: int = 3
    """Cross layers: the products have one factor more than this at most."""
    low_rank: int = 0
    """Rank of a cross layer's matrix; 0: full."""
    experts: int = 1
    """Matrices of low rank that a cross layer chooses from by a gate; 1: no gate."""


class DCNV2(Network):
    """Cross layers, a matrix or a mixture of experts each, beside or below an MLP (Wang et al. 2021)."""

    settings = DCNV2Settings
    intercept_at = "last.bias"

    def __init__(self, fields: Fields, settings: DCNV2Settings) -> None:
        super().__init__(fields, settings)
        _check(settings)
        width, layers = fields.all * settings.embedding, settings.crosses
        self.embed = Embeddings(fields, settings.embedding)
        self.cross = (
            MixtureCross(width, layers, settings.low_rank, settings.experts)
            if settings.experts > 1
            else MatrixCross(width, layers, settings.low_rank)
        )
        self.stacked = settings.structure == "stacked"
        self.deep = MLP(width, settings.hidden, settings.dropout)
        self.last = nn.Linear(settings.hidden[-1] + (0 if self.stacked else width), 1)

    def forward(self, request: RequestTensors) -> dict[str, Tensor]:
        """Logits `(R, C)`."""
        start = self.embed.of_all(request).flatten(2)
        crossed = self.cross(start)
        top = self.deep(crossed) if self.stacked else torch.cat([crossed, self.deep(start)], dim=-1)
        return {CLICK: self.last(top).squeeze(-1)}


def _check(settings: DCNV2Settings) -> None:
    """Raises ValueError where the settings contradict each other."""
    if settings.structure not in ("stacked", "parallel"):
        raise ValueError(f"structure is {settings.structure!r}; it must be stacked or parallel")
    if settings.crosses < 1 or settings.experts < 1 or settings.low_rank < 0:
        raise ValueError("crosses and experts must be at least 1, low_rank at least 0")
    if settings.experts > 1 and not settings.low_rank:
        raise ValueError(f"experts is {settings.experts}, and experts are matrices of low rank; set low_rank too, such as 32")
