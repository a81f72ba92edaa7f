"""A second task for the embeddings of ads: how often two are clicked by one user (GloVe, Pennington et al. 2014, eq. 8).

`--set cooccurrence=0.1` adds it, with that weight, to the loss of any network. Clicks on an ad are few; that it is clicked by those who
clicked another says something of both.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .datasets.encoded import Rows
from .device import moved
from .networks.contract import Network
from .networks.embeddings import Embeddings
from .networks.lookup import EmbeddingTable

WINDOW = 10
"""Behaviours before a click that count as of one session."""
FULL, POWER = 100.0, 0.75
"""Pairs of so many clicks together weigh 1, those of fewer (X / 100) ** 0.75."""
PAIRS = 4096
"""Of a step."""
CLICKS = 100_000
"""Whose pairs are counted at once."""
Pairs = np.ndarray[Any, np.dtype[np.int64]]


def counted(rows: Rows, column: int = 0) -> tuple[Pairs, np.ndarray[Any, np.dtype[np.float32]]]:
    """Pairs `(P, 2)` of ads, by the ids in a column of the ad, `ad_id`, and how often the second came before a click on the first."""
    clicks = np.flatnonzero(rows.labels > 0)
    found = [_counted(rows.take(some), column) for some in np.array_split(clicks, range(CLICKS, len(clicks), CLICKS))]
    pairs, at = np.unique(np.concatenate([each for each, _ in found]), axis=0, return_inverse=True)
    return pairs, np.bincount(at.ravel(), np.concatenate([times for _, times in found])).astype(np.float32)


def _counted(clicks: Rows, column: int) -> tuple[Pairs, Pairs]:
    past, places = clicks.history, np.arange(clicks.history.shape[1])
    lengths = (past > 0).sum(1)[:, None]
    within = (places < lengths) & (places >= lengths - WINDOW)
    behaviours = clicks.behaviours.ids[past, 0]
    clicked = np.broadcast_to(clicks.ad.ids[:, column : column + 1], past.shape)
    pairs = np.stack([clicked[within], behaviours[within]], 1).astype(np.int64)
    pairs = pairs[(pairs > 1).all(1) & (pairs[:, 0] != pairs[:, 1])]  # known ads, and two of them
    return np.unique(pairs, axis=0, return_counts=True)


class Cooccurrence(nn.Module):
    """Σ f(X) (wᵢ · wⱼ + bᵢ + bⱼ - log X)² over pairs of ads, w being the network's embeddings of them; b are its own."""

    def __init__(self, network: Network, rows: Rows, weight: float, seed: int) -> None:
        """Count the pairs of some rows.

        Raises:
            ValueError: the network has no vectors of ads, or the schema no history of them.
        """
        super().__init__()
        layout = network.fields.layouts["ad"]
        column = next((slot.start for slot in layout.ids if slot.field.name == "ad_id"), None)
        if column is None or not network.fields.count("history"):
            raise ValueError("cooccurrence is of ads in users' histories: the schema needs ad_id as a field of the ad, and [history]")
        wide = [block for block in network.modules() if isinstance(block, Embeddings) and block.table.embedding_dim > 1]
        if not wide:
            raise ValueError("cooccurrence trains the vectors of ads, and this network has weights alone; leave it out, or train fm")
        vocabulary = next(slot.field.vocabulary for slot in layout.ids if slot.field.name == "ad_id")
        self.table, first = wide[0].table, wide[0].rows_of(vocabulary).start - 1
        pairs, times = counted(rows, column)
        self.pairs, self.times = torch.from_numpy(pairs) + first, torch.from_numpy(times)
        self.share, self.weight = (self.times / FULL).pow(POWER).clamp(max=1.0), weight
        self.bias = EmbeddingTable(len(self.table.weight), 1)
        nn.init.zeros_(self.bias.weight)
        self.random = torch.Generator().manual_seed(seed)

    def optimiser(self, learning_rate: float) -> torch.optim.Optimizer:
        """What trains the biases; the vectors are the network's."""
        return torch.optim.Adam(self.bias.parameters(), lr=learning_rate)

    def loss(self) -> Tensor:
        """That of some pairs, drawn anew, as a mean."""
        if not len(self.pairs):
            return self.bias.weight.new_zeros(())
        drawn = torch.randint(len(self.pairs), (min(PAIRS, len(self.pairs)),), generator=self.random)
        self.bias.zero_grad()
        return self.weight * self.loss_of(drawn)

    def loss_of(self, which: Tensor) -> Tensor:
        """The mean over the pairs of these numbers."""
        drawn = self.pairs[which], self.share[which], self.times[which].log()
        pairs, share, log = moved(drawn, self.bias.weight.device)
        first, second = pairs.unbind(1)
        said = (self.table(first) * self.table(second)).sum(1) + (self.bias(first) + self.bias(second)).squeeze(1)
        mean: Tensor = (share * (said - log).square()).mean()
        return mean
