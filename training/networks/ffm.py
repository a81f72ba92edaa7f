"""Field-aware factorisation machine: a vector for every other field (Juan et al. 2016, https://doi.org/10.1145/2959100.2959134).

Eq. 4, with the linear terms that the authors' program has: logit = w_0 + Σ_i w_i x_i + Σ_{i<j} ⟨v_i,F(j), v_j,F(i)⟩ x_i x_j. Of k
numbers each, a value has vectors for the F - 1 other fields, so that the weights are vocabulary × (F - 1) × k: what is too large is
refused. Adam instead of the paper's Adagrad, no normalisation of rows. Lists, numbers and the history are fields as in DeepFM.
"""

from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor, nn

from .contract import CLICK, Explained, Fields, Network, RequestTensors
from .embeddings import Embeddings
from .interactions import each_field, first_order

BYTES = 16
"""Of one trained number: the weight, its gradient and Adam's two moments, in float32."""


@dataclass(frozen=True)
class FFMSettings:
    """The width of a field-aware factorisation machine, and the memory that it may take."""

    embedding: int = 4
    """Width k of each of a value's vectors, of which it has one for every other field."""
    most_gigabytes: float = 4.0
    """What its vectors, vocabulary x (fields - 1) x k, may take while they are trained: 16 bytes a number."""


class FFM(Network):
    """The inner product of every pair, of vectors that each value has for the other's field (Juan et al. 2016)."""

    settings = FFMSettings
    embedding_l2 = 1e-5
    within: Tensor
    across: Tensor

    def __init__(self, fields: Fields, settings: FFMSettings) -> None:
        super().__init__(fields, settings)
        _check(fields, settings)
        others, self.width = fields.all - 1, settings.embedding
        self.first, self.second = Embeddings(fields, 1), Embeddings(fields, others * settings.embedding)
        self.bias = nn.Parameter(torch.zeros(1))
        # Pair (i, j) takes vector j - 1 of field i and vector i of field j: a field has none for itself.
        self.pairs = sorted(combinations(range(fields.all), 2), key=lambda pair: pair[1] >= fields.request)
        vectors = torch.tensor([(i * others + j - 1, j * others + i) for i, j in self.pairs]).T
        within = fields.request * (fields.request - 1) // 2
        self.register_buffer("within", vectors[:, :within], persistent=False)
        self.register_buffer("across", vectors[:, within:], persistent=False)

    def forward(self, request: RequestTensors) -> dict[str, Tensor]:
        """Logits `(R, C)`. Pairs of the request's own fields are computed once a request."""
        u, a = self.second.of_request(request), self._by_field(self.second("ad", request.ad))
        logits = first_order(self.first, request) + self.bias
        if u.shape[1]:
            u = self._by_field(u)
            logits = logits + (u[:, self.within[0]] * u[:, self.within[1]]).sum((1, 2)).unsqueeze(1)
            a = torch.cat([u.unsqueeze(1).expand(-1, a.shape[1], -1, -1), a], dim=2)
        return {CLICK: logits + (a[:, :, self.across[0]] * a[:, :, self.across[1]]).sum((2, 3))}

    def explained(self, request: RequestTensors) -> Explained:
        """Each field's weight and each pair's product."""
        names, vectors = self.first.names, self._by_field(self.second.of_all(request))
        left, right = torch.cat([self.within, self.across], dim=1)
        products = (vectors[:, :, left] * vectors[:, :, right]).sum(-1)
        return Explained.of(each_field(self.first, request), ([f"{names[i]}*{names[j]}" for i, j in self.pairs], products))

    def _by_field(self, vectors: Tensor) -> Tensor:
        """`(..., F, (F - 1) k)` to `(..., F (F - 1), k)`."""
        return vectors.reshape(*vectors.shape[:-2], -1, self.width)


def _check(fields: Fields, settings: FFMSettings) -> None:
    if fields.all < 2:
        raise ValueError("FFM is about pairs of fields, and this schema has one field; train lr instead")
    values = sum(size - 1 for size in fields.sizes.values()) + 1
    numbers = values * (fields.all - 1) * settings.embedding
    if numbers * BYTES > settings.most_gigabytes * 1e9:
        raise ValueError(
            f"FFM has {values:,} values x {fields.all - 1} other fields x {settings.embedding} numbers: {numbers:,}, which take "
            f"{numbers * BYTES / 1e9:,.2f} GB to train, and most_gigabytes is {settings.most_gigabytes:g}; set it higher, set a smaller "
            "embedding, hash the large fields into buckets, or train fwfm, which has a weight for every pair of fields instead"
        )
