"""The networks as textbooks compute them, to measure against: one row a candidate, the request repeated in each.

They take their weights from ours, so their scores are equal. `textbook` is what published programs export: an embedding a field,
Dice over a batch norm, p x + (1 - p) α x. `row-wise` is the fastest form of the same rows in ONNX Runtime that we found: one table
with offsets, Dice as x (α + p (1 - α)), batch norms folded into a scale and a shift. DeepFM's batch norms are folded in both.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from features.encode import Feeds
from training.export.export import ServedNetwork, random_feeds
from training.export.onnx import exported
from training.networks.deepfm import DeepFM
from training.networks.din import DIN
from training.networks.embeddings import Embeddings
from training.networks.layers import BatchNorm, Dice, Tower


class RowwiseTable(nn.Module):
    """Vectors `(..., F, D)` of the ids `(..., F)` of some parts of a request: one table, each column with rows of its own."""

    def __init__(self, embed: Embeddings, sizes: Mapping[str, int], *parts: str) -> None:
        super().__init__()
        columns = [_column(embed, sizes, part, column) for part in parts for column in range(embed.layouts[part].width)]
        self.weight = nn.Parameter(torch.cat(columns).detach().clone())
        self.register_buffer("offsets", torch.tensor(np.cumsum([0, *map(len, columns[:-1])])))

    def forward(self, ids: Tensor) -> Tensor:
        """See the class."""
        return nn.functional.embedding(ids + self.get_buffer("offsets"), self.weight)


class FieldTables(nn.Module):
    """The same vectors from an embedding a column."""

    def __init__(self, embed: Embeddings, sizes: Mapping[str, int], *parts: str) -> None:
        super().__init__()
        columns = [_column(embed, sizes, part, column) for part in parts for column in range(embed.layouts[part].width)]
        self.columns = nn.ModuleList(nn.Embedding.from_pretrained(column) for column in columns)  # type: ignore[no-untyped-call]

    def forward(self, ids: Tensor) -> Tensor:
        """See `Table`."""
        return torch.stack([column(ids[..., i]) for i, column in enumerate(self.columns)], dim=-2)


class TextbookDice(nn.Module):
    """Dice over the last axis, as published programs write it."""

    def __init__(self, dice: Dice) -> None:
        super().__init__()
        self.norm, self.alpha = _plain(dice.norm), nn.Parameter(dice.alpha.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        p = torch.sigmoid(self.norm(x.flatten(0, -2)).view(x.shape))
        return p * x + (1 - p) * self.alpha * x


def _plain(norm: nn.BatchNorm1d) -> nn.BatchNorm1d:
    plain = nn.BatchNorm1d(norm.num_features, norm.eps, affine=norm.affine)
    plain.load_state_dict(norm.state_dict())
    return plain


def _column(embed: Embeddings, sizes: Mapping[str, int], part: str, column: int) -> Tensor:
    """The vectors of one field's ids, in the ids' order."""
    layout = embed.layouts[part]
    ids = torch.zeros((sizes[layout.ids[column].field.vocabulary], layout.width), dtype=torch.int64)
    ids[:, column] = torch.arange(len(ids))
    return embed.table.weight.detach()[embed.table_rows(part, ids)[:, column]]


def _affine(norm: nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    """A batch norm in evaluation as scale and shift."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var + norm.eps).rsqrt()
    scale = scale * norm.weight if norm.affine else scale
    shift = -norm.running_mean * scale
    return scale.detach(), (shift + norm.bias if norm.affine else shift).detach()


