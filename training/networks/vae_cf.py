"""A multinomial variational autoencoder over the ads of a user's history, whose output scores candidates (Liang et al. 2018,
https://arxiv.org/abs/1802.05814).

The history alone says who the user is: other fields of the request play no part. Different from the paper: an ad is the sum of its
fields' vectors, on both sides, so that one whose genre is known has a score before it is clicked; and the click's cross-entropy joins
the loss, as the paper's scores order ads for one user and say nothing of how likely a click is.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from .contract import CLICK, Fields, Labels, Network, Outputs, Part, RequestTensors
from .embeddings import Embeddings
from .layers import Dropout, begin_linear

MOST_ADS = 200_000
"""Each step sums over all ads for each of its rows."""


@dataclass(frozen=True)
class VAECFSettings:
    """Widths and loss of a variational autoencoder."""

    hidden: tuple[int, ...] = (200,)
    """Widths of the encoder's layers, and from the last to the first of the decoder's; the first is that of an ad's vector."""
    latent: int = 64
    """Width of what a history is encoded to."""
    dropout: float = 0.5
    """Share of the behaviours that a training step hides, to learn to find them."""
    reconstruction: float = 0.1
    """Weight of the autoencoder's loss, a behaviour's on average, beside the click's cross-entropy."""
    beta: float = 0.2
    """Weight of the Kullback-Leibler divergence beside the behaviours' likelihood, reached after `anneal` steps."""
    anneal: int = 2000
    """Steps over which that weight grows from 0."""


class VAECF(Network):
    """A variational autoencoder over a user's ads that scores candidates (Liang et al. 2018)."""

    place: Tensor
    """Where an ad's id is among `ads`, -1 where it is not."""
    settings = VAECFSettings
    embedding_l2 = 1e-5

    def __init__(self, fields: Fields, settings: VAECFSettings) -> None:
        super().__init__(fields, settings)
        fields.require_history("vae_cf encodes the ads of a user's history")
        vocabulary = next(slot.field.vocabulary for slot in fields.layouts["history"].ids)
        if fields.sizes[vocabulary] > MOST_ADS:
            raise ValueError(
                f"vae_cf sums over all ads in each step, {fields.sizes[vocabulary]:,} of them, and {MOST_ADS:,} are the most; "
                "train two_tower, which draws some"
            )
        width, *_ = sizes = settings.hidden
        self.past = Embeddings(fields.only({"history": fields.names("history")}), width, deviation=width**-0.5)
        self.items = Embeddings(fields.only({"ad": fields.names("ad")}), width + 1, deviation=width**-0.5)  # the last is the ad's own bias
        self.start = nn.Parameter(torch.zeros(width))
        self.encoder = nn.Sequential(*_tanh(sizes), nn.Linear(sizes[-1], 2 * settings.latent))
        self.decoder = nn.Sequential(*_tanh((settings.latent, *reversed(sizes))))
        begin_linear(*self.encoder, *self.decoder)
        self.hide = Dropout(settings.dropout)
        self.bias = nn.Parameter(torch.zeros(1))
        self.reconstruction, self.beta, self.anneal = settings.reconstruction, settings.beta, settings.anneal
        self.steps, self.ads = 0, Part(torch.zeros((0, 0), dtype=torch.int64), torch.zeros((0, 0)))
        self.register_buffer("place", torch.full((fields.sizes[vocabulary],), -1), persistent=False)

    def forward(self, request: RequestTensors) -> dict[str, Tensor]:
        """Logits `(R, C)`; in training what the history is decoded to `(R, H)`, and the mean and log variance of its code, too."""
        mean, log_variance = self.encoded(request.history).chunk(2, dim=-1)
        code = mean + torch.randn_like(mean) * (0.5 * log_variance).exp() if self.training else mean
        user = self.decoder(code)
        logits = self.scores(user.unsqueeze(1), self.items("ad", request.ad)).squeeze(1) + self.bias
        return {CLICK: logits, "user": user, "mean": mean, "log_variance": log_variance} if self.training else {CLICK: logits}

    def encoded(self, history: Part) -> Tensor:
        """Mean and log variance `(R, 2 K)` of the code: eq. 2 of the paper, of the behaviours over the root of their number."""
        mask = history.behaviours()
        shown = self.hide(mask.to(self.start.dtype)) / mask.sum(1, keepdim=True).clamp(min=1).sqrt()
        code: Tensor = self.encoder(torch.tanh((self.past("history", history).sum(2) * shown.unsqueeze(-1)).sum(1) + self.start))
        return code

    @staticmethod
    def scores(users: Tensor, fields: Tensor) -> Tensor:
        """Scores `(..., U, A)` of users `(..., U, H)` for ads, each the sum of its fields `(..., A, F, H + 1)`."""
        ads = fields.sum(-2)
        return users @ ads[..., :-1].transpose(-1, -2) + ads[..., -1].unsqueeze(-2)

    def begin(self, ads: Part) -> None:
        """See `Network`."""
        self.ads, self.steps = ads, 0
        (slot,) = (slot for slot in self.fields.layouts["ad"].ids if slot.field.name == "ad_id")
        self.place.fill_(-1)
        self.place[ads.ids[:, slot.start]] = torch.arange(len(ads.ids), device=ads.ids.device)

    def after_step(self, steps: int) -> None:
        """See `Network`."""
        self.steps = steps

    def loss(self, outputs: Outputs, request: RequestTensors, labels: Labels) -> Tensor:
        """The click's cross-entropy, and the negative of the evidence's lower bound (eq. 3 and 6), a behaviour's on average."""
        click = super().loss(outputs, request, labels)
        places = self.place[request.history.ids[..., 0]]
        places = places if request.history.rows is None else places[request.history.rows]  # (R, T)
        known = request.history.behaviours() & (places >= 0)
        likely = self.scores(outputs["user"], self.items("ad", self.ads)).log_softmax(-1).gather(1, places.clamp(min=0))
        mean, log_variance = outputs["mean"], outputs["log_variance"]
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum()
        beta = self.beta * min(1.0, self.steps / max(self.anneal, 1))
        bound = ((likely * known).sum() - beta * divergence) / known.sum().clamp(min=1)
        return click - self.reconstruction * bound


def _tanh(sizes: tuple[int, ...]) -> list[nn.Module]:
    """Linear layers from each size to the next, with tanh."""
    return [block for before, after in pairwise(sizes) for block in (nn.Linear(before, after), nn.Tanh())]
