"""The ads that differ among those that come with rows, where a data set keeps no table of them; of very many, some at random."""

import numpy as np

from features.encode import Block

MOST = 2**26
"""Bytes of them: 16 million ids, or 400,000 ads of 39 fields."""


class DistinctAds:
    """Ads, each once; where they are more than `most` bytes, those whose ids have the lowest hashes, which is by chance."""

    def __init__(self, most: int = MOST) -> None:
        self.most, self.hashes, self.blocks = most, list[np.ndarray[tuple[int], np.dtype[np.uint64]]](), list[Block]()

    def add(self, ads: Block) -> None:
        """Add those of some rows."""
        factors = np.random.default_rng(0).integers(2**63, size=ads.ids.shape[1], dtype=np.uint64) * 2 + 1
        hashes = (ads.ids.astype(np.uint64) * factors).sum(1, dtype=np.uint64)
        self.hashes.append(hashes)
        self.blocks.append(ads)
        if sum(block.ids.nbytes + block.numbers.nbytes for block in self.blocks) > 2 * self.most:
            self._shrink()

    def _shrink(self) -> None:
        ids, numbers = (np.concatenate([getattr(block, part) for block in self.blocks]) for part in ("ids", "numbers"))
        hashes, first = np.unique(np.concatenate(self.hashes), return_index=True)
        first = first[: self.most * len(ids) // max(1, ids.nbytes + numbers.nbytes)]
        self.hashes, self.blocks = [hashes[: len(first)]], [Block(ids[first], numbers[first])]

    def block(self) -> Block:
        """Them, in the order of their ids."""
        self._shrink()
        found = self.blocks[0]
        return found.take(np.unique(found.ids, axis=0, return_index=True)[1])
