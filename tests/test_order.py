"""The order of rows: each once an epoch, by the seed, to be gone on from anywhere, and mixed as well as is said."""

from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import small

from training.datasets.encoded import Rows, encode_split
from training.order import BLOCK, RowOrder


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    return encode_split(small.data_set(tmp_path_factory.mktemp("data")), "train", small.encoder())


def numbered(split: Rows, count: int) -> Rows:
    """So many rows, whose label is their number."""
    return replace(split.take(np.arange(count) % len(split)), labels=np.arange(count, dtype=np.float32))


def epoch(order: RowOrder, done: int = 0) -> list[list[int]]:
    return [read.labels[chosen].astype(int).tolist() for read, chosen in order.epoch(done)]


SHAPES = [(10, 4, 0), (9, 4, 0), (6, 9, 0), (20_000, 64, 4096), (4096 * 2 + 1, 64, 4096), (4096, 100, 2000), (700, 64, 4096), (5000, 64, 1)]


@pytest.mark.parametrize(("count", "batch", "pool"), SHAPES)
def test_an_epoch_has_each_row_once_in_whole_batches_and_can_be_gone_on_from(split: Rows, count: int, batch: int, pool: int) -> None:
    rows = numbered(split, count)
    order = RowOrder(rows, batch, 1, pool)
    first, second = epoch(order), epoch(order)
    for batches in (first, second):
        assert sorted(chain.from_iterable(batches)) == list(range(count))
        assert {len(each) for each in batches[:-1]} <= {batch}
        assert 2 <= len(batches[-1]) <= batch + 1
        assert len(batches) == order.steps
    assert first != second
    for done in {0, 1, order.steps // 2, order.steps - 1, order.steps}:
        again = RowOrder(rows, batch, 1, pool)
        again.epoch()
        assert epoch(again, done) == second[done:]
    assert epoch(RowOrder(rows, batch, 2, pool)) != first


def test_in_memory_all_rows_are_permuted_by_one_generator(split: Rows) -> None:
    order, random = RowOrder(numbered(split, 100), 30, 7), np.random.default_rng(7)
    for _ in range(2):
        assert list(chain.from_iterable(epoch(order))) == random.permutation(100).tolist()


def test_a_batch_mixes_the_blocks_of_its_pool_and_pools_are_of_random_blocks(split: Rows) -> None:
    order = RowOrder(numbered(split, 64 * BLOCK), 256, 1, 16 * BLOCK)
    batches = epoch(order)
    pools = [np.concatenate(batches[at : at + 64]) for at in range(0, 256, 64)]
    ends = [0, *(np.sort(pool)[-1] for pool in pools)]
    assert sorted(ends) != ends  # not in the order of the rows
    for pool in pools:
        # Consecutive rows lie 1,024 to a block; of 17 blocks that 16 whole ones touch, all are there.
        assert len({row // BLOCK for row in pool}) >= 16
    for batch in batches:  # 256 rows of 16 blocks: 16 of each, and by chance hardly ever above 34 or a block missing
        counts = np.unique((np.array(batch) - batches[0][0]) // BLOCK, return_counts=True)[1]
        assert counts.max() <= 40
        assert len(counts) >= 16
    at = {row: number for number, batch in enumerate(batches) for row in batch}
    together = np.mean([at[row] == at[row + 1] for row in range(64 * BLOCK - 1)])
    assert 1 / 64 - 0.003 < together < 1 / 64 + 0.003  # neighbours are in one of the 64 batches of their pool by chance


@pytest.mark.parametrize(("pool", "left"), [(0, 1), (2 * BLOCK, 2 * BLOCK + 50)])
def test_the_shares_of_processes_are_as_many_steps_of_rows_that_no_other_has(split: Rows, pool: int, left: int) -> None:
    count = 8 * BLOCK + 50
    orders = [RowOrder(numbered(split, count), 64, 1, pool, (rank, 3)) for rank in range(3)]
    shares = [epoch(order) for order in orders]
    assert len({order.steps for order in orders} | {len(share) for share in shares}) == 1
    rows = [row for share in shares for batch in share for row in batch]
    assert len(rows) == len(set(rows)) == count - left
