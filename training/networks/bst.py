"""Behaviour Sequence Transformer: behaviours and the candidate in one sequence (Chen et al. 2019, https://arxiv.org/abs/1905.06874).

An item of the sequence is its fields' vectors, each once, beside the vector of its position. That is its age, as in the paper (eq. 1),
in buckets of powers of two (`ages.py`) where requests have ages; else its order from the end: 1 is the last behaviour, 2 the one
before it. The candidate has a vector of its own. Fields that a behaviour does not have join the MLP beside the user's.

Deliberately different: behaviours do not look at the candidate, which came after them, so that they are transformed once a request;
of the last layer only the candidate's place goes to the MLP, so that T is free. With one layer, the paper's best, that place is
what the paper has there. The MLP has Dice and a normalised input, as our DIN's.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .ages import AgeVectors
from .contract import CLICK, Explained, Fields, MLPSettings, Network, RequestTensors
from .embeddings import Embeddings
from .layers import Dropout, Tower


@dataclass(frozen=True)
class BSTSettings(MLPSettings):
    """Widths, layers and dropout of a BST."""

    embedding: int = 16
    """Width of every value's vector, and of a position's."""
    layers: int = 1
    """Transformer layers; the paper's best is 1."""
    attention_heads: int = 4
    """Heads of each layer; they share a behaviour's width, the vectors of its fields and its position side by side."""
    positions: int = 64
    """How many positions have a vector of their own, the candidate's among them; what is further back shares the last. Ages need none."""

    def __post_init__(self) -> None:
        for name, least in (("layers", 1), ("attention_heads", 1), ("positions", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")


class TransformerLayer(nn.Module):
    """Multi-head attention, then a feed-forward layer as wide as its input, each with dropout, a residual and layer norm."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.mix = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.feed = nn.Sequential(nn.Linear(width, width), nn.LeakyReLU(), nn.Linear(width, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, past: Tensor, mask: Tensor, itself: bool) -> Tensor:
        """`x (R, Q, D)` after it looked at `past (R, T, D)` where `mask (R, T)`, and each at `itself` too where it is not in there."""
        x = self.norms[0](x + self.dropout(self.mix(self.attend(x, past, mask, itself))))
        transformed: Tensor = self.norms[1](x + self.dropout(self.feed(x)))
        return transformed

    def attend(self, x: Tensor, past: Tensor, mask: Tensor, itself: bool) -> Tensor:
        """Scaled dot-product attention (eq. 2) of every head, side by side `(R, Q, D)`."""
        weights, values = self.weights(x, past, mask, itself), self._split(self.value(past))
        if not itself:
            return torch.matmul(weights, values).transpose(1, 2).flatten(2)
        mixed = torch.matmul(weights[..., :-1], values) + weights[..., -1:] * self._split(self.value(x))
        return mixed.transpose(1, 2).flatten(2)

    def weights(self, x: Tensor, past: Tensor, mask: Tensor, itself: bool) -> Tensor:
        """How much each head attends to what `(R, heads, Q, T)`; with `itself` one more at the end, of each to itself."""
        queries, keys = self._split(self.query(x)), self._split(self.key(past))
        scores = torch.matmul(queries, keys.transpose(2, 3)).masked_fill(~mask[:, None, None], -1e9)
        if itself:
            scores = torch.cat([scores, (queries * self._split(self.key(x))).sum(-1, keepdim=True)], dim=-1)
        return (scores / math.sqrt(queries.shape[-1])).softmax(-1)

    def _split(self, x: Tensor) -> Tensor:
        """`(R, Q, D)` to `(R, heads, Q, D / heads)`."""
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)


class BST(Network):
    """A transformer over the behaviours and the candidate, with positions (Chen et al. 2019)."""

    settings = BSTSettings
    intercept_at = "tower.bias"

    def __init__(self, fields: Fields, settings: BSTSettings) -> None:
        super().__init__(fields, settings)
        fields.require_history("bst transforms a user's behaviours")
        embedding, self.shared = settings.embedding, fields.shared
        width = (len(self.shared) + 1) * embedding
        if width % settings.attention_heads:
            raise ValueError(
                f"attention_heads is {settings.attention_heads}, which does not divide a behaviour's width of {width}, "
                f"{len(self.shared)} fields and a position of {embedding} each; choose a divisor"
            )
        self.rest = [field for field in range(fields.count("ad")) if field not in self.shared]
        self.embed = Embeddings(fields, embedding)
        self.position = nn.Embedding(1 if fields.ages else settings.positions, embedding)
        nn.init.normal_(self.position.weight, std=1e-2)
        self.ages = AgeVectors(embedding) if fields.ages else None
        self.layers = nn.ModuleList(TransformerLayer(width, settings.attention_heads, settings.dropout) for _ in range(settings.layers))
        candidate = width + len(self.rest) * embedding
        self.tower = Tower(fields.count("user") * embedding, candidate, settings.hidden, settings.dropout, norm="dice")

    def forward(self, request: RequestTensors) -> dict[str, Tensor]:
        """Logits `(R, C)`."""
        ads = self.embed("ad", request.ad)  # (R, C, F, D)
        candidate = self.layers[-1](*self.before_last(ads, request), itself=True)
        user = self.embed("user", request.user).flatten(1) if "user" in self.embed else ads.new_zeros((len(ads), 0))
        return {CLICK: self.tower(user, torch.cat([candidate, ads[:, :, self.rest].flatten(2)], dim=-1))}

    def before_last(self, ads: Tensor, request: RequestTensors) -> tuple[Tensor, Tensor, Tensor]:
        """What the last layer takes: candidates `(R, C, D)`, the past `(R, T, D)` and its mask `(R, T)`."""
        mask = request.history.behaviours()
        past = torch.cat([self.embed("history", request.history).flatten(2), self.positions(request, mask)], dim=-1)
        place = self.position.weight[0].expand(*ads.shape[:2], -1)
        candidate = torch.cat([ads[:, :, self.shared].flatten(2), place], dim=-1)
        for layer in self.layers[:-1]:
            candidate, past = layer(candidate, past, mask, itself=True), layer(past, past, mask, itself=False)
        return candidate, past, mask

    def explained(self, request: RequestTensors) -> Explained:
        """How much a candidate attends to each behaviour in the last layer, as a mean over heads; what is left of 1 is for itself."""
        layer = self.layers[-1]
        assert isinstance(layer, TransformerLayer)  # noqa: S101  # as it was made
        weights = layer.weights(*self.before_last(self.embed("ad", request.ad), request), itself=True)
        return Explained(attention=weights[..., :-1].mean(1))

    def positions(self, request: RequestTensors, mask: Tensor) -> Tensor:
        """The vectors of the behaviours' positions `(R, T, D)`."""
        vectors: Tensor = self.position(self.places(mask)) if self.ages is None else self.ages(request.ages)
        return vectors

    def places(self, mask: Tensor) -> Tensor:
        """The positions `(R, T)` of behaviours, counted from the last of those that `mask (R, T)` tells from padding."""
        order = mask.sum(1, keepdim=True) - torch.arange(mask.shape[1], device=mask.device)
        return order.clamp(1, self.position.num_embeddings - 1)
