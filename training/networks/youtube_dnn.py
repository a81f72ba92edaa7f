"""The ranking network of YouTube: behaviours averaged, beside everything else, before an MLP (Covington et al. 2016, https://doi.org/10.1145/2959100.2959190).

Each field of the history is one more field of the request: the mean of its vectors over the behaviours, whatever the candidate.

Deliberately different: the target is the click, where the paper weighs clicks by the time that was watched; a number scales a
vector of its own, where the paper gives its square and its root too; the MLP has batch normalisation.
"""

from dataclasses import dataclass

from torch import Tensor

from .contract import CLICK, Fields, Network, RequestTensors
from .embeddings import Embeddings, flat
from .layers import Tower


@dataclass(frozen=True)
class YoutubeDNNSettings:
    """Widths and dropout of a YouTube DNN."""

    embedding: int = 16
    """Width of every value's vector."""
    hidden: tuple[int, ...] = (200, 80)
    """Widths of the MLP's layers."""
    dropout: float = 0.1
    """Share of their activations that a training step leaves out."""


class YoutubeDNN(Network):
    """The mean of the behaviours beside the candidate, and an MLP (Covington et al. 2016)."""

    settings = YoutubeDNNSettings

    def __init__(self, fields: Fields, settings: YoutubeDNNSettings) -> None:
        super().__init__(fields, settings)
        fields.require_history("youtube_dnn averages a user's behaviours")
        width = settings.embedding
        self.embed = Embeddings(fields, width)
        self.tower = Tower(fields.request * width, fields.count("ad") * width, settings.hidden, settings.dropout)

    @property
    def intercept(self) -> Tensor:
        """See `Network`."""
        return self.tower.bias

    def forward(self, request: RequestTensors) -> dict[str, Tensor]:
        """Logits `(R, C)`. The behaviours are averaged once a request."""
        ads = self.embed("ad", request.ad)  # (R, C, F, D)
        return {CLICK: self.tower(flat(self.embed.of_request(request)), ads.flatten(2))}
