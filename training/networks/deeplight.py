"""DeepLight: a DeepFwFM that sheds most of itself while it learns (Deng et al. 2021, https://arxiv.org/abs/2002.06987).

Eq. 7: logit = w_0 + Σ_i ⟨v_i, w_F(i)⟩ + Σ_{i<j} r_ij ⟨v_i, v_j⟩ + MLP(v). Algorithm 1 prunes it: after `prune_from` steps the shares that
are pruned of field pairs, of the MLP and of the embeddings rise as S (1 - D^k), steeply first, each time the smallest by magnitude.

Different from the paper: where it prunes single weights of the MLP and single numbers of embeddings, whole units and whole values go
here, since ONNX Runtime gains nothing by a matrix with zeros in it; the schedule ends, so that an epoch before its end is not chosen;
batch norm in the MLP. What is gone leaves the exported graph: `fused` blocks drop units, pairs, and rows that are equal.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .contract import CLICK, Explained, Fields, MLPSettings, Network, RequestTensors
from .embeddings import Embeddings, FusedEmbeddings, flat, table_of
from .fwfm import FieldLinear
from .interactions import WeightedProducts
from .layers import BatchNorm, Tower

EVERY = 10
"""Steps between two prunings."""
STEEPNESS = 5.0
"""At the schedule's end 1 - exp(-5) of its way would be done; it is stretched to be all of it."""


@dataclass(frozen=True)
class DeepLightSettings(MLPSettings):
    """Widths of a DeepLight, and what is pruned of it, when."""

    prune_pairs: float = 0.9
    """Share of the pairs of fields that is pruned in the end."""
    prune_units: float = 0.7
    """Share of each hidden layer's units that is pruned in the end: 0.7 of both sides leave 9 % of a matrix."""
    prune_values: float = 0.4
    """Share of the values whose vector is pruned in the end: they say nothing, as a missing value does."""
    prune_from: int = 200
    """Steps before the first pruning."""
    prune_steps: int = 600
    """Steps from the first pruning to the last; the network goes on learning after it."""


class PrunedEmbeddings(Embeddings):
    """`Embeddings` of which many rows are equal, and are kept once when they are served."""

    def fused(self, _tile: int | None) -> nn.Module:
        """See `fuse.py`."""
        better = FusedEmbeddings(self)
        rows, where = torch.unique(better.table.weight, dim=0, return_inverse=True)
        if rows.numel() + len(where) < better.table.weight.numel():
            better.table = DistinctRows(rows, where)  # type: ignore[assignment]  # it is called as a table is
        return better


class DistinctRows(nn.Module):
    """A table of many equal rows: the distinct ones, and which each is, in 4 bytes."""

    def __init__(self, rows: Tensor, where: Tensor) -> None:
        super().__init__()
        self.rows, self.where = table_of(rows), nn.Buffer(where.int())

    def forward(self, ids: Tensor) -> Tensor:
        """Rows `(..., D)` of `ids (...)`."""
        rows: Tensor = self.rows(self.where[ids])
        return rows


class DeepLight(Network):
    """FwFM and an MLP, pruned as they learn to serve faster: fields' pairs, units and values (Deng et al. 2021)."""

    settings = DeepLightSettings
    splits = False

    def __init__(self, fields: Fields, settings: DeepLightSettings) -> None:
        super().__init__(fields, settings)
        _check(settings)
        width, sides = settings.embedding, (fields.request, fields.count("ad"))
        self.second = PrunedEmbeddings(fields, width)
        self.linear, self.pairs = FieldLinear(*sides, width), WeightedProducts(*sides)
        self.tower = Tower(sides[0] * width, sides[1] * width, settings.hidden, settings.dropout)
        self.bias = nn.Parameter(torch.zeros(1))
        self.shares, self.settles_after = settings, settings.prune_from + settings.prune_steps
        masks = [torch.ones_like(self.pairs.weight), torch.ones(len(self.second.table.weight), 1)]
        for i, mask in enumerate([*masks, *(torch.ones_like(norm.weight) for norm, _ in self._hidden())]):
            self.register_buffer(f"kept_{i}", mask.detach(), persistent=False)

    def forward(self, request: RequestTensors) -> dict[str, Tensor]:
        """Logits `(R, C)`."""
        u, a = self.second.of_request(request), self.second("ad", request.ad)
        return {CLICK: self.linear(u, a) + self.pairs(u, a) + self.tower(flat(u), a.flatten(2)) + self.bias}

    def explained(self, request: RequestTensors) -> Explained:
        """The linear part by field, and each pair's weighted product; the MLP is the rest."""
        names, vectors = self.second.names, self.second.of_all(request)
        return Explained.of((names, self.linear.explained(vectors)), self.pairs.explained(names, vectors))

    @torch.no_grad()
    def after_step(self, steps: int) -> None:
        """Prune where it is time to, and keep what is pruned at 0."""
        past = steps - self.shares.prune_from
        if 0 < past <= self.shares.prune_steps and (past % EVERY == 0 or past == self.shares.prune_steps):
            self.prune(past / self.shares.prune_steps)
        if past > 0:
            for weight, kept in self.kept():
                weight.mul_(kept)

    def kept(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Weights, and which of them are kept: 1 or 0, spread to their shape."""
        weights = [self.pairs.weight, self.second.table.weight, *(listener.weight for _, listener in self._hidden())]
        return ((weight, self.get_buffer(f"kept_{i}")) for i, weight in enumerate(weights))

    @torch.no_grad()
    def prune(self, way: float) -> None:
        """Say what is kept at a point of the schedule, from 0 to 1."""
        share = -torch.tensor(-STEEPNESS * way).expm1().item() / -torch.tensor(-STEEPNESS).expm1().item()
        shares, table, pairs = self.shares, self.second.table.weight, self.pairs.weight
        norms = table.norm(dim=1)
        for vocabulary in self.second.sizes:
            norms[self.second.rows_of(vocabulary).start] = torch.inf  # what is unknown ranks by its row
        masks = [largest(pairs.abs(), share * shares.prune_pairs)]
        masks += [torch.cat([norms.new_ones(1), largest(norms[1:], share * shares.prune_values)])[:, None]]
        for norm, listener in self._hidden():
            masks.append(largest(norm.weight.abs() * listener.weight.norm(dim=0), share * shares.prune_units))
        for (_, kept), mask in zip(self.kept(), masks, strict=True):
            kept.copy_(mask)

    def _hidden(self) -> Iterator[tuple[BatchNorm, nn.Linear]]:
        """Each hidden layer's norm, which gives its units their size, and the linear layer that listens to them."""
        norms = [module for module in self.tower.rest if isinstance(module, BatchNorm)]
        return zip(norms, (module for module in self.tower.rest if isinstance(module, nn.Linear)), strict=True)


def largest(scores: Tensor, share: float) -> Tensor:
    """1 for all but a `share` of some scores `(N,)`, the smallest, and 0 for these; one is always kept."""
    count = max(1, len(scores) - round(share * len(scores)))
    kept = torch.zeros_like(scores)
    kept[scores.topk(min(count, len(scores))).indices] = 1
    return kept


def _check(settings: DeepLightSettings) -> None:
    for name in ("prune_pairs", "prune_units", "prune_values"):
        if not 0 <= getattr(settings, name) < 1:
            raise ValueError(f"{name} is {getattr(settings, name)}; it must be at least 0, below 1")
    if settings.prune_from < 0 or settings.prune_steps < 1:
        raise ValueError(f"prune_from is {settings.prune_from} and prune_steps {settings.prune_steps}; they must be at least 0 and 1")
