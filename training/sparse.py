"""Large tables are trained by the rows that a batch touches: a step costs what the batch does, however much a vocabulary holds.

Adagrad and FTRL leave a weight without a gradient where it is, so for them it is the same training. Adam moves it on by what it
remembers; `LazyAdam` does not.
"""

from collections.abc import Iterable, Sequence
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor, nn

from features.vocabulary import PADDING

from .distributed import ONLY, Process
from .networks.lookup import EmbeddingTable, Touched
from .shards import own_rows


class SparseTables:
    """Tables whose gradients are sparse ones, of the rows that were looked up."""

    def __init__(self, tables: Sequence[EmbeddingTable], process: Process = ONLY) -> None:
        self.tables, self.process = tables, process
        for table in tables:
            table.touched = []
        if tables:
            torch.sparse.check_sparse_tensor_invariants.disable()  # type: ignore[no-untyped-call]  # as they are, but torch's Adagrad would warn of it
        self._before: tuple[Tensor, Tensor, Tensor] | None = None
        self._place = np.zeros(max((len(table.weight) for table in tables), default=0), np.int32)

    @classmethod
    def among(cls, modules: Iterable[nn.Module], above: int, process: Process = ONLY) -> "SparseTables":
        """Those of more than so many rows, 0: none; and those that are split."""
        found = {id(each): each for module in modules for each in module.modules() if isinstance(each, EmbeddingTable)}
        return cls([each for each in found.values() if each.shard or 0 < above < each.num_embeddings], process)

    def gather(self) -> None:
        """Make the gradients of a backward pass, with each row once; None where there was no lookup."""
        self._before = None
        for table in self.tables:
            table.weight.grad = None
            if not table.touched:
                continue
            if table.shard:  # lookups have summed their own
                rows, sums = self._summed([table.shard.sent(*map(torch.cat, zip(*table.touched, strict=True)))])
            else:
                rows, sums = self._summed(table.touched)
                if self.process.of > 1:  # each sums its own before they travel
                    rows, sums = self._summed([self.process.gathered(rows, sums)])
            sums[:1].masked_fill_(rows[:1, None] == PADDING - own_rows(table)[0], 0)  # they are in order
            table.weight.grad = torch.sparse_coo_tensor(rows[None], sums, table.weight.shape, is_coalesced=True)
            table.touched.clear()

    def _summed(self, touched: Touched) -> tuple[Tensor, Tensor]:
        """The distinct rows `(N,)`, in order, and the sums of their gradients `(N, D)`."""
        ids = torch.cat([rows for rows, _ in touched])
        if self._before is None or not torch.equal(ids, self._before[0]):  # the tables of a network are mostly looked up alike
            self._before = ids, *self._distinct(ids)
        _, rows, at = self._before
        sums = touched[0][1].new_zeros((len(rows), touched[0][1].shape[1]))
        for part, (_, gradient) in zip(torch.split(at, [len(each) for each, _ in touched]), touched, strict=True):
            sums.index_add_(0, part, gradient)
        return rows, sums

    def _distinct(self, of: Tensor) -> tuple[Tensor, Tensor]:
        """The distinct ones among ids `of (N,)`, and where each is among them: noted down a row of the table, which beats sorting all."""
        if not of.is_cpu:
            return of.unique(return_inverse=True)  # type: ignore[no-any-return, no-untyped-call]
        ids, positions = of.numpy(), np.arange(len(of), dtype=np.int32)
        self._place[ids] = positions
        rows = np.sort(ids[self._place[ids] == positions])  # the last time that each occurs
        self._place[rows] = positions[: len(rows)]
        return torch.from_numpy(rows), torch.from_numpy(self._place[ids].astype(np.int64))  # torch adds by int32 more slowly


class LazyAdam(torch.optim.Optimizer):
    """Adam whose moments and weights of a row change in the steps that have a gradient of it; `torch.optim.SparseAdam`, faster."""

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        """`groups` have `params`, `lr`, `betas` and `eps`. The gradients have each row once."""
        super().__init__(groups, {})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: object) -> float: ...
    @torch.no_grad()
    def step(self, closure: object = None) -> float | None:  # noqa: ARG002  # as torch calls it
        """One step, from the gradients as they are."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._step(weight, weight.grad._indices()[0], weight.grad._values(), group)
        return None

    def _step(self, weight: Tensor, rows: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[weight], group["betas"]
        if not state:
            state |= {"step": 0, "mean": _zeros_like(weight), "square": _zeros_like(weight)}
        state["step"] += 1
        mean = state["mean"].index_select(0, rows).lerp_(gradient, 1 - beta1)
        square = state["square"].index_select(0, rows).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        state["mean"].index_copy_(0, rows, mean)
        state["square"].index_copy_(0, rows, square)
        correction = (1 - beta2 ** state["step"]) ** 0.5
        size = square.sqrt_().add_(group["eps"] * correction)
        step = -group["lr"] * correction / (1 - beta1 ** state["step"])
        weight.index_copy_(0, rows, weight.index_select(0, rows).addcdiv_(mean, size, value=step))


def _zeros_like(weight: Tensor) -> Tensor:
    """On a CPU they take memory where they are written, so that rows that no batch has have no moments."""
    return torch.from_numpy(np.zeros(weight.shape, np.float32)) if weight.is_cpu else torch.zeros_like(weight)


def lazily(optimisers: Sequence[torch.optim.Optimizer], tables: SparseTables) -> list[torch.optim.Optimizer]:
    """The same optimisers, but that `LazyAdam` has of the tables what Adam had."""
    large, groups = {id(table.weight) for table in tables.tables}, []
    for optimiser in optimisers:
        for group in optimiser.param_groups if isinstance(optimiser, torch.optim.Adam) else ():
            mine = [weight for weight in group["params"] if id(weight) in large]
            group["params"] = [weight for weight in group["params"] if id(weight) not in large]
            if mine:
                groups.append({"params": mine, "lr": group["lr"], "betas": group["betas"], "eps": group["eps"]})
    return [*optimisers, *([LazyAdam(groups)] if groups else [])]
