"""FinalMLP: two MLPs, each looking at the fields through a gate of its own, fused bilinearly (Mao et al. 2023, https://arxiv.org/abs/2304.00902).

The first gate is opened by the request side, the second by the ad, where the paper leaves the choice of fields to a search. They read
the vectors that the MLPs read; the authors' program gives them vectors of their own. The history, where there is one, joins as one
more field for each of its own: the mean over the behaviours.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .contract import CLICK, Fields, Network, RequestTensors
from .embeddings import Embeddings, beside, flat
from .layers import MLP, SplitMLP, begin_linear


@dataclass(frozen=True)
class FinalMLPSettings:
    """Widths, gates and heads of a FinalMLP."""

    embedding: int = 16
    """Width of every value's vector."""
    hidden: tuple[int, ...] = (400, 400, 400)
    """Widths of the layers of the first MLP, whose gate the request side opens."""
    hidden_second: tuple[int, ...] = (800,)
    """Widths of the layers of the second MLP, whose gate the ad opens."""
    dropout: float = 0.2
    """Share of the first MLP's activations that a training step leaves out."""
    dropout_second: float = 0.2
    """The same of the second MLP."""
    gates: bool = True
    """Weigh the fields anew for each MLP; without, both see the same."""
    gate_hidden: int = 64
    """Width of the hidden layer of a gate."""
    fusion_heads: int = 2
    """Parts into which both MLPs' outputs are cut, each with a bilinear product of its own."""


class FinalMLP(Network):
    """Two MLPs, each with a gate on the fields, fused by a bilinear product of several heads (Mao et al. 2023)."""

    settings = FinalMLPSettings
    intercept_at = "fusion.bias"

    def __init__(self, fields: Fields, settings: FinalMLPSettings) -> None:
        super().__init__(fields, settings)
        first, second, heads = settings.hidden[-1], settings.hidden_second[-1], settings.fusion_heads
        if heads < 1 or first % heads or second % heads:
            raise ValueError(f"fusion_heads is {heads}; it must divide the last widths of hidden and hidden_second, {first} and {second}")
        self.request, candidate = fields.request * settings.embedding, fields.count("ad") * settings.embedding
        width = self.request + candidate
        self.embed = Embeddings(fields, settings.embedding)
        self.by_request = FeatureGate(self.request, settings.gate_hidden, width) if settings.gates else None
        self.by_ad = FeatureGate(candidate, settings.gate_hidden, width) if settings.gates else None
        self.first = SplitMLP(self.request, candidate, settings.hidden, settings.dropout)
        self.second = MLP(width, settings.hidden_second, settings.dropout_second)
        self.fusion = BilinearFusion(first, second, heads)

    def forward(self, request: RequestTensors) -> dict[str, Tensor]:
        """Logits `(R, C)`. The first gate is computed once a request."""
        u, a = flat(self.embed.of_request(request)), self.embed("ad", request.ad).flatten(2)
        one, two = (u, a), beside(u, a)
        if self.by_request is not None and self.by_ad is not None:
            gate = self.by_request(u)
            one, two = (u * gate[:, : self.request], a * gate[:, None, self.request :]), two * self.by_ad(a)
        return {CLICK: self.fusion(self.first(*one), self.second(two))}


class FeatureGate(nn.Module):
    """Eq. 4 and 5: 2 σ(MLP(context)), a factor between 0 and 2 for each value of an input; a learned one where there is no context."""

    def __init__(self, context: int, hidden: int, width: int) -> None:
        super().__init__()
        layers = [nn.Linear(context, hidden), nn.ReLU(), nn.Linear(hidden, width)] if context else []
        self.mlp, self.constant = nn.Sequential(*layers), None if context else nn.Parameter(torch.zeros(width))
        begin_linear(*layers)

    def forward(self, context: Tensor) -> Tensor:
        """`(..., width)` of `context (..., context)`."""
        openness = self.mlp(context) if self.constant is None else self.constant.expand(*context.shape[:-1], -1)
        return 2 * torch.sigmoid(openness)


class BilinearFusion(nn.Module):
    """Eq. 8 and 9: b + w_1ᵀ o_1 + w_2ᵀ o_2 + Σ_h o_1hᵀ W_h o_2h, over the heads' parts of o_1 and o_2."""

    def __init__(self, first: int, second: int, heads: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(first, 1), nn.Linear(second, 1, bias=False)
        matrices = torch.empty(heads, first // heads, second // heads)
        # So many products add up to a logit that a layer's usual weights would begin far from 0.
        self.matrices = nn.Parameter(nn.init.normal_(matrices, std=matrices.numel() ** -0.5))

    @property
    def bias(self) -> Tensor:
        """B `(1,)`."""
        return self.first.bias

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Logits `(R, C)` of o_1 `(R, C, H_1)` and o_2 `(R, C, H_2)`."""
        heads, width, _ = self.matrices.shape
        turned = first.reshape(-1, heads, width).transpose(0, 1) @ self.matrices  # (heads, R C, H_2 / heads)
        products = (turned.transpose(0, 1).reshape(second.shape) * second).sum(-1)
        linear: Tensor = self.first(first) + self.second(second)
        return linear.squeeze(-1) + products
