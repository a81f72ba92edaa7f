"""DeepFM: first order + factorisation machine + MLP over shared embeddings (Guo et al. 2017, https://arxiv.org/abs/1703.04247).

The history, where there is one, joins as one more field for each of its own: the mean over the behaviours.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .blocks import Embeddings, Fields, Part, Tower


@dataclass(frozen=True)
class DeepFMSettings:
    """Widths and dropout of a DeepFM."""

    embedding: int = 16
    """Width of every value's vector."""
    hidden: tuple[int, ...] = (200, 80)
    """Widths of the MLP's layers."""
    dropout: float = 0.1
    """Share of their activations that a training step leaves out."""


class DeepFM(nn.Module):
    """Logits `(R, C)` of a request's parts. What concerns the request side alone is computed once a request."""

    settings = DeepFMSettings
    int8_pays = True

    def __init__(self, fields: Fields, settings: DeepFMSettings) -> None:
        super().__init__()
        width = settings.embedding
        self.first, self.second = Embeddings(fields, 1), Embeddings(fields, width)
        request = fields.count("user") + fields.count("history")
        self.tower = Tower(request * width, fields.count("ad") * width, settings.hidden, settings.dropout)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, user: Part, history: Part, ad: Part) -> Tensor:
        """Logits `(R, C)` of `user (R, W)`, `history (R, T, W)` and candidates `ad (R, C, W)`."""
        linear = self._request(self.first, user, history).sum(1) + self.first("ad", ad).sum(2).squeeze(-1)
        u, a = self._request(self.second, user, history), self.second("ad", ad)
        # Eq. 2 of the paper as the square of the sum less the sum of squares, so that the request's sums are shared.
        total = u.sum(1).unsqueeze(1) + a.sum(2)
        squares = u.square().sum(1).unsqueeze(1) + a.square().sum(2)
        pairs = 0.5 * (total.square() - squares).sum(-1)
        request = u.flatten(1) if u.shape[1] else u.squeeze(2)  # ONNX cannot flatten nothing
        logits: Tensor = linear + pairs + self.tower(request, a.flatten(2)) + self.bias
        return logits

    def flatten(self) -> None:
        """Let the MLP say the same of all, so that the first order learns first.

        Batch norm blows the noise of fresh embeddings up to the size of a signal: unlearning it takes rows that a small log lacks.
        """
        nn.init.zeros_(self.tower.last.weight)

    def _request(self, embed: Embeddings, user: Part, history: Part) -> Tensor:
        vectors = [embed("user", user)] if "user" in embed else []
        if "history" in embed:
            mask = history.behaviours()
            count = mask.sum(1).clamp(min=1)[:, None, None]
            vectors.append((embed("history", history) * mask[..., None, None]).sum(1) / count)
        if not vectors:  # every field is the ad's: no vectors, (R, 0, 1), which broadcast against any width
            return user.numbers.new_zeros((len(user.numbers), 0, 1))
        return torch.cat(vectors, dim=1)
