"""Deep Interest Network: the history pooled anew for each candidate (Zhou et al. 2018, https://arxiv.org/abs/1706.06978)."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .blocks import Dice, Embeddings, Fields, Part, Tower


@dataclass(frozen=True)
class DINSettings:
    """Widths and dropout of a DIN."""

    embedding: int = 16
    """Width of every value's vector."""
    attention: tuple[int, ...] = (80, 40)
    """Widths of the activation unit's layers."""
    hidden: tuple[int, ...] = (200, 80)
    """Widths of the MLP's layers."""
    dropout: float = 0.1
    """Share of their activations that a training step leaves out."""
    softmax: bool = False
    """Normalise the attention over the behaviours, which the paper does not."""


class LocalActivation(nn.Module):
    """The activation unit of fig. 2: an MLP over [q, k, q - k, q * k] weighs each behaviour k for a candidate q."""

    def __init__(self, width: int, hidden: tuple[int, ...], softmax: bool) -> None:
        super().__init__()
        self.first = nn.Linear(4 * width, hidden[0])
        rest: list[nn.Module] = [Dice(hidden[0])]
        for before, after in pairwise(hidden):
            rest += [nn.Linear(before, after), Dice(after)]
        self.rest = nn.Sequential(*rest, nn.Linear(hidden[-1], 1))
        self.softmax = softmax
        for layer in (self.first, *self.rest):
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, candidates: Tensor, history: Tensor, mask: Tensor) -> Tensor:
        """Interests `(R, C, D)` of `candidates (R, C, D)` in `history (R, T, D)`, where `mask (R, T)` says what is no padding."""
        # W [q; k; q - k; q * k] = (Wq + Wd) q + ((Wk - Wd) + Wp diag(q)) k: one matrix a candidate, so that every pair costs one product.
        wq, wk, wd, wp = self.first.weight.chunk(4, dim=1)
        matrices = (wk - wd).T + candidates.unsqueeze(-1) * wp.T
        once = F.linear(candidates, wq + wd, self.first.bias).unsqueeze(2)
        weights = self.rest(history.unsqueeze(1) @ matrices + once).squeeze(-1)
        if self.softmax:
            weights = weights.masked_fill(~mask.unsqueeze(1), -1e9).softmax(-1)
        return torch.matmul(weights * mask.unsqueeze(1), history)


class DIN(nn.Module):
    """Logits `(R, C)` of a request's parts."""

    settings = DINSettings
    int8_pays = False  # its time goes to what lies between the products

    def __init__(self, fields: Fields, settings: DINSettings) -> None:
        super().__init__()
        if not fields.count("history"):
            raise ValueError("DIN weighs a user's behaviours, and this schema has no [history]; train deepfm instead")
        width = settings.embedding
        self.embed = Embeddings(fields, width)
        names = [[slot.field.name for slot in (*fields.layouts[part].ids, *fields.layouts[part].numbers)] for part in ("ad", "history")]
        self.shared = [names[0].index(name) for name in names[1]]
        """Which of an ad's fields a behaviour has too, in the behaviour's order: those are compared."""
        interest = len(self.shared) * width
        self.attention = LocalActivation(interest, settings.attention, settings.softmax)
        candidate = interest + fields.count("ad") * width
        # The paper is silent on a normalised input of the MLP; the authors' program has it.
        self.tower = Tower(fields.count("user") * width, candidate, settings.hidden, settings.dropout, dice=True)

    def forward(self, user: Part, history: Part, ad: Part) -> Tensor:
        """Logits `(R, C)` of `user (R, W)`, `history (R, T, W)` and candidates `ad (R, C, W)`."""
        ads = self.embed("ad", ad)
        past = self.embed("history", history).flatten(2)
        interests = self.attention(ads[:, :, self.shared].flatten(2), past, history.behaviours())
        request = self.embed("user", user).flatten(1) if "user" in self.embed else past.new_zeros((len(past), 0))
        candidates = torch.cat([interests, ads.flatten(2)], dim=-1)
        logits: Tensor = self.tower(request, candidates)
        return logits
