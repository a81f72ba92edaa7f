"""The ranking network of YouTube: behaviours averaged, beside everything else, before an MLP (Covington et al. 2016, https://doi.org/10.1145/2959100.2959190).

Each field of the history is one more field of the request: the mean of its vectors over the behaviours, whatever the candidate.

Deliberately different: the target is the click, where the paper weighs clicks by the time that was watched; a number scales a
vector of its own, where the paper gives its square and its root too; the MLP has batch normalisation.
"""

from torch import Tensor

from .contract import CLICK, Fields, MLPSettings, Network, RequestTensors
from .embeddings import Embeddings, flat
from .layers import Tower


class YoutubeDNN(Network):
    """The mean of the behaviours beside the candidate, and an MLP (Covington et al. 2016)."""

    settings = MLPSettings
    intercept_at = "tower.bias"

    def __init__(self, fields: Fields, settings: MLPSettings) -> None:
        super().__init__(fields, settings)
        fields.require_history("youtube_dnn averages a user's behaviours")
        width = settings.embedding
        self.embed = Embeddings(fields, width)
        self.tower = Tower(fields.request * width, fields.count("ad") * width, settings.hidden, settings.dropout)

    def forward(self, request: RequestTensors) -> dict[str, Tensor]:
        """Logits `(R, C)`. The behaviours are averaged once a request."""
        ads = self.embed("ad", request.ad)  # (R, C, F, D)
        return {CLICK: self.tower(flat(self.embed.of_request(request)), ads.flatten(2))}
