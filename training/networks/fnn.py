"""FNN: an MLP on what a factorisation machine has learned (Zhang, Du & Wang 2016, https://arxiv.org/abs/1601.02376).

Eq. 5: a field's input is z_i = (w_i, v_i), its value's weight and vector in an FM, which are trained further with the MLP (section
3.1). `adrank train --model fnn --init-from` a bundle of `fm` is the paper; without one it says so and starts fresh.

Different from the paper: w_0, the same for all, is not among the inputs, whose first layer has a bias; batch norm and ReLU instead of
tanh, and no layer-wise pre-training. Lists, numbers and the history are fields as in FM.
"""

import torch
from torch import Tensor

from .contract import CLICK, Fields, MLPSettings, Network, RequestTensors
from .embeddings import Embeddings, flat
from .layers import Tower


class FNN(Network):
    """An MLP on the weights and vectors of an FM, by --init-from (Zhang et al. 2016)."""

    settings = MLPSettings
    intercept_at = "tower.bias"
    starts_from = "fm"

    def __init__(self, fields: Fields, settings: MLPSettings) -> None:
        super().__init__(fields, settings)
        width = settings.embedding + 1
        self.first, self.second = Embeddings(fields, 1), Embeddings(fields, settings.embedding)
        self.tower = Tower(fields.request * width, fields.count("ad") * width, settings.hidden, settings.dropout)

    def forward(self, request: RequestTensors) -> dict[str, Tensor]:
        """Logits `(R, C)`."""
        shared = torch.cat([flat(self.first.of_request(request)), flat(self.second.of_request(request))], 1)  # (R, Fu (1 + D))
        ads = torch.cat([self.first("ad", request.ad).flatten(2), self.second("ad", request.ad).flatten(2)], 2)
        return {CLICK: self.tower(shared, ads)}
