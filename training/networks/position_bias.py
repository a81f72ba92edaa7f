"""What the place of an ad has to do with a click, beside any network, in training alone.

Added to the logit: logit p(click | place k) = logit + b(k), a shallow tower (Zhao et al. 2019, "Recommending what video to watch next").
As a product: p(click | place k) = σ(b(k)) · σ(logit), first seen and then clicked (Guo et al. 2019, "PAL: a position-bias aware learning
framework for CTR prediction in live recommender systems"). `networks.fuse` and the exporter meet neither: it is taken off before.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

RATE = 0.01
"""Its learning rate: all rows of a place share one weight."""
Array = np.ndarray[Any, np.dtype[Any]]


class PositionBias(nn.Module):
    """One number a place."""

    def __init__(self, places: int, product: bool) -> None:
        super().__init__()
        self.bias, self.product = nn.Parameter(torch.zeros(places)), product

    def forward(self, logits: Tensor, place: Tensor) -> Tensor:
        """Logits of a click at a place, of `logits (R,)` without one and `place (R,)`, from 0.

        Of the product, -log(1 / (σ(a) σ(b)) - 1) = -log(e^-a + e^-b + e^-(a + b)).
        """
        bias = self.bias[place]
        return -torch.stack([-logits, -bias, -logits - bias]).logsumexp(0) if self.product else logits + bias

    @torch.no_grad()
    def at(self, logits: Array, place: Array) -> Array:
        """The same of arrays `(N,)`."""
        both = torch.from_numpy(logits), torch.from_numpy(place.astype(np.int64))
        found: Array = self(*(each.to(self.bias.device) for each in both)).cpu().numpy()
        return found

    def optimiser(self) -> torch.optim.Optimizer:
        """What trains it."""
        return torch.optim.Adam(self.parameters(), lr=RATE)
