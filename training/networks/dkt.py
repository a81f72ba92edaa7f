"""Deep knowledge tracing: a GRU over the behaviours, its last state against the candidate (Piech et al. 2015, https://arxiv.org/abs/1506.05908).

It stands for recurrent networks. In the paper a state answers for every exercise, y = σ(W h + b), by a row of W and a bias each.
A candidate may be new, so its row and its bias are sums over its fields: the row a linear map of its vectors, the bias its first order.

Deliberately different: a GRU, where the paper has an LSTM; the user's fields stand beside the state; a behaviour is the ad alone,
without its outcome, because a history holds clicks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .contract import CLICK, Fields, Network, RequestTensors
from .embeddings import Embeddings
from .layers import Dropout
from .recurrent import GRU, last_state


@dataclass(frozen=True)
class DKTSettings:
    """Widths and dropout of a DKT."""

    embedding: int = 16
    """Width of every value's vector."""
    state: int = 64
    """Width of the GRU's state."""
    dropout: float = 0.1
    """Share of the last state that a training step leaves out."""


class DKT(Network):
    """A GRU over the behaviours, its last state against the candidate (Piech et al. 2015)."""

    settings = DKTSettings

    def __init__(self, fields: Fields, settings: DKTSettings) -> None:
        super().__init__(fields, settings)
        fields.require_history("dkt reads a user's behaviours in their order")
        width = settings.embedding
        self.first, self.embed = Embeddings(fields, 1), Embeddings(fields, width)
        self.gru = GRU(fields.count("history") * width, settings.state)
        self.dropout = Dropout(settings.dropout)
        self.read = nn.Linear(settings.state + fields.count("user") * width, fields.count("ad") * width)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, request: RequestTensors) -> dict[str, Tensor]:
        """Logits `(R, C)`. All but a product with the candidate's vectors is computed once a request."""
        states = self.gru(self.embed("history", request.history).flatten(2))  # (R, T, H)
        state = self.dropout(last_state(states, request.history.behaviours()))
        if "user" in self.embed:
            state = torch.cat([state, self.embed("user", request.user).flatten(1)], dim=1)
        ads = self.embed("ad", request.ad).flatten(2)  # (R, C, F D)
        against = torch.matmul(ads, self.read(state).unsqueeze(-1)).squeeze(-1)
        linear = self.first.of_request(request).sum(1) + self.first("ad", request.ad).sum(2).squeeze(-1)
        return {CLICK: against + linear + self.bias}
