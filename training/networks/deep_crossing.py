"""Deep Crossing: residual units upon the fields' vectors (Shan et al. 2016, https://doi.org/10.1145/2939672.2939704).

Different from the paper: no ReLU on the vectors themselves, which would halve what a value's vector can say, and batch norm inside of
the units, as in the residual networks that they are taken from. The history, where there is one, joins as one more field for each of
its own: the mean over the behaviours.
"""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from .contract import CLICK, Fields, MLPSettings, Network, RequestTensors
from .embeddings import Embeddings
from .layers import BatchNorm, Dropout, Linear, begin_linear, merged


@dataclass(frozen=True)
class DeepCrossingSettings(MLPSettings):
    """Widths and dropout of a Deep Crossing."""

    hidden: tuple[int, ...] = (200, 80)
    """Inner widths of the residual units, one unit each."""
    dropout: float = 0.1
    """Share of the inner activations that a training step leaves out."""


class DeepCrossing(Network):
    """Residual units upon the fields' vectors, and nothing else (Shan et al. 2016)."""

    settings = DeepCrossingSettings
    intercept_at = "score.bias"

    def __init__(self, fields: Fields, settings: DeepCrossingSettings) -> None:
        super().__init__(fields, settings)
        width = fields.all * settings.embedding
        self.embed = Embeddings(fields, settings.embedding)
        self.units = nn.Sequential(*(ResidualUnit(width, inner, settings.dropout) for inner in settings.hidden))
        self.score = nn.Linear(width, 1)

    def forward(self, request: RequestTensors) -> dict[str, Tensor]:
        """Logits `(R, C)`."""
        return {CLICK: self.score(self.units(self.embed.of_all(request).flatten(2))).squeeze(-1)}


class ResidualUnit(nn.Module):
    """Fig. 2 and eq. 4: ReLU(F(x) + x), where F is a linear layer, ReLU and a linear layer back to the width of x."""

    def __init__(self, width: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.first = nn.Linear(width, inner)
        left_out = [Dropout(dropout)] if dropout else []
        self.rest = nn.Sequential(BatchNorm(inner), nn.ReLU(), *left_out, nn.Linear(inner, width), BatchNorm(width))
        begin_linear(self.first, *self.rest)

    def forward(self, x: Tensor) -> Tensor:
        """Of `(..., width)`, that shape."""
        return F.relu(self.rest(self.first(x)) + x)

    def fused(self, _tile: int | None) -> nn.Module:
        """See `fuse.py`."""
        return FusedUnit(self)


class FusedUnit(nn.Module):
    """A `ResidualUnit` of two linear layers and ReLU alone."""

    def __init__(self, unit: ResidualUnit) -> None:
        super().__init__()
        self.first, self.second = (Linear(layer.weight, layer.bias) for layer in merged(unit.first, unit.rest))

    def forward(self, x: Tensor) -> Tensor:
        """See `ResidualUnit`."""
        return F.relu(self.second(F.relu(self.first(x))) + x)
