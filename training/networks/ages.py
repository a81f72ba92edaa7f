"""How old a behaviour is, as a vector: its age in seconds falls into a bucket of powers of two, and each bucket has a vector."""

import torch
from torch import Tensor, nn

BUCKETS = 32
"""Below a second, then from 2^k to 2^(k + 1) seconds, the last being all above 2^30, 34 years, and what is of unknown time."""


class AgeVectors(nn.Module):
    """The vectors of ages."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(BUCKETS, width)
        nn.init.normal_(self.table.weight, std=1e-2)
        # Compared with, not taken the logarithm of: that rounds differently in torch and in ONNX Runtime.
        self.register_buffer("edges", 2.0 ** torch.arange(BUCKETS - 1), persistent=False)

    def forward(self, ages: Tensor | None) -> Tensor:
        """Vectors `(R, T, D)` of `ages (R, T)` in seconds."""
        assert ages is not None  # noqa: S101  # a request has them where its schema says so
        vectors: Tensor = self.table(self.buckets(ages))
        return vectors

    def buckets(self, ages: Tensor) -> Tensor:
        """The bucket of each age `(R, T)`: 0 below 1 second, k + 1 from 2^k on."""
        return (ages.unsqueeze(-1) >= self.get_buffer("edges")).sum(-1)
