"""The first order of a network learns alone while there is little to learn from.

It is a logistic regression: some thousand rows are enough for it, while an MLP beside it explains the same clicks by what marks the few
users of a small log, and keeps it from learning more.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from .networks.contract import Network

RATE = 0.01
"""Its learning rate while it is alone: a value that few rows have moves in few steps only."""
SHARE = 2
"""The part of `least_steps` and of `epochs` that it has for that: one in so many."""


class FirstOrder:
    """Holds all other weights of a network still, until `release`."""

    def __init__(self, network: Network, optimisers: Sequence[torch.optim.Optimizer]) -> None:
        own = {id(weight) for weight in (*network.first_weights(), *(network.position_bias.parameters() if network.position_bias else ()))}
        self.held = [weight for weight in network.parameters() if id(weight) not in own]
        self.optimisers, self.rates = optimisers, [group["lr"] for group in _groups(optimisers)]
        for weight in self.held:
            weight.requires_grad_(False)
        for group in _groups(optimisers):
            group["lr"] = RATE

    def release(self) -> None:
        """Let all learn, at the rate of the optimisers."""
        for weight in self.held:
            weight.requires_grad_(True)
        for group, rate in zip(_groups(self.optimisers), self.rates, strict=True):
            group["lr"] = rate


def settled(network_settings: Any, few: bool) -> Any:
    """A network's settings, whose first order may be left to the data (`first_order` is -1): there is one where there are `few` rows."""
    open_ = getattr(network_settings, "first_order", 0) == -1
    return replace(network_settings, first_order=int(few)) if open_ else network_settings


def times(optimisers: Sequence[torch.optim.Optimizer], factor: float) -> None:
    """Multiply the learning rates."""
    for group in _groups(optimisers):
        group["lr"] *= factor


def _groups(optimisers: Sequence[torch.optim.Optimizer]) -> Iterator[dict[str, Any]]:
    return (group for optimiser in optimisers for group in optimiser.param_groups)
