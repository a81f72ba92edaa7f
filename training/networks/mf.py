"""Matrix factorisation of users and ads (Koren, Bell & Volinsky 2009, https://doi.org/10.1109/MC.2009.263).

Eq. 4 as a logit: μ + b_u + b_i + ⟨p_u, q_i⟩, from the ids alone; all other fields are left out. Of little use by itself where users and
ads come and go, and the start of another network's embeddings: `adrank train --model din --init-from BUNDLE`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .contract import CLICK, Explained, Fields, Network, RequestTensors
from .embeddings import Embeddings
from .interactions import each_field, each_pair, first_order


@dataclass(frozen=True)
class MFSettings:
    """The rank of a matrix factorisation."""

    embedding: int = 16
    """Width of every user's and every ad's vector."""


class MF(Network):
    """Users times ads, from their ids alone: matrix factorisation (Koren et al. 2009)."""

    settings = MFSettings
    embedding_l2 = 1e-5

    def __init__(self, fields: Fields, settings: MFSettings) -> None:
        super().__init__(fields, settings)
        for part, name in (("user", "user_id"), ("ad", "ad_id")):
            if name not in fields.names(part):
                raise ValueError(f"MF is of users and ads, and this schema has no [{part}.{name}]; add it, or train fm")
        ids = fields.only({"user": ("user_id",), "ad": ("ad_id",)})
        self.first, self.second = Embeddings(ids, 1), Embeddings(ids, settings.embedding)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, request: RequestTensors) -> dict[str, Tensor]:
        """Logits `(R, C)`."""
        user, ads = self.second.of_request(request), self.second("ad", request.ad).squeeze(2)
        return {CLICK: first_order(self.first, request) + ads.matmul(user.transpose(1, 2)).squeeze(-1) + self.bias}

    def explained(self, request: RequestTensors) -> Explained:
        """Each field's weight and each pair's product."""
        return Explained.of(each_field(self.first, request), each_pair(self.first.names, self.second.of_all(request)))
