"""Product-based neural networks: an MLP on the fields and on their products (Qu et al. 2016, https://arxiv.org/abs/1611.00144).

Eq. 2: l_1 = relu(l_z + l_p + b_1), where l_z = W_z · z are linear signals of the fields' vectors f_1 .. f_F, and l_p = W_p · p signals of
their products. Both are one linear layer over [z, p], the MLP's first. Three things are called OPNN: the paper's, whose products are
superposed (eq. 13), p = f_Σ f_Σᵀ with f_Σ = Σ_i f_i; a kernel for each pair of fields, f_iᵀ K_ij f_j, of later programs; and the outer
product of each pair, flattened. This is the paper's.

Different from it: IPNN's W_p is a full matrix rather than of rank 1 (eq. 10), since pairs are few beside the MLP; of the symmetric
f_Σ f_Σᵀ the upper triangle is taken; z has no constant, which b_1 is; batch norm before each ReLU, as in all MLPs here; and the
history joins as one more field for each of its own: the mean over the behaviours.
"""

from itertools import combinations_with_replacement

import torch
from torch import Tensor, nn

from .contract import CLICK, Fields, MLPSettings, Network, RequestTensors
from .embeddings import Embeddings, flat
from .interactions import PairwiseProducts
from .layers import Tower


class IPNN(Network):
    """An MLP on vectors and the inner product of every pair of fields (Qu et al. 2016)."""

    settings = MLPSettings
    intercept_at = "tower.bias"

    def __init__(self, fields: Fields, settings: MLPSettings) -> None:
        super().__init__(fields, settings)
        width, sides = settings.embedding, (fields.request, fields.count("ad"))
        self.embed, self.products = Embeddings(fields, width), PairwiseProducts(*sides)
        widths = sides[0] * width + self.products.request, sides[1] * width + self.products.candidate
        self.tower = Tower(*widths, settings.hidden, settings.dropout)

    def forward(self, request: RequestTensors) -> dict[str, Tensor]:
        """Logits `(R, C)`. What concerns the request side alone is computed once a request."""
        u, a = self.embed.of_request(request), self.embed("ad", request.ad)
        within, across = self.products(u, a)
        return {CLICK: self.tower(torch.cat([flat(u), within], 1), torch.cat([a.flatten(2), across], 2))}


class SuperposedOuterProduct(nn.Module):
    """Eq. 13: f_Σ f_Σᵀ of the sum f_Σ `(..., D)` of all fields, as its upper triangle `(..., D (D + 1) / 2)`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        pairs = combinations_with_replacement(range(width), 2)
        self.left, self.right = zip(*pairs, strict=True)
        self.width = len(self.left)

    def forward(self, total: Tensor) -> Tensor:
        """The products of `total (..., D)`."""
        return total[..., self.left] * total[..., self.right]


class OPNN(Network):
    """An MLP on vectors and the outer product of their sum with itself (Qu et al. 2016, superposed)."""

    settings = MLPSettings
    intercept_at = "tower.bias"

    def __init__(self, fields: Fields, settings: MLPSettings) -> None:
        super().__init__(fields, settings)
        width = settings.embedding
        self.embed, self.product = Embeddings(fields, width), SuperposedOuterProduct(width)
        candidate = fields.count("ad") * width + self.product.width
        self.tower = Tower(fields.request * width, candidate, settings.hidden, settings.dropout)

    def forward(self, request: RequestTensors) -> dict[str, Tensor]:
        """Logits `(R, C)`."""
        u, a = self.embed.of_request(request), self.embed("ad", request.ad)
        total = u.sum(1).unsqueeze(1) + a.sum(2)  # (R, C, D)
        return {CLICK: self.tower(flat(u), torch.cat([a.flatten(2), self.product(total)], 2))}
