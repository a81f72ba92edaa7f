"""What fields have to say together: sums over single fields and over pairs of them, each half computed where it is known.

Shapes: R requests, C candidates; `u (R, Fu, D)` are the vectors of the request's fields, `a (R, C, Fa, D)` those of the candidates'.
"""

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor, nn

from .contract import RequestTensors
from .embeddings import Embeddings

FEW = 2
"""Pairs for each field of a candidate up to which they are few: one by one they cost a copy each, and all together a product."""


def first_order(weights: Embeddings, request: RequestTensors) -> Tensor:
    """The sum of the fields' weights `(R, C)`, of embeddings that are one number wide."""
    linear: Tensor = weights.of_request(request).sum(1) + weights("ad", request.ad).sum(2).squeeze(-1)
    return linear


def each_field(weights: Embeddings, request: RequestTensors) -> tuple[Sequence[str], Tensor]:
    """The addends of `first_order`, by field `(R, C, F)`."""
    return weights.names, weights.of_all(request).squeeze(-1)


def each_pair(names: Sequence[str], vectors: Tensor) -> tuple[Sequence[str], Tensor]:
    """The inner product of every pair of fields `(R, C, P)`, of all `vectors (R, C, F, D)`, in the order of `combinations`."""
    left, right = torch.triu_indices(len(names), len(names), 1)
    products = (vectors @ vectors.transpose(2, 3)).flatten(2)
    return ["*".join(pair) for pair in combinations(names, 2)], products[..., left * len(names) + right]


def inner_products(u: Tensor, a: Tensor) -> Tensor:
    """The sum over all pairs of fields of their vectors' inner product `(R, C)`.

    As half the square of the sum less the sum of squares (Rendle 2010, lemma 3.1), so that the request's sums are shared.
    """
    total = u.sum(1).unsqueeze(1) + a.sum(2)
    squares = u.square().sum(1).unsqueeze(1) + a.square().sum(2)
    return 0.5 * (total.square() - squares).sum(-1)


class PairwiseProducts(nn.Module):
    """The inner product of every pair of fields, each by itself: those within the request once a request."""

    def __init__(self, request: int, candidate: int) -> None:
        super().__init__()
        self.within = tuple(zip(*combinations(range(request), 2), strict=True)) or ((), ())
        self.among = tuple(zip(*combinations(range(candidate), 2), strict=True)) or ((), ())
        self.request = request * (request - 1) // 2
        self.candidate = request * candidate + candidate * (candidate - 1) // 2

    def forward(self, u: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """`(R, request)` of the request's own pairs, and `(R, C, candidate)` of each candidate field's with them, then of its own."""
        left, right = self.among
        found = [(a[:, :, left] * a[:, :, right]).sum(-1)]
        if not u.shape[1]:
            return u.new_zeros((len(u), 0)), found[0]
        found.insert(0, (a @ u.transpose(1, 2).unsqueeze(1)).flatten(2))
        left, right = self.within
        return (u[:, left] * u[:, right]).sum(-1), torch.cat(found, dim=2)


class WeightedProducts(nn.Module):
    """The sum over all pairs i < j of fields of r_ij ⟨v_i, v_j⟩, with a weight r_ij `(P,)` for each (FwFM, eq. 3)."""

    place: Tensor

    def __init__(self, request: int, candidate: int) -> None:
        super().__init__()
        count = request + candidate
        pairs = list(combinations(range(count), 2))
        self.request = request
        self.weight = nn.Parameter(torch.ones(len(pairs)))
        place = torch.full((count, count), len(pairs))  # the diagonal: a 0 behind the weights
        for number, (i, j) in enumerate(pairs):
            place[i, j] = place[j, i] = number
        self.register_buffer("place", place, persistent=False)

    def matrix(self) -> Tensor:
        """The weights as a symmetric matrix `(F, F)` with zeros on its diagonal."""
        return torch.cat([self.weight, self.weight.new_zeros(1)])[self.place]

    def forward(self, u: Tensor, a: Tensor) -> Tensor:
        """The sums `(R, C)`."""
        return weighted_products(u, a, self.matrix(), self.request)

    def explained(self, names: Sequence[str], vectors: Tensor) -> tuple[Sequence[str], Tensor]:
        """The addends, by pair: see `each_pair`."""
        pairs, products = each_pair(names, vectors)
        return pairs, products * self.weight

    def fused(self, _tile: int | None) -> nn.Module:
        """See `fuse.py`."""
        return FusedProducts(self)


class FusedProducts(nn.Module):
    """`WeightedProducts` of which the pairs of two of the candidate's fields are taken one by one where few have a weight."""

    def __init__(self, products: WeightedProducts) -> None:
        super().__init__()
        weights, self.request = products.matrix().detach(), products.request
        among = weights[self.request :, self.request :].triu()
        pairs = among.nonzero()
        self.few = len(pairs) <= FEW * len(among)
        self.left, self.right = (pairs[:, i].tolist() for i in range(2))
        self.pairs = nn.Buffer(among[self.left, self.right])
        if self.few:
            weights[self.request :, self.request :] = 0
        self.weights = nn.Buffer(weights)

    def forward(self, u: Tensor, a: Tensor) -> Tensor:
        """The sums `(R, C)`."""
        if not self.few:
            return weighted_products(u, a, self.weights, self.request)
        total = a.new_zeros(1, 1)
        if self.request:
            once = self.weights[:, : self.request] @ u
            within = 0.5 * (u * once[:, : self.request]).sum((1, 2)).unsqueeze(1)
            total = within + (a.flatten(2) @ once[:, self.request :].flatten(1).unsqueeze(2)).squeeze(-1)
        if self.left:
            total = total + (a[:, :, self.left] * a[:, :, self.right]).sum(-1) @ self.pairs
        return total


def weighted_products(u: Tensor, a: Tensor, weights: Tensor, request: int) -> Tensor:
    """Half of Σ_i ⟨v_i, Σ_j r_ij v_j⟩ `(R, C)`, of symmetric weights `(F, F)` whose first fields are the request's."""
    among_ads = (a * (weights[request:, request:] @ a)).sum((2, 3))
    if not request:  # products over no field are not for every version of ONNX Runtime
        return 0.5 * among_ads
    within = (u * (weights[:request, :request] @ u)).sum((1, 2))
    across = a.flatten(2) @ (weights[request:, :request] @ u).flatten(1).unsqueeze(2)
    return 0.5 * (within.unsqueeze(1) + among_ads) + across.squeeze(-1)
