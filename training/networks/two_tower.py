"""Two towers: a vector of the request and one of the ad, whose inner product is the logit, so that ads can be searched by their vectors.

Beside the click's cross-entropy, which makes the logits those of a click, the loss has a softmax over all ads that tells an ad that was
clicked from any other, estimated from the ads of the batch, corrected for how often they are in it (Yi et al. 2019,
https://doi.org/10.1145/3298689.3346996), and from others drawn evenly from the catalogue (Yang et al. 2020,
https://doi.org/10.1145/3366424.3386195). The towers have layer norm: a vector must not depend on what else is in the batch.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .contract import CLICK, Fields, Labels, MLPSettings, Network, Outputs, Part, RequestTensors
from .crosses import MatrixCross
from .embeddings import Embeddings
from .layers import MLP, begin_linear
from .sampled_softmax import Frequencies, sampled_softmax
from .tab_transformer import FieldAttention

TOWERS = ("mlp", "transformer", "dcn_v2")


@dataclass(frozen=True)
class TwoTowerSettings(MLPSettings):
    """Widths of the towers, and the softmax over ads."""

    tower: str = "mlp"
    """What each tower is: `mlp`; `dcn_v2`, with cross layers below the MLP; `transformer`, with attention between the fields below it."""
    layers: int = 2
    """Cross or transformer layers of a tower that has such."""
    attention_heads: int = 4
    """Heads of a transformer layer; they share a value's vector."""
    vector: int = 32
    """Width of the vectors of requests and ads."""
    temperature: float = 0.1
    """What the cosine of two vectors is divided by."""
    softmax: float = 0.1
    """Weight of the softmax over ads beside the click's cross-entropy; 0: it plays no part."""
    negatives: int = 256
    """Ads drawn evenly from the catalogue for each step, beside those of the batch."""


class TwoTower(Network):
    """A vector of the request and one of the ad, which can be searched for (Yi et al. 2019, Yang et al. 2020)."""

    settings = TwoTowerSettings
    retrieves = True

    def __init__(self, fields: Fields, settings: TwoTowerSettings) -> None:
        super().__init__(fields, settings)
        _check(fields, settings)
        self.embed = Embeddings(fields, settings.embedding)
        self.of_user, self.of_ad = FieldTower(fields.request, settings), FieldTower(fields.count("ad"), settings)
        self.bias = nn.Parameter(torch.zeros(1))
        self.temperature, self.softmax, self.negatives = settings.temperature, settings.softmax, settings.negatives
        (slot,) = (slot for slot in fields.layouts["ad"].ids if slot.field.name == "ad_id")
        layout = fields.layouts["ad"]
        self.ad_id = slot.start
        self.ads = Part(torch.zeros((0, layout.width), dtype=torch.int64), torch.zeros((0, layout.number_width)))
        self.frequencies = Frequencies(fields.sizes[slot.field.vocabulary])

    def forward(self, request: RequestTensors) -> dict[str, Tensor]:
        """Logits `(R, C)`; in training the vectors too, `(R, K)` and `(R, C, K)`."""
        users, ads = self.request_vectors(request), self.of_ad(self.embed("ad", request.ad))
        logits = (ads @ users.unsqueeze(-1)).squeeze(-1) / self.temperature + self.bias
        return {CLICK: logits, "user": users, "ad": ads} if self.training else {CLICK: logits}

    def request_vectors(self, request: RequestTensors) -> Tensor:
        """See `Network`."""
        vectors: Tensor = self.of_user(self.embed.of_request(request))
        return vectors

    def ad_vectors(self, ads: Part) -> Tensor:
        """See `Network`."""
        vectors: Tensor = self.of_ad(self.embed("ad", ads))
        return vectors

    def begin(self, ads: Part) -> None:
        """See `Network`."""
        self.ads = ads
        self.frequencies.begin(len(ads.ids))

    def loss(self, outputs: Outputs, request: RequestTensors, labels: Labels) -> Tensor:
        """The click's cross-entropy, and the softmax over ads of the rows that were clicked."""
        click = super().loss(outputs, request, labels)
        if not self.softmax:
            return click
        clicked = labels.heads[CLICK].nan_to_num() * (1.0 if labels.weight is None else labels.weight)
        drawn, expected = self.drawn(request.ad.ids[:, 0, self.ad_id])
        ads = torch.cat([outputs["ad"].squeeze(1), self.ad_vectors(drawn)])
        return click + self.softmax * sampled_softmax(outputs["user"] @ ads.T / self.temperature, expected, clicked)

    def drawn(self, ids: Tensor) -> tuple[Part, Tensor]:
        """Ads drawn from the catalogue, and how often each ad of the batch `ids (R,)` and then each of them is expected among both."""
        self.frequencies.update(ids)
        count = max(len(self.ads.ids), 1)
        chosen = torch.randint(count, (self.negatives if len(self.ads.ids) else 0,), device=ids.device)
        drawn = Part(self.ads.ids[chosen], self.ads.numbers[chosen])
        both = torch.cat([ids, drawn.ids[:, self.ad_id]])
        return drawn, len(ids) * self.frequencies.of(both) + len(chosen) / count


class FieldTower(nn.Module):
    """From the vectors of some fields `(..., F, D)` to one of length 1 `(..., K)`."""

    def __init__(self, fields: int, settings: TwoTowerSettings) -> None:
        super().__init__()
        width, embedding = fields * settings.embedding, settings.embedding
        crossed, attentive = settings.tower == "dcn_v2", settings.tower == "transformer"
        self.columns = nn.Parameter(torch.empty(fields, embedding).normal_(std=1e-2)) if attentive else None
        self.attention = nn.Sequential(
            *(FieldAttention(embedding, settings.attention_heads, settings.dropout) for _ in range(settings.layers if attentive else 0))
        )
        self.cross = MatrixCross(width, settings.layers if crossed else 0)
        self.deep = MLP(width, settings.hidden, settings.dropout, norm="layer")
        self.last = nn.Linear(settings.hidden[-1], settings.vector)
        begin_linear(self.last)

    def forward(self, vectors: Tensor) -> Tensor:
        """See above; which field a vector is of is added to it where fields look at each other."""
        if self.columns is not None:
            vectors = self.attention(vectors + self.columns)
        return F.normalize(self.last(self.deep(self.cross(vectors.flatten(-2)))), dim=-1)


def _check(fields: Fields, settings: TwoTowerSettings) -> None:
    """Raises ValueError where the network cannot be built."""
    if not fields.request:
        raise ValueError("two_tower has a tower for the request, and in this schema all fields are the ad's; train deepfm instead")
    if not any(slot.field.name == "ad_id" for slot in fields.layouts["ad"].ids):
        raise ValueError("two_tower counts how often each ad is shown, and this schema has no [ad.ad_id]; add it")
    if settings.tower not in TOWERS:
        raise ValueError(f"tower is {settings.tower!r}; it must be one of {', '.join(TOWERS)}")
    if settings.tower == "transformer" and (settings.attention_heads < 1 or settings.embedding % settings.attention_heads):
        raise ValueError(f"attention_heads is {settings.attention_heads}; it must divide embedding, which is {settings.embedding}")
    if not 0 < settings.temperature < math.inf or settings.softmax < 0 or settings.negatives < 0:
        raise ValueError("temperature must be above 0; softmax and negatives at least 0")
