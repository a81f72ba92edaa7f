"""The order of a training's rows: which of them make which step. Knows how many rows there are, and nothing of what they hold.

It follows from the seed and from how many epochs there were, so that a training that is resumed draws what it would have drawn.
"""

import math
from collections.abc import Iterator

import numpy as np

from .datasets.encoded import Rows
from .unknown import Chosen

BLOCK = 1024
"""Rows that are read in a piece, at least: some 100 KB of them."""


class RowOrder:
    """Epochs of batches, each row once: shuffled as a whole, or by blocks where the rows are not in memory.

    By blocks, an epoch is blocks of consecutive rows, cut at another place each time, in random order; as many as make a pool of `pool`
    rows are read together, and the pool is shuffled as a whole. A batch is then a random sample of its pool, and the pool a random sample
    of the blocks: rows that were neighbours meet in a pool, and about one in so many pools in one batch.
    """

    def __init__(self, rows: Rows, batch: int, seed: int, pool: int = 0, share: tuple[int, int] = (0, 1)) -> None:
        """`pool`: rows of a pool; 0: all are shuffled as they are. `share`: (rank, of), the part of one of several processes.

        All shares are of equally many rows: those that are left over, fewer than processes, or blocks than processes, sit an epoch out.
        """
        self.rows, self.batch, (self.rank, self.of) = rows, batch, share
        self.random = np.random.default_rng(seed)
        self.block = batch * math.ceil(BLOCK / batch)
        self.pool = max(1, pool // self.block) * self.block if pool else 0
        whole = len(rows) // self.block
        self.count = len(rows) if self.of == 1 else whole // self.of * self.block if pool else len(rows) // self.of
        # A last row alone joins the batch before it, and so the pool: batch normalisation needs two.
        self.steps = len(range(batch, self.count - 1, batch)) + 1

    def epoch(self, done: int = 0) -> Iterator[tuple[Rows, Chosen]]:
        """The next epoch after its first `done` steps: rows, and the positions among them that make a batch."""
        if not self.pool:
            mine = self.random.permutation(len(self.rows))[: self.count * self.of][self.rank :: self.of]
            return ((self.rows, chosen) for chosen in _cut(mine, self.batch)[done:])
        first, blocks = self.random.integers(len(self.rows)), self.random.permutation(len(self.rows) // self.block)
        mine = first + self.block * blocks[: len(blocks) // self.of * self.of][self.rank :: self.of]
        last = first + np.arange(len(blocks) * self.block, len(self.rows) if self.of == 1 else 0)  # what is left makes no block
        pools = len(range(self.pool, self.count - 1, self.pool)) + 1
        return self._by_pools(mine, last, self.random.integers(2**63, size=pools), done)

    def _by_pools(self, blocks: Chosen, last: Chosen, seeds: Chosen, done: int) -> Iterator[tuple[Rows, Chosen]]:
        """`blocks`: where each begins. What steps that are done had is not read."""
        each, steps = self.pool // self.block, self.pool // self.batch
        for number in range(done // steps, len(seeds)):
            end = (number + 1) * each if number + 1 < len(seeds) else len(blocks)
            numbers = (blocks[number * each : end, None] + np.arange(self.block)).ravel()
            numbers = np.concatenate([numbers, last]) if number + 1 == len(seeds) else numbers
            read = self.rows.take(numbers % len(self.rows))
            order = np.random.default_rng(seeds[number]).permutation(len(numbers))
            yield from ((read, chosen) for chosen in _cut(order, self.batch)[max(0, done - number * steps) :])


def _cut(order: Chosen, batch: int) -> list[Chosen]:
    return np.array_split(order, range(batch, len(order) - 1, batch))
