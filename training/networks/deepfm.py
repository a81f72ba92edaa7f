"""DeepFM: first order + factorisation machine + MLP over shared embeddings (Guo et al. 2017, https://arxiv.org/abs/1703.04247).

The history, where there is one, joins as one more field for each of its own, the mean over the behaviours, in FM and MLP but not in the
first order: there an ad would have one weight for being clicked and for having been (`Fields.without_history`). Beside the paper's network
there are the norms of Wang et al. 2020 (https://arxiv.org/abs/2006.12753), NormDNN of the MLP's layers, before ReLU, and NormEmb of
the vectors, for FM and MLP alike; `batch` stays the default.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .contract import CLICK, Explained, Fields, MLPSettings, Network, RequestTensors
from .embeddings import Embeddings, FusedEmbeddings, beside, flat, table_of
from .interactions import each_field, each_pair, first_order, inner_products
from .layers import FusedTower, Tower, norms_named


@dataclass(frozen=True)
class DeepFMSettings(MLPSettings):
    """Widths and dropout of a DeepFM."""

    norm: str = "batch"
    """What normalises the MLP's layers (NormDNN): `none`, `batch`, `layer`, or `variance`, layer norm's division alone."""
    norm_embedding: str = "none"
    """What normalises each vector (NormEmb): the same choice."""


class DeepFM(Network):
    """First order, pairwise products and an MLP on the same embeddings (Guo et al. 2017)."""

    settings = DeepFMSettings
    int8_pays = True

    def __init__(self, fields: Fields, settings: DeepFMSettings) -> None:
        super().__init__(fields, settings)
        width = settings.embedding
        self.first, self.second = Embeddings(fields.without_history, 1), Embeddings(fields, width)
        self.tower = Tower(fields.request * width, fields.count("ad") * width, settings.hidden, settings.dropout, settings.norm)
        self.norm = nn.Sequential(*norms_named(settings.norm_embedding)(width))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, request: RequestTensors) -> dict[str, Tensor]:
        """Logits `(R, C)`. What concerns the request side alone is computed once a request."""
        u, a = self.vectors(request)
        return {CLICK: first_order(self.first, request) + inner_products(u, a) + self.tower(flat(u), a.flatten(2)) + self.bias}

    def vectors(self, request: RequestTensors) -> tuple[Tensor, Tensor]:
        """Those of the request's fields `(R, Fu, D)` and of the candidates' `(R, C, Fa, D)`, normalised where that is asked for."""
        u, a = self.second.of_request(request), self.second("ad", request.ad)
        if not len(self.norm):
            return u, a
        return self.norm(u) if u.shape[1] else u, self.norm(a)

    def explained(self, request: RequestTensors) -> Explained:
        """Each field's weight and each pair's product; the MLP is the rest."""
        return Explained.of(each_field(self.first, request), each_pair(self.second.names, beside(*self.vectors(request))))

    def flatten(self) -> None:
        """Let the MLP say the same of all, so that the first order learns first.

        Batch norm blows the noise of fresh embeddings up to the size of a signal: unlearning it takes rows that a small log lacks.
        """
        nn.init.zeros_(self.tower.last.weight)

    def first_weights(self) -> list[nn.Parameter]:
        """See `Network`."""
        return [*self.first.parameters(), self.bias]

    def fused(self, _tile: int | None) -> nn.Module | None:
        """See `fuse.py`."""
        return FusedDeepFM(self) if FusedDeepFM.fits(self) else None


class FusedDeepFM(nn.Module):
    """A `DeepFM` whose fields are all single categories. Of eq. 2 only the square of the sum is left:

    what a field subtracts, half its vector's square, joins its first-order weight, which is the last value of its vector here.
    """

    def __init__(self, network: DeepFM) -> None:
        super().__init__()
        self.embed = FusedEmbeddings(network.second)
        vectors, weights = self.embed.table.weight, FusedEmbeddings(network.first).table.weight
        last = weights - 0.5 * vectors.double().square().sum(1, keepdim=True).float()
        self.embed.table = table_of(torch.cat([vectors, last], 1))
        self.tower = FusedTower(network.tower, blind=vectors.shape[1])
        self.bias = network.bias

    @staticmethod
    def fits(network: DeepFM) -> bool:
        """Whether it can stand for the network."""
        layouts = network.second.layouts
        single = all(slot.field.length == 1 for layout in layouts.values() for slot in layout.ids)
        plain = network.tower.melts and not len(network.norm)
        return plain and single and set(layouts) == {"user", "ad"} and not any(layout.numbers for layout in layouts.values())

    def forward(self, request: RequestTensors) -> dict[str, Tensor]:
        """See `DeepFM`."""
        u, a = self.embed("user", request.user), self.embed("ad", request.ad)
        total = u.sum(1).unsqueeze(1) + a.sum(2)
        deep = self.tower(u.flatten(1), a.flatten(2))
        return {CLICK: 0.5 * total[..., :-1].square().sum(-1) + total[..., -1] + self.bias + deep}
