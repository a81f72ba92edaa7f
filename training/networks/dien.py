"""Deep Interest Evolution Network: interests that evolve towards each candidate (Zhou et al. 2019, https://arxiv.org/abs/1809.03672).

A GRU makes of each behaviour the interest behind it, taught by what the user does next (the auxiliary loss). An AUGRU then follows the
interests that a candidate attends to. The GRU runs once a request, the AUGRU once a candidate.

Where requests have ages, the GRU is given each behaviour beside the vector of its age, in buckets of powers of two (`ages.py`), and so
the candidate's interests fade with time and not with steps alone. The paper has none.

Deliberately different: where the authors' program scores an interest and a behaviour by an MLP, this is the paper's inner product;
a negative that happens to be what the user did next is left out; the MLP's input is normalised, as in our DIN.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .ages import AgeVectors
from .contract import CLICK, Explained, Fields, Labels, MLPSettings, Network, Outputs, Part, RequestTensors
from .embeddings import Embeddings
from .layers import Tower
from .recurrent import AUGRU, GRU

INTERESTS, BEHAVIOURS = "interests", "behaviours"


@dataclass(frozen=True)
class DIENSettings(MLPSettings):
    """Widths, dropout and the auxiliary loss of a DIEN."""

    embedding: int = 16
    """Width of every value's vector; an interest is as wide as a behaviour, whose fields' vectors lie side by side."""
    auxiliary: float = 1.0
    """Weight α of the auxiliary loss (eq. 7); 0: there is none."""

    def __post_init__(self) -> None:
        if self.auxiliary < 0:
            raise ValueError(f"auxiliary is {self.auxiliary:g}; it must be at least 0, 0 being no auxiliary loss")


class Attention(nn.Module):
    """How much a candidate attends to each interest (eq. 8): the softmax of h W e over the behaviours."""

    def __init__(self, interest: int, candidate: int) -> None:
        super().__init__()
        self.weight = nn.Linear(interest, candidate, bias=False)

    def forward(self, interests: Tensor, candidates: Tensor, mask: Tensor) -> Tensor:
        """Weights `(R, C, T)` of `interests (R, T, H)` for `candidates (R, C, A)`, 0 where `mask (R, T)` says padding."""
        scores = torch.matmul(candidates, self.weight(interests).transpose(1, 2))
        mask = mask.unsqueeze(1)
        return scores.masked_fill(~mask, -1e9).softmax(-1) * mask


class DIEN(Network):
    """Interests that evolve towards each candidate: a GRU, then a GRU with attention (Zhou et al. 2019)."""

    settings = DIENSettings
    splits = False  # its loss looks nothing up for a batch without behaviours
    intercept_at = "tower.bias"

    def __init__(self, fields: Fields, settings: DIENSettings) -> None:
        super().__init__(fields, settings)
        fields.require_history("dien follows a user's behaviours")
        width, candidate = fields.count("history") * settings.embedding, fields.count("ad") * settings.embedding
        self.embed = Embeddings(fields, settings.embedding)
        self.ages = AgeVectors(settings.embedding) if fields.ages else None
        self.extract = GRU(width + settings.embedding * fields.ages, width)
        self.attention = Attention(width, candidate)
        self.evolve = AUGRU(width, width)
        self.tower = Tower(fields.count("user") * settings.embedding, width + candidate, settings.hidden, settings.dropout, norm="dice")
        self.auxiliary = settings.auxiliary
        self.catalogue: Part | None = None
        """The ads that negatives are drawn from, as behaviours `(A, W)`."""

    def begin(self, ads: Part) -> None:
        """See `Network`."""
        self.catalogue = self.fields.behaviours_of(ads)

    def forward(self, request: RequestTensors) -> dict[str, Tensor]:
        """Logits `(R, C)`; while training also what the auxiliary loss needs."""
        behaviours = self.embed("history", request.history).flatten(2)  # (R, T, H)
        ads = self.embed("ad", request.ad).flatten(2)  # (R, C, A)
        user = self.embed("user", request.user).flatten(1) if "user" in self.embed else ads.new_zeros((len(ads), 0))
        interests = self.interests(behaviours, request)
        evolved = self.evolve(interests, self.attention(interests, ads, request.history.behaviours()))  # (R, C, H)
        logits = self.tower(user, torch.cat([evolved, ads], dim=-1))
        return {CLICK: logits, INTERESTS: interests, BEHAVIOURS: behaviours} if self.training else {CLICK: logits}

    def interests(self, behaviours: Tensor, request: RequestTensors) -> Tensor:
        """The interest behind each of `behaviours (R, T, H)`, in the light of those before it."""
        interests: Tensor = self.extract(behaviours if self.ages is None else torch.cat([behaviours, self.ages(request.ages)], dim=-1))
        return interests

    def explained(self, request: RequestTensors) -> Explained:
        """How much a candidate attends to the interest behind each behaviour: shares of 1."""
        behaviours, ads = self.embed("history", request.history).flatten(2), self.embed("ad", request.ad).flatten(2)
        return Explained(attention=self.attention(self.interests(behaviours, request), ads, request.history.behaviours()))

    def loss(self, outputs: Outputs, request: RequestTensors, labels: Labels) -> Tensor:
        """The clicks' cross-entropy and α times the auxiliary loss (eq. 7)."""
        loss = super().loss(outputs, request, labels)
        if not self.auxiliary or outputs[BEHAVIOURS].shape[1] < 2:
            return loss
        assert self.catalogue is not None  # noqa: S101  # the training loop begins with it
        count, following = len(self.catalogue.ids), outputs[BEHAVIOURS][:, 1:]
        pool = torch.randint(count, (len(following),), device=following.device)  # embedded once each, however often they are drawn
        drawn = torch.randint(len(pool), following.shape[:2], device=following.device)
        negatives = Part(self.catalogue.ids[pool], self.catalogue.numbers[pool], drawn)
        other = self.embed("history", negatives).flatten(2)
        known = request.history.behaviours()[:, 1:]
        distinct = known & (negatives.ad_ids() != request.history.ad_ids()[:, 1:])
        return loss + self.auxiliary * auxiliary_loss(outputs[INTERESTS][:, :-1], (following, known), (other, distinct))


def auxiliary_loss(interests: Tensor, following: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    """Eq. 6: an interest is to tell the behaviour that follows it from another, by their inner product.

    Vectors `(R, T, H)`, those that follow and the others each with a mask `(R, T)` of what is none; the mean over what is left.
    """
    (positive, known), (negative, distinct) = following, other
    hit = F.logsigmoid((interests * positive).sum(-1)) * known
    miss = F.logsigmoid(-(interests * negative).sum(-1)) * distinct
    return -(hit.sum() / known.sum().clamp(min=1) + miss.sum() / distinct.sum().clamp(min=1))
