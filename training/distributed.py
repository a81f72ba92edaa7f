"""Processes that train one network together: each takes its share of every batch, and all make the same step.

Knows PyTorch's process groups and nothing of who starts the processes (`workers.py`). Dense gradients are averaged by
`DistributedDataParallel` as they are made; of tables that are updated sparsely the rows that a step touched travel, and no others.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")
Numbers = np.ndarray[Any, np.dtype[np.int64]]
Logits = np.ndarray[Any, np.dtype[np.float32]]


class Process:
    """One of several, or the only one, of which all methods change nothing."""

    def __init__(self, rank: int = 0, of: int = 1) -> None:
        """Of a process group that there is already, where there are several."""
        self.rank, self.of = rank, of

    def parallel(self, loss: nn.Module, apart: Iterable[Tensor]) -> nn.Module:
        """A module that gives a loss, whose gradients are from now on the means of all processes', but those of the weights `apart`."""
        if self.of == 1:
            return loss
        own = {id(weight) for weight in apart}
        names = [name for name, weight in loss.named_parameters(remove_duplicate=False) if id(weight) in own]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(loss, names)  # type: ignore[no-untyped-call]
        # What is held still, or of a schema without numbers, has no gradient. Buffers are made the same once an epoch.
        return DistributedDataParallel(loss, find_unused_parameters=True, broadcast_buffers=False)

    def told(self, what: T) -> list[T]:
        """What each process says, in the order of ranks, once all have."""
        if self.of == 1:
            return [what]
        parts: list[Any] = [None] * self.of
        distributed.all_gather_object(parts, what)
        return parts

    def gathered(self, rows: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of a table `(N,)` and their gradients `(N, D)`, those of all processes below each other, in the order of ranks."""
        parts = self.told((rows.cpu(), gradients.cpu()))
        everything = (torch.cat(each).to(rows.device) for each in zip(*parts, strict=True))
        return next(everything), next(everything) / self.of

    def share_buffers(self, network: nn.Module) -> None:
        """Give all processes what rank 0 has counted and averaged, such as the statistics of batch normalisation."""
        if self.of > 1:
            for buffer in network.buffers():
                distributed.broadcast(buffer, 0)

    def together(self, work: Callable[[Numbers], Logits], rows: int) -> Logits:
        """What `work` says of so many rows `(N,)`, asked of each process for its part of their numbers."""
        if self.of == 1:
            return work(np.arange(rows))
        each = -(-rows // self.of)  # of all alike: what lies beyond the last begins anew, so that no process is asked for less
        return np.concatenate(self.told(work(np.arange(self.rank * each, (self.rank + 1) * each) % rows)))[:rows]

    def decides(self, what: bool) -> bool:
        """What rank 0 says."""
        if self.of == 1:
            return what
        said = torch.tensor(what)
        distributed.broadcast(said, 0)
        return bool(said)

    def norm(self, of: Tensor) -> Tensor:
        """The norm `()` of what all have a part of, from that of this one's."""
        if self.of == 1:
            return of
        distributed.all_reduce(square := of.square())
        return square.sqrt()


ONLY = Process()
