"""MMoE: experts shared by the heads, mixed anew for each by a gate (Ma et al. 2018, KDD, https://doi.org/10.1145/3219819.3220007)."""

from dataclasses import dataclass

from torch import Tensor, nn

from .contract import CLICK, Fields, Network, RequestTensors
from .embeddings import Embeddings, flat
from .layers import MLP, SplitLinear, SplitMLP


@dataclass(frozen=True)
class MMoESettings:
    """Widths of an MMoE."""

    embedding: int = 16
    """Width of every value's vector."""
    experts: int = 4
    """How many there are."""
    expert: int = 128
    """Width of each: one layer, as in the paper."""
    hidden: tuple[int, ...] = (80,)
    """Widths of the layers of each head's tower."""
    dropout: float = 0.1
    """Share of the activations of experts and towers that a training step leaves out."""


class MMoE(Network):
    """Heads that share experts and mix them each by a gate of its own (Ma et al. 2018)."""

    settings = MMoESettings
    intercept_at = f"last.{CLICK}.bias"
    own_heads = (CLICK, "conversion")
    many_heads = True

    def __init__(self, fields: Fields, settings: MMoESettings) -> None:
        super().__init__(fields, settings)
        if settings.experts < 1 or settings.expert < 1:
            raise ValueError("mmoe needs at least one expert of at least one unit: experts and expert must be 1 or more")
        self.embed = Embeddings(fields, settings.embedding)
        sizes = fields.request * settings.embedding, fields.count("ad") * settings.embedding
        self.shape = settings.experts, settings.expert
        self.experts = SplitMLP(*sizes, (settings.experts * settings.expert,), settings.dropout)
        self.gates = nn.ModuleDict({head: SplitLinear(*sizes, settings.experts) for head in self.heads})
        self.towers = nn.ModuleDict({head: MLP(settings.expert, settings.hidden, settings.dropout) for head in self.heads})
        self.last = nn.ModuleDict({head: nn.Linear(settings.hidden[-1], 1) for head in self.heads})

    def forward(self, request: RequestTensors) -> dict[str, Tensor]:
        """Logits `(R, C)` by head."""
        u, a = flat(self.embed.of_request(request)), self.embed("ad", request.ad).flatten(2)
        experts = self.experts(u, a).unflatten(-1, self.shape)  # (R, C, E, H)
        outputs = {}
        for head in self.heads:
            gate = self.gates[head](u, a).softmax(-1)  # (R, C, E), eq. 7
            mixed = (gate.unsqueeze(-1) * experts).sum(2)  # eq. 6
            outputs[head] = self.last[head](self.towers[head](mixed)).squeeze(-1)
        return outputs
