"""Tables that are split by rows over the processes of a training (row-wise sharding): each owns a block of rows, with their moments.

A lookup asks the owners for the distinct rows of its batch, and their gradients go back to them: what travels, and what a step costs, is
set by the batch. Knows tables and process groups, and nothing of networks or epochs.

All processes must look up alike, as often and in the same order, one without rows too.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, distributed, nn

from .checkpoint import CheckpointError
from .distributed import Process
from .networks.contract import Network
from .networks.lookup import EmbeddingTable

BLOCK = 65_536
"""Rows that are drawn together."""


class Shard:
    """The rows of a table that a process owns: a block, as in DTensor's `Shard(0)`, so that the whole is the parts below each other."""

    def __init__(self, rows: int, process: Process) -> None:
        self.process, self.each = process, -(-rows // process.of)
        self.first = min(process.rank * self.each, rows)
        self.count = min(self.each, rows - self.first)

    def drawn(self, width: int, deviation: float, seed: tuple[int, ...]) -> Tensor:
        """What the own rows `(count, D)` begin with: the same of however many processes, and 0 for padding."""
        values = torch.empty(self.count, width)
        for block in range(self.first // BLOCK, -(-(self.first + self.count) // BLOCK)):
            random = torch.Generator().manual_seed(int(np.random.SeedSequence((*seed, block)).generate_state(1, np.uint64)[0] >> 1))
            begin = block * BLOCK - self.first
            some = torch.empty(BLOCK, width).normal_(0, deviation, generator=random)[max(0, -begin) : self.count - begin]
            values[max(0, begin) : max(0, begin) + len(some)] = some
        if not self.first:
            values[:1] = 0
        return values

    def fetched(self, weight: Tensor, rows: Tensor) -> Tensor:
        """The vectors `(N, D)` of `rows (N,)` of the table, in order, from their owners; `weight (count, D)` are the own rows."""
        if self.process.of == 1:
            return weight.index_select(0, rows)
        asked = self._counts(rows)
        wanted, given = self._asked(rows, asked)
        vectors = weight.new_empty((len(rows), weight.shape[1]))
        distributed.all_to_all_single(vectors, weight.index_select(0, wanted), asked, given)
        return vectors

    def sent(self, rows: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
        """Own rows `(M,)`, numbered from the first, and the gradients `(M, D)` that all processes have of them, a part of a mean each.

        `rows (N,)` of the table and `gradients (N, D)` are what this one has, in any order and as often as they come.
        """
        if self.process.of == 1:
            return rows, gradients
        order = (rows // self.each).argsort(stable=True)
        counts = self._counts(rows)
        mine, given = self._asked(rows[order], counts)
        received = gradients.new_empty((len(mine), gradients.shape[1]))
        distributed.all_to_all_single(received, gradients[order], given, counts)
        return mine, received / self.process.of

    def _counts(self, rows: Tensor) -> list[int]:
        """How many of them each process owns."""
        return torch.bincount(rows // self.each, minlength=self.process.of).tolist()

    def _asked(self, rows: Tensor, counts: list[int]) -> tuple[Tensor, list[int]]:
        """Tell the owners of `rows`, which are in their order, and hear which own rows the others tell of: how many each."""
        theirs = rows.new_empty(self.process.of)
        distributed.all_to_all_single(theirs, rows.new_tensor(counts))
        given: list[int] = theirs.tolist()
        found = rows.new_empty(sum(given))
        distributed.all_to_all_single(found, rows, given, counts)
        return found - self.first, given


def unallocated(network: nn.Module) -> list[EmbeddingTable]:
    """The tables that are to be split, and have no memory yet."""
    return [each for each in network.modules() if isinstance(each, EmbeddingTable) and each.weight.is_meta]


def check_split(family: str, network: Network) -> None:
    """That a network can do with a part of its tables.

    Raises:
        ValueError: it cannot.
    """
    if not network.splits and unallocated(network):
        able = "Adam changes tables, and nothing else looks at whole ones"
        raise ValueError(f"shard_rows is for networks of which {able}; {family} is none: leave it out, or train deepfm")


def split(network: nn.Module, process: Process, seed: int) -> list[EmbeddingTable]:
    """Give a process its rows of the tables that are to be split; those tables."""
    tables = unallocated(network)
    for number, table in enumerate(tables):
        table.shard = Shard(table.num_embeddings, process)
        table.weight = nn.Parameter(table.shard.drawn(table.embedding_dim, table.deviation, (seed, number)))
    return tables


def own_rows(table: nn.Embedding) -> tuple[int, int]:
    """The first of a table's rows that this process has, and how many: all, unless it is split."""
    shard = table.shard if isinstance(table, EmbeddingTable) else None
    return (shard.first, shard.count) if shard else (0, len(table.weight))


def file_of(path: Path, number: int) -> Path:
    """Where a table is put together, beside a checkpoint."""
    return path.with_name(f"{path.name}.table-{number}")


def write_rows(network: nn.Module, path: Path) -> list[EmbeddingTable]:
    """Write the own rows of tables that are split into the files of the whole ones, which all processes see; then each has written.

    Raises:
        CheckpointError: they cannot be written.
    """
    tables = [each for each in network.modules() if isinstance(each, EmbeddingTable) and each.shard]
    for number, table in enumerate(tables):
        assert table.shard  # noqa: S101  # see above
        target = file_of(path, number)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.touch()
            with target.open("r+b") as file:
                file.seek(table.shard.first * table.embedding_dim * 4)
                table.weight.detach().numpy().tofile(file)
        except OSError as error:
            raise CheckpointError(f"{target} cannot be written: {error.strerror or error}; make room, or say --checkpoint DIR") from error
    if tables:
        distributed.barrier()
    return tables


def map_tables(network: nn.Module, path: Path) -> None:
    """Give a network the tables that were written: mapped, so that only what is read is in memory. Their files have no names any more."""
    for number, table in enumerate(unallocated(network)):
        whole = np.memmap(target := file_of(path, number), np.float32, "c", shape=tuple(table.weight.shape))
        table.weight = nn.Parameter(torch.from_numpy(whole))
        target.unlink()
