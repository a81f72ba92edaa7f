"""Deep Interest Network: the history pooled anew for each candidate (Zhou et al. 2018, https://arxiv.org/abs/1706.06978)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan
from torch.nn import functional as F

from .contract import CLICK, Explained, Fields, MLPSettings, Network, RequestTensors
from .embeddings import Embeddings
from .interactions import first_order
from .layers import Activation, Dice, Layer, Linear, Tower, merged
from .lookup import look_up
from .signatures import Signatures, newest


@dataclass(frozen=True)
class DINSettings(MLPSettings):
    """Widths and dropout of a DIN."""

    attention: tuple[int, ...] = (80, 40)
    """Widths of the activation unit's layers."""
    softmax: bool = False
    """Normalise the attention over the behaviours, which the paper does not."""
    first_order: int = -1
    """1: each value has a weight of its own beside the MLP too, as in a regression; 0: none has, as in the paper. -1: by the rows, 1 on
    fewer than `flat_below`, whose users an MLP alone learns by heart."""
    long: str = "attention"
    """How a long history is read: attention weighs every behaviour; sdim weighs the newest, and pools all by hashed signatures, whose
    cost hardly grows with their number."""
    newest: int = 50
    """How many behaviours are weighed where `long` is sdim."""


class LocalActivation(nn.Module):
    """The activation unit of fig. 2: an MLP over [q, k, q - k, q * k] weighs each behaviour k for a candidate q."""

    tiled = True

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
        return torch.matmul(self.explained(candidates, history, mask), history)

    def explained(self, candidates: Tensor, history: Tensor, mask: Tensor) -> Tensor:
        """The weights `(R, C, T)` of the behaviours, 0 where there is padding."""
        packed = self.training and int(mask.sum()) > 1  # Dice needs two to normalise over
        weights = self._of_pairs(candidates, history, mask) if packed else self._of_all(candidates, history)
        if self.softmax:
            weights = weights.masked_fill(~mask.unsqueeze(1), -1e9).softmax(-1)
        weighed: Tensor = weights * mask.unsqueeze(1)
        return weighed

    def _of_all(self, candidates: Tensor, history: Tensor) -> Tensor:
        """The MLP's outputs `(R, C, T)`, whatever they are for padding."""
        # W [q; k; q - k; q * k] = (Wq + Wd) q + ((Wk - Wd) + Wp diag(q)) k: one matrix a candidate, so that every pair costs one product.
        wq, wk, wd, wp = self.first.weight.chunk(4, dim=1)
        matrices = (wk - wd).T + candidates.unsqueeze(-1) * wp.T
        once = F.linear(candidates, wq + wd, self.first.bias).unsqueeze(2)
        outputs: Tensor = self.rest(history.unsqueeze(1) @ matrices + once).squeeze(-1)
        return outputs

    def _of_pairs(self, candidates: Tensor, history: Tensor, mask: Tensor) -> Tensor:
        """The same, but that padding is left out, of Dice's means as well, and has 0."""
        (requests, count, width), at = candidates.shape, mask.flatten().nonzero().squeeze(1)
        q = look_up(candidates.flatten(1), at // mask.shape[1]).view(-1, count, width)
        k = look_up(history.flatten(0, 1), at).unsqueeze(1).expand_as(q)
        wq, wk, wd, wp = self.first.weight.chunk(4, dim=1)
        pairs = self.rest(F.linear(torch.cat([q, k, q * k], -1).flatten(0, 1), torch.cat([wq + wd, wk - wd, wp], 1), self.first.bias))
        outputs = history.new_zeros((mask.numel(), count)).index_copy(0, at, pairs.view(-1, count))
        return outputs.view(requests, -1, count).transpose(1, 2)

    def fused(self, tile: int | None) -> nn.Module:
        """See `fuse.py`."""
        return FusedActivation(self, tile)


class DIN(Network):
    """The history pooled anew for each candidate, by an attention unit (Zhou et al. 2018)."""

    settings = DINSettings
    intercept_at = "tower.bias"

    def __init__(self, fields: Fields, settings: DINSettings) -> None:
        super().__init__(fields, settings)
        fields.require_history("DIN weighs a user's behaviours")
        if settings.first_order not in (-1, 0, 1):
            raise ValueError(f"first_order is {settings.first_order}; it must be 0 or 1, or -1: by the rows")
        if settings.long not in ("attention", "sdim"):
            raise ValueError(f"long is {settings.long!r}; it must be attention or sdim")
        if settings.newest < 1:
            raise ValueError(f"newest is {settings.newest}; it must be at least 1")
        width = settings.embedding
        self.embed = Embeddings(fields, width)
        self.shared = fields.shared
        interest = len(self.shared) * width
        self.attention = LocalActivation(interest, settings.attention, settings.softmax)
        self.signatures = Signatures(interest) if settings.long == "sdim" else None
        self.most = settings.newest
        candidate = interest * (1 if self.signatures is None else 2) + fields.count("ad") * width
        # The paper is silent on a normalised input of the MLP; the authors' program has it.
        self.tower = Tower(fields.count("user") * width, candidate, settings.hidden, settings.dropout, norm="dice")
        self.first = Embeddings(fields.without_history, 1) if settings.first_order == 1 else None

    def forward(self, request: RequestTensors) -> dict[str, Tensor]:
        """Logits `(R, C)`."""
        ads = self.embed("ad", request.ad)
        interests = self.interests(*self.compared(ads, request))
        user = self.embed("user", request.user).flatten(1) if "user" in self.embed else ads.new_zeros((len(ads), 0))
        logits = self.tower(user, torch.cat([interests, ads.flatten(2)], dim=-1))
        return {CLICK: logits if self.first is None else logits + first_order(self.first, request)}

    def interests(self, candidates: Tensor, history: Tensor, mask: Tensor) -> Tensor:
        """What a user's history says of each of `candidates (R, C, D)`: `(R, C, D)`, and as much again from signatures."""
        if self.signatures is None:
            attended: Tensor = self.attention(candidates, history, mask)
            return attended
        recent, known = self.newest_behaviours(history, mask)
        return torch.cat([self.attention(candidates, recent, known), self.signatures(candidates, history, mask)], dim=-1)

    def newest_behaviours(self, history: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The newest behaviours `(R, most, D)` of `history (R, T, D)`, and which of them are no padding."""
        at = newest(mask, self.most)
        recent = F.pad(history, (0, 0, 0, self.most)).gather(1, at.unsqueeze(-1).expand(-1, -1, history.shape[-1]))
        return recent, F.pad(mask, (0, self.most)).gather(1, at)

    def flatten(self) -> None:
        """See `DeepFM`."""
        if self.first is not None:
            nn.init.zeros_(self.tower.last.weight)

    def first_weights(self) -> list[nn.Parameter]:
        """See `Network`."""
        return [] if self.first is None else [*self.first.parameters(), self.tower.last.bias]

    def compared(self, ads: Tensor, request: RequestTensors) -> tuple[Tensor, Tensor, Tensor]:
        """What the attention unit compares: of `ads (R, C, F, D)` what a behaviour has too, the behaviours, and which are no padding."""
        past = self.embed("history", request.history).flatten(2)
        return ads[:, :, self.shared].flatten(2), past, request.history.behaviours()

    def explained(self, request: RequestTensors) -> Explained:
        """The attention unit's weights: those of a sum, of any size and sign, but with `softmax`. Signatures have none."""
        candidates, history, mask = self.compared(self.embed("ad", request.ad), request)
        if self.signatures is None:
            return Explained(attention=self.attention.explained(candidates, history, mask))
        recent = self.attention.explained(candidates, *self.newest_behaviours(history, mask))
        whole = recent.new_zeros((*recent.shape[:2], mask.shape[1] + self.most))
        at = newest(mask, self.most).unsqueeze(1).expand_as(recent)
        return Explained(attention=whole.scatter(2, at, recent)[..., : mask.shape[1]])


class FusedActivation(nn.Module):
    """A `LocalActivation` whose first layer is one matrix a behaviour, made once a request and shared by its candidates.

    W [q; k; q - k; q * k] + b = ((Wq + Wd) + Wp diag(k)) q + ((Wk - Wd) k + b): one product, with a 1 at the end of q. Where a
    `tile` is given, so many pairs are weighed at a time that what lies between two products stays in the processor's cache.
    """

    def __init__(self, unit: LocalActivation, tile: int | None) -> None:
        super().__init__()
        self.tile, self.softmax = tile, unit.softmax
        *hidden, last = merged(unit.first, unit.rest)
        layers = [*map(_with_one, hidden[:-1]), hidden[-1]]
        self.matrices = Linear(*_matrix_layer(layers[0]))
        self._activations = [Activation(layer) for layer in layers]
        self.activations = nn.ModuleList(self._activations)
        self.rest = nn.ModuleList(Linear(torch.cat([layer.weight, layer.bias[:, None]], 1), None) for layer in layers[1:])
        self.last = Linear(last.weight, None)
        self.bias = nn.Buffer(last.bias.float())

    def forward(self, candidates: Tensor, history: Tensor, mask: Tensor) -> Tensor:
        """See `LocalActivation`."""
        history = history * mask.unsqueeze(-1)
        q = F.pad(candidates, (0, 1), value=1.0).unsqueeze(1)
        weights = self._weigh(q, history) if self.tile is None else self._weigh_in_tiles(q, history, self.tile)
        weights = weights.transpose(1, 2)
        if self.softmax:
            return torch.matmul(weights.masked_fill(~mask.unsqueeze(1), -1e9).softmax(-1), history)
        return torch.matmul(weights, history) + self.bias * history.sum(1, keepdim=True)

    def _weigh(self, q: Tensor, history: Tensor) -> Tensor:
        """Weights `(R, T, C)`, the last layer's bias left out, of `history (R, T, D)` for `q (R, 1, C, D + 1)`."""
        return self._mlp(torch.matmul(q, self._matrices(q, history)), self._activations).squeeze(-1)

    def _weigh_in_tiles(self, q: Tensor, history: Tensor, tile: int) -> Tensor:
        """The same, `tile` pairs at a time: some behaviours with all candidates."""
        requests, _, candidates, _ = q.shape
        behaviours = history.shape[1]
        most = torch.sym_max(1, tile // (requests * candidates))  # type: ignore[no-untyped-call]
        count = (behaviours + most - 1) // most  # not -(-a // b): ONNX rounds a division towards zero
        width = (behaviours + count - 1) // count
        blocks = F.pad(history, (0, 0, 0, count * width - behaviours)).reshape(requests, count, width, -1).transpose(0, 1)
        # ONNX Runtime adds a vector to each row much more slowly than a whole tensor, so they are spread out, once for all tiles.
        activations = [activation.spread(requests, width, candidates) for activation in self._activations]

        def weigh(nothing: Tensor, matrices: Tensor) -> tuple[Tensor, Tensor]:
            return nothing.clone(), self._mlp(torch.matmul(q, matrices), activations)

        _, weights = scan(weigh, q.new_zeros(()), self._matrices(q, blocks))
        together: Tensor = weights.squeeze(-1).transpose(0, 1).flatten(1, 2)[:, :behaviours]
        return together

    def _matrices(self, q: Tensor, history: Tensor) -> Tensor:
        """A matrix `(D + 1, H)` for each behaviour `(D,)`."""
        rows: Tensor = self.matrices(history.reshape(-1, history.shape[-1]))  # 2-D: the bias joins the product
        return rows.view(*history.shape[:-1], q.shape[-1], -1)

    def _mlp(self, x: Tensor, activations: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
        """From what the first layer gives `(..., H)` to weights `(..., 1)`."""
        x = activations[0](x)
        for linear, activation in zip(self.rest, activations[1:], strict=True):
            x = activation(linear(x))
        weights: Tensor = self.last(x)
        return weights


def _matrix_layer(layer: Layer) -> tuple[Tensor, Tensor]:
    """Weight and bias of the linear layer that makes of a behaviour `(D,)` its matrix `(D + 1, H)`, written as one row."""
    wq, wk, wd, wp = layer.weight.chunk(4, dim=1)
    width, units = wq.shape[1], len(wq)
    weight = torch.zeros(width + 1, units, width, dtype=wq.dtype)
    weight[range(width), :, range(width)] = wp.T
    weight[width] = wk - wd
    return weight.flatten(0, 1), torch.cat([(wq + wd).T, layer.bias[None]]).flatten()


def _with_one(layer: Layer) -> Layer:
    """The layer with one more unit, which always gives 1 and so carries the next layer's bias."""
    assert layer.mean is not None  # noqa: S101  # the activation unit has Dice throughout
    assert layer.beta is not None  # noqa: S101
    mean, beta = F.pad(layer.mean, (0, 1), value=1.0), F.pad(layer.beta, (0, 1), value=0.5)
    return Layer(F.pad(layer.weight, (0, 0, 0, 1)), F.pad(layer.bias, (0, 1)), mean, beta)
