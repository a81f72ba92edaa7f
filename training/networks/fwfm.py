"""Field-weighted factorisation machine: a weight for every pair of fields (Pan et al. 2018, https://arxiv.org/abs/1806.03514).

Eq. 3: logit = w_0 + linear + Σ_{i<j} r_ij ⟨v_i, v_j⟩ x_i x_j, where r_ij belongs to the two fields. The linear part is what the paper
recommends (FwFMs_FiLV): ⟨v_i, w_F(i)⟩, one vector w for each field; `linear=value` gives each value a weight instead (FwFMs_LW).
The weights r begin at 1, as a factorisation machine. Lists, numbers and the history are fields as in DeepFM.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .contract import CLICK, Explained, Fields, Network, RequestTensors
from .embeddings import Embeddings
from .interactions import WeightedProducts, each_field, first_order

LINEAR = ("field", "value")


@dataclass(frozen=True)
class FwFMSettings:
    """The width of a field-weighted factorisation machine, and its linear part."""

    embedding: int = 16
    """Width of every value's vector."""
    linear: str = "field"
    """The linear part: `field`, the value's vector times a vector of its field (FiLV), or `value`, a weight for every value (LW)."""


class FieldLinear(nn.Module):
    """Σ_i ⟨v_i, w_F(i)⟩, with a vector w `(F, D)` for each field."""

    def __init__(self, request: int, candidate: int, width: int) -> None:
        super().__init__()
        self.request = request
        self.weight = nn.Parameter(torch.empty(request + candidate, width).normal_(std=1e-2))

    def forward(self, u: Tensor, a: Tensor) -> Tensor:
        """The sum `(R, C)` of `u (R, Fu, D)` and `a (R, C, Fa, D)`."""
        once = (u * self.weight[: self.request]).sum((1, 2)).unsqueeze(1)
        return once + (a * self.weight[self.request :]).sum((2, 3))

    def explained(self, vectors: Tensor) -> Tensor:
        """The addends, by field `(R, C, F)`, of all `vectors (R, C, F, D)`."""
        return (vectors * self.weight).sum(-1)


class FwFM(Network):
    """The inner product of every pair, weighted by its two fields (Pan et al. 2018)."""

    settings = FwFMSettings
    embedding_l2 = 1e-5

    def __init__(self, fields: Fields, settings: FwFMSettings) -> None:
        super().__init__(fields, settings)
        if settings.linear not in LINEAR:
            raise ValueError(f"linear is {settings.linear!r}; it must be {' or '.join(LINEAR)}")
        self.second = Embeddings(fields, settings.embedding)
        sides = fields.request, fields.count("ad")
        self.first = Embeddings(fields, 1) if settings.linear == "value" else None
        self.linear = FieldLinear(*sides, settings.embedding) if settings.linear == "field" else None
        self.pairs = WeightedProducts(*sides)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, request: RequestTensors) -> dict[str, Tensor]:
        """Logits `(R, C)`. What concerns the request side alone is computed once a request."""
        u, a = self.second.of_request(request), self.second("ad", request.ad)
        linear = self.linear(u, a) if self.linear is not None else 0.0
        if self.first is not None:
            linear = linear + first_order(self.first, request)
        return {CLICK: linear + self.pairs(u, a) + self.bias}

    def explained(self, request: RequestTensors) -> Explained:
        """The linear part by field, and each pair's weighted product."""
        names, vectors = self.second.names, self.second.of_all(request)
        linear: list[tuple[Sequence[str], Tensor]] = [(names, self.linear.explained(vectors))] if self.linear is not None else []
        if self.first is not None:
            linear.append(each_field(self.first, request))
        return Explained.of(*linear, self.pairs.explained(names, vectors))
