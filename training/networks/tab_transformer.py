"""TabTransformer: categories look at each other before an MLP sees them (Huang et al. 2020, https://arxiv.org/abs/2012.06678).

Numbers go around the transformer, through layer norm. That leaves nothing of one number and of two their order, so fewer than three go
in as they are. The history, where there is one, joins as the means over the behaviours: of its numbers, and of the vectors of each of
its categories. Different from the paper: batch norm in the MLP, and a smaller transformer by default (the paper's has embedding 32,
6 layers and 8 heads).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .contract import CLICK, Fields, MLPSettings, Network, RequestTensors
from .embeddings import Embeddings, numbers_of
from .layers import MLP, Dropout

COLUMN_SHARE = 8
"""One in so many of a vector's values tells which field it is of."""
LEAST_NUMBERS = 3


@dataclass(frozen=True)
class TabTransformerSettings(MLPSettings):
    """Widths, layers and dropout of a TabTransformer."""

    embedding: int = 16
    """Width of every category's vector, an eighth of it the field's own."""
    layers: int = 2
    """Transformer layers."""
    attention_heads: int = 4
    """Heads of each layer; they share a vector's width."""
    dropout: float = 0.1
    """Share of the activations, of the transformer and of the MLP, that a training step leaves out."""


class TabTransformer(Network):
    """A transformer over the categories' vectors, then an MLP (Huang et al. 2020)."""

    settings = TabTransformerSettings
    intercept_at = "last.bias"

    def __init__(self, fields: Fields, settings: TabTransformerSettings) -> None:
        super().__init__(fields, settings)
        width, count = settings.embedding, fields.categories.all
        if not count:
            raise ValueError("tab_transformer lets categories look at each other, and this schema has only numbers; train deepfm instead")
        if settings.attention_heads < 1 or width < 2 or width % settings.attention_heads:
            raise ValueError(f"attention_heads is {settings.attention_heads}; it must divide embedding, {width}, which must be at least 2")
        column = max(1, width // COLUMN_SHARE)
        self.embed = Embeddings(fields.categories, width - column)
        self.columns = nn.Parameter(torch.empty(count, column).normal_(std=1e-2))
        self.layers = nn.Sequential(*(FieldAttention(width, settings.attention_heads, settings.dropout) for _ in range(settings.layers)))
        numbers = fields.numbers
        self.norm = nn.LayerNorm(numbers) if numbers >= LEAST_NUMBERS else nn.Identity()
        self.deep = MLP(count * width + numbers, settings.hidden, settings.dropout)
        self.last = nn.Linear(settings.hidden[-1], 1)

    def forward(self, request: RequestTensors) -> dict[str, Tensor]:
        """Logits `(R, C)`."""
        vectors = self.embed.of_all(request)  # (R, C, F, D - column)
        columns = self.columns.expand(*vectors.shape[:2], -1, -1)
        contextual = self.layers(torch.cat([columns, vectors], dim=-1)).flatten(2)
        return {CLICK: self.last(self.deep(torch.cat([contextual, self.norm(numbers_of(request))], dim=-1))).squeeze(-1)}


class FieldAttention(nn.Module):
    """A transformer layer over fields: multi-head attention and a feed-forward layer, each with a residual and layer norm."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.look, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Of `(..., F, D)`, that shape."""
        x = self.norms[0](x + self.dropout(self.mix(self.attend(x))))
        transformed: Tensor = self.norms[1](x + self.dropout(self.feed(x)))
        return transformed

    def attend(self, x: Tensor) -> Tensor:
        """What each field sees of all of them `(..., F, D)`, head by head."""
        query, key, value = (
            part.view(*x.shape[:-1], self.heads, -1).transpose(-3, -2) for part in self.look(x).chunk(3, dim=-1)
        )  # each (..., heads, F, D / heads)
        weights = (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])).softmax(-1)
        seen: Tensor = (weights @ value).transpose(-3, -2).flatten(-2)
        return seen
