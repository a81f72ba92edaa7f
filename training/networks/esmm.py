"""ESMM: clicks and conversions over all impressions (Ma et al. 2018, https://arxiv.org/abs/1804.07931).

Conversions are known for clicks alone, and a network that is trained on those meets other impressions when it serves. So two towers on
the same embeddings give p(click) and p(conversion given click), and what is trained is eq. 3: the losses of p(click) and of
p(conversion) = p(click) · p(conversion given click), both over all impressions.
"""

import torch
from torch import Tensor

from .contract import CLICK, Fields, MLPSettings, Network, RequestTensors
from .embeddings import Embeddings, flat
from .layers import Tower

CONVERSION = "conversion"


class ESMM(Network):
    """Clicks and conversions of all impressions: p(conversion) = p(click) · p(conversion given click) (Ma et al. 2018)."""

    settings = MLPSettings
    intercept_at = "click.bias"
    own_heads = (CLICK, CONVERSION)
    many_heads = True

    def __init__(self, fields: Fields, settings: MLPSettings) -> None:
        super().__init__(fields, settings)
        if fields.heads != self.own_heads:
            raise ValueError(f"esmm predicts a click and a conversion, and heads is {'-'.join(fields.heads)}; leave it out, or train mmoe")
        width = settings.embedding
        self.embed = Embeddings(fields, width)
        sizes = fields.request * width, fields.count("ad") * width
        self.click, self.converted = (Tower(*sizes, settings.hidden, settings.dropout) for _ in range(2))

    def forward(self, request: RequestTensors) -> dict[str, Tensor]:
        """Logits `(R, C)` by head."""
        u, a = flat(self.embed.of_request(request)), self.embed("ad", request.ad).flatten(2)
        clicked = self.click(u, a)
        return {CLICK: clicked, CONVERSION: both(clicked, self.converted(u, a))}


def both(a: Tensor, b: Tensor) -> Tensor:
    """The logit of σ(a) σ(b), of any size without overflow.

    σ(a) σ(b) / (1 - σ(a) σ(b)) = 1 / (e^-a + e^-b + e^-(a + b)).
    """
    return -torch.logsumexp(torch.stack([-a, -b, -a - b]), dim=0)
