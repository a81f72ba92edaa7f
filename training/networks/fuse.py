"""Trained networks rearranged for serving: fewer products and fewer passes over memory, equal in exact arithmetic.

A block that can be served faster has `fused(tile) -> nn.Module | None`, which gives another block in its place; None leaves it as it is.
Where a network is to explain itself, the blocks that have a part in that, by `explained`, stay as they are, and those in them are asked.
A block with a large table stays as well: see `tables`. This walks a network and asks, and knows no network by name.
"""

import copy
from collections.abc import Callable

from torch import nn

from ..tables import is_large

TILE = 512
"""Pairs of candidate and behaviour that are weighed at once on a CPU: few enough for its second cache, many enough for a loop."""


def fused(network: nn.Module, tile: int | None = TILE, explaining: bool = False) -> nn.Module:
    """A copy of a network in evaluation mode, every block fused that offers it; large tables are the network's own.

    `tile`: see `TILE`; None: all pairs at once.

    `explaining`: but for those that explain.
    """
    own = copy.deepcopy(network, {id(weights): weights for weights in network.parameters() if is_large(weights)})
    return _fused(own, lambda block: None if explaining and hasattr(block, "explained") else _offer(block, tile), {}).eval()


def is_tiled(network: nn.Module) -> bool:
    """Whether a fused network depends on the tile, so that a GPU is better served by another graph."""
    return any(getattr(block, "tiled", False) for block in network.modules())


def _offer(block: nn.Module, tile: int | None) -> nn.Module | None:
    offer = None if any(map(is_large, block.parameters())) else getattr(block, "fused", None)
    better: nn.Module | None = offer(tile) if offer is not None else None
    return better


def _fused(block: nn.Module, offered: Callable[[nn.Module], nn.Module | None], done: dict[nn.Module, nn.Module]) -> nn.Module:
    """`done` keeps blocks that a network uses twice one block."""
    if block in done:
        return done[block]
    better = offered(block)
    done[block] = better or block
    if better is None:
        for name, child in block.named_children():
            setattr(block, name, _fused(child, offered, done))
    return done[block]