class RowwiseActivation(nn.Module):
    """Dice over the last axis."""

    def __init__(self, dice: Dice) -> None:
        super().__init__()
        self.scale, self.shift = map(nn.Parameter, _affine(dice.norm))
        self.alpha = nn.Parameter(dice.alpha.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Of `(..., features)`, that shape."""
        p = torch.sigmoid(x * self.scale + self.shift)
        return x * (self.alpha + p * (1 - self.alpha))


class Output(nn.Module):
    """A tower's logits to p(click)."""

    def __init__(self, served: ServedNetwork) -> None:
        super().__init__()
        self.scale, self.shift = served.scale, served.shift

    def forward(self, logits: Tensor) -> Tensor:
        """Of logits `(N,)`, that shape."""
        return torch.sigmoid(logits * self.scale + self.shift)


def _mlp(tower: Tower, textbook: bool) -> nn.Sequential:
    """The layers of a tower, a batch norm behind a linear layer folded into it."""
    layers: list[nn.Module] = []
    for layer in (tower.first, *tower.rest):
        if isinstance(layer, nn.Linear):
            plain = nn.Linear(layer.in_features, layer.out_features)
            plain.load_state_dict({"weight": layer.weight, "bias": layer.bias})
            layers.append(plain)
        elif isinstance(layer, BatchNorm):
            scale, shift = _affine(layer)
            before = layers[-1]
            assert isinstance(before, nn.Linear)
            before.weight.data = before.weight.data * scale[:, None]
            before.bias.data = before.bias.data * scale + shift
        elif isinstance(layer, Dice):
            layers.append(_dice(layer, textbook))
        elif isinstance(layer, nn.ReLU):
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def _dice(dice: Dice, textbook: bool) -> nn.Module:
    return TextbookDice(dice) if textbook else RowwiseActivation(dice)


class RowwiseDIN(nn.Module):
    """DIN of one row a candidate: attention over the concatenation of query, key, difference and product."""

    def __init__(self, served: ServedNetwork, network: DIN, sizes: Mapping[str, int], textbook: bool) -> None:
        super().__init__()
        table = FieldTables if textbook else RowwiseTable
        self.user, self.history, self.ad = (table(network.embed, sizes, part) for part in ("user", "history", "ad"))
        self.shared, self.signatures, self.newest = network.shared, network.signatures, network.newest_behaviours
        attention = network.attention
        layers = [nn.Linear(attention.first.in_features, attention.first.out_features)]
        layers[0].load_state_dict(attention.first.state_dict())
        self.attention = nn.Sequential(*layers, *(_dice(layer, textbook) if isinstance(layer, Dice) else layer for layer in attention.rest))
        norms = [_affine(norm) for norm in network.tower.norms]  # type: ignore[arg-type]
        self.scale, self.shift = (nn.Parameter(torch.cat(halves)) for halves in zip(*norms, strict=True))
        self.mlp, self.output = _mlp(network.tower, textbook), Output(served)

    def forward(self, user_ids: Tensor, history_ids: Tensor, ad_ids: Tensor) -> Tensor:
        """p(click) `(N,)` of `user_ids (N, Wu)`, `history_ids (N, T, Wh)` and `ad_ids (N, Wa)`."""
        ads = self.ad(ad_ids)
        key, known = self.history(history_ids).flatten(2), history_ids[..., 0] > 0
        query = ads[:, self.shared].flatten(1).unsqueeze(1)
        pooled = [] if self.signatures is None else [self.signatures(query, key, known).squeeze(1)]
        if pooled:
            key, known = self.newest(key, known)
        query = query.expand(-1, key.shape[1], -1)
        weights = self.attention(torch.cat([query, key, query - key, query * key], dim=-1))
        interest = torch.cat([(weights * known.unsqueeze(-1) * key).sum(1), *pooled], dim=-1)
        x = torch.cat([self.user(user_ids).flatten(1), interest, ads.flatten(1)], dim=-1)
        p_click: Tensor = self.output(self.mlp(x * self.scale + self.shift).squeeze(-1))
        return p_click


class RowwiseDeepFM(nn.Module):
    """DeepFM of one row a candidate, without a history."""

    def __init__(self, served: ServedNetwork, network: DeepFM, sizes: Mapping[str, int], textbook: bool) -> None:
        super().__init__()
        table = FieldTables if textbook else RowwiseTable
        self.first, self.second = (table(embed, sizes, "user", "ad") for embed in (network.first, network.second))
        self.bias = nn.Parameter(network.bias.detach().clone())
        self.mlp, self.output = _mlp(network.tower, textbook), Output(served)

    def forward(self, user_ids: Tensor, ad_ids: Tensor) -> Tensor:
        """p(click) `(N,)` of `user_ids (N, Wu)` and `ad_ids (N, Wa)`."""
        ids = torch.cat([user_ids, ad_ids], dim=1)
        linear, vectors = self.first(ids).sum((1, 2)), self.second(ids)
        pairs = 0.5 * (vectors.sum(1).square() - vectors.square().sum(1)).sum(-1)
        p_click: Tensor = self.output(linear + pairs + self.mlp(vectors.flatten(1)).squeeze(-1) + self.bias)
        return p_click


def repeated(feeds: Feeds) -> Feeds:
    """A request's tensors `(1, ...)` as the row-wise graph takes them: `(C, ...)`, all but the candidates C times the same."""
    count = feeds["ad_ids"].shape[1]
    return {name: array[0] if name == "ad_ids" else np.repeat(array, count, axis=0) for name, array in feeds.items()}


def rowwise_onnx(served: ServedNetwork, sizes: Mapping[str, int], textbook: bool = False) -> bytes:
    """The row-wise graph with the weights of a served network, over any number of rows and behaviours."""
    network = served.network
    assert isinstance(network, DIN | DeepFM)
    kind = RowwiseDIN if isinstance(network, DIN) else RowwiseDeepFM
    rowwise = kind(served, network, sizes, textbook).eval()  # type: ignore[arg-type]
    sample = repeated(random_feeds(served.schema, {}, 1, 4, 5))
    dynamic = {name: dict.fromkeys(range(array.ndim - 1), torch.export.Dim.DYNAMIC) for name, array in sample.items()}
    return exported(rowwise, {name: torch.from_numpy(array) for name, array in sample.items()}, dynamic, list(sample))
