"""Rows of a table, as `F.embedding` looks them up. Torch's own gradient of that takes two to three times as long to sum."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from ..shards import Shard

Touched = list[tuple[Tensor, Tensor]]
"""The rows that lookups took `(N,)`, and their gradients `(N, D)`; a row as often as it was taken."""


def look_up(table: Tensor, rows: Tensor) -> Tensor:
    """`table (U, D)` at `rows (...)`: `(..., D)`."""
    if torch.is_grad_enabled() and table.requires_grad and not torch.compiler.is_compiling():
        return _Lookup.apply(table, rows)  # type: ignore[no-any-return, no-untyped-call]
    return F.embedding(rows, table)


def sum_up(values: Tensor, rows: Tensor) -> Tensor:
    """Sums `(R, D)` of `values (U, D)` at `rows (R, T)` over T."""
    sums: Tensor = _Sum.apply(values, rows)  # type: ignore[no-untyped-call]
    return sums


class EmbeddingTable(nn.Embedding):
    """An embedding table with a row 0 for padding, which no gradient moves.

    Where there is a list `touched`, a backward pass adds to it what it would add to the gradient of the weights, which stays None.
    """

    touched: Touched | None = None
    shard: "Shard | None" = None
    """Which rows `weight` has, where other processes have the others."""
    deviation = 1.0
    """Of what a table begins with that has no memory yet."""

    def __init__(self, rows: int, width: int, split: bool = False) -> None:
        """`split`: it takes no memory before `shards.py` splits it over processes."""
        super().__init__(rows, width, padding_idx=0, device="meta" if split else None)

    def forward(self, rows: Tensor) -> Tensor:
        """Vectors `(..., D)` of `rows (...)`."""
        if torch.is_grad_enabled() and self.weight.requires_grad and not torch.compiler.is_compiling():
            return _Lookup.apply(self.weight, rows, self.padding_idx, self.touched, self.shard)  # type: ignore[no-any-return, no-untyped-call]
        return _gathered(self.weight, rows, self.shard)[0]


def _gathered(weight: Tensor, rows: Tensor, shard: "Shard | None") -> tuple[Tensor, tuple[Tensor, ...]]:
    """Vectors `(..., D)` of `rows (...)`, and what to save for their gradient: the rows, or of a table that is split the distinct ones, and
    which of these each is.
    """
    if shard is None:
        return F.embedding(rows, weight), (rows,)
    distinct, at = rows.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    return F.embedding(at, shard.fetched(weight, distinct)), (distinct, at)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, table: Tensor, rows: Tensor, padding: int | None = None, touched: Touched | None = None, shard: "Shard | None" = None
    ) -> Tensor:
        vectors, saved = _gathered(table, rows, shard)
        ctx.save_for_backward(*saved)
        ctx.shape, ctx.padding, ctx.touched = table.shape, padding, touched
        return vectors

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        rows, gradient = ctx.saved_tensors[0].flatten(), gradient.flatten(0, -2)
        for at in ctx.saved_tensors[1:]:
            gradient = gradient.new_zeros((len(rows), gradient.shape[1])).index_add_(0, at.flatten(), gradient)
        if ctx.touched is not None:
            ctx.touched.append((rows, gradient))
            return None, None, None, None, None
        total = gradient.new_zeros(ctx.shape).index_add_(0, rows, gradient)
        if ctx.padding is not None:
            total[ctx.padding] = 0
        return total, None, None, None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape = values.shape
        return F.embedding_bag(rows, values, mode="sum")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        each = gradient.unsqueeze(1).expand(-1, rows.shape[1], -1).flatten(0, 1)
        return gradient.new_zeros(ctx.shape).index_add_(0, rows.flatten(), each), None
