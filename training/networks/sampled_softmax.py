"""A softmax over all ads, estimated from some of them, and how often an ad is among these."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RATE = 0.05
"""How much of what is known of an ad's frequency its next row replaces."""


def sampled_softmax(scores: Tensor, expected: Tensor, weight: Tensor) -> Tensor:
    """Mean cross-entropy of scores `(R, N)` of N ads, of which row i's own is the i-th, over rows by their `weight (R,)`.

    `expected (N,)` is how often each ad is among the N on average. A score is less the logarithm of that (Yi et al. 2019, eq. 4 and 5),
    for row i's own ad as for the others: an ad that is drawn often would else be pushed down by as much more often.
    """
    own = torch.arange(len(scores), device=scores.device)
    each = F.cross_entropy(scores - expected.log(), own, reduction="none")
    return (each * weight).sum() / weight.sum().clamp(min=1e-12)


class Frequencies(nn.Module):
    """How many rows pass from one row of an ad to its next, estimated as rows come (Yi et al. 2019, algorithm 2).

    Different from the paper: time is counted in rows and not in steps, as a popular ad is in every batch, and several times; an
    ad has a place of its own instead of a hashed one; and all begin as equally frequent.
    """

    interval: Tensor
    last: Tensor
    now: Tensor

    def __init__(self, ids: int) -> None:
        """Of ads with ids below that."""
        super().__init__()
        self.register_buffer("interval", torch.full((ids,), float(ids)), persistent=False)
        self.register_buffer("last", torch.zeros(ids, dtype=torch.int64), persistent=False)
        self.register_buffer("now", torch.zeros((), dtype=torch.int64), persistent=False)

    def begin(self, ads: int) -> None:
        """Forget what was seen; there are so many ads."""
        self.interval.fill_(float(max(ads, 1)))
        self.last.zero_()
        self.now.zero_()

    @torch.no_grad()
    def update(self, ids: Tensor) -> None:
        """Take rows with these ads `(R,)` into account."""
        self.now += len(ids)
        seen, times = torch.unique(ids, return_counts=True)
        gap = (self.now - self.last[seen]) / times
        kept = (1 - RATE) ** times
        self.interval[seen] = kept * self.interval[seen] + (1 - kept) * gap
        self.last[seen] = self.now

    def of(self, ids: Tensor) -> Tensor:
        """The share of rows `(...)` that have each ad."""
        return 1 / self.interval[ids].clamp(min=1.0)
