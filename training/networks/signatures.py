"""Attention over long histories by hashing, whose cost hardly grows with them (SDIM, Cao et al. 2022, https://arxiv.org/abs/2205.10249).

The behaviours are put into buckets once a request; a candidate then looks up its own, however many behaviours lie there.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GRID = 2.0**14
"""Vectors are hashed as whole numbers of 1 / GRID. Sums of those are exact in float32, so that each engine, and each size of a batch,
has the same signs; a sign that rounding decides would be another bucket."""
LARGEST = 8.0
"""What a number of a hashed vector is cut to; D of at most 128 of them sum up below 2**24."""


class Signatures(nn.Module):
    """Candidates attend to the behaviours whose signs they share, over random planes (eq. 8 to 12 of SDIM).

    There are `groups` hashes of `bits` signs each: 2**bits buckets a group.
    """

    def __init__(self, width: int, groups: int = 16, bits: int = 3) -> None:
        super().__init__()
        planes = torch.randint(0, 2, (width, groups * bits), generator=torch.Generator().manual_seed(0))
        self.planes, self.powers = nn.Buffer(2.0 * planes - 1), nn.Buffer(2.0 ** torch.arange(bits))
        self.codes = nn.Buffer(torch.arange(2.0**bits))

    def buckets(self, vectors: Tensor) -> Tensor:
        """Which bucket of each group `vectors (R, N, D)` fall into: 1 in that one and 0 in the others `(R, N, G * 2**bits)`."""
        whole = torch.round(vectors.clamp(-LARGEST, LARGEST) * GRID)
        signs = (whole @ self.planes > 0).to(vectors.dtype)
        codes = signs.reshape(*signs.shape[:-1], -1, len(self.powers)) @ self.powers
        buckets: Tensor = codes.unsqueeze(-1) == self.codes
        return buckets.to(vectors.dtype).flatten(-2)

    def forward(self, candidates: Tensor, history: Tensor, mask: Tensor) -> Tensor:
        """Interests `(R, C, D)` of `candidates (R, C, D)` in `history (R, T, D)`, where `mask (R, T)` says what is no padding.

        The mean over the groups of the sum of a bucket's behaviours, scaled to length 1, or 0 where the bucket is empty.
        """
        with torch.no_grad():
            theirs, own = self.buckets(history) * mask.unsqueeze(-1), self.buckets(candidates)
        sums = F.normalize(theirs.transpose(1, 2) @ history, dim=-1)
        interests: Tensor = own @ sums * (len(self.powers) / self.planes.shape[1])
        return interests


def newest(mask: Tensor, most: int) -> Tensor:
    """Where the last `most` behaviours of each request lie `(R, most)`, of `mask (R, T)`; from T on where it has fewer than `most`.

    Behaviours come oldest first, so places are never repeated, and what `most` columns of padding are added to can be gathered by them.
    """
    count = mask.sum(1, keepdim=True)
    return (count - most).clamp(min=0) + torch.arange(most, device=mask.device)
