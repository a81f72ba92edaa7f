"""The blocks that networks are made of. They take tensors; none knows of a loss, an optimiser, a device or a file.

Shapes: R requests, T behaviours, C candidates, F fields, D embedding width, W id columns, N number columns.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from features.schema import Layout, Schema
from features.vocabulary import PADDING, Vocabularies


class Part(NamedTuple):
    """One part of a request: `ids (..., W)` int64 and `numbers (..., N)` float32; W or N may be 0.

    A batch's behaviours repeat a few ads many times. Given `rows (R, T)`, `ids (U, W)` and `numbers (U, N)` are the distinct
    ads, and behaviour (r, t) is the one at `rows[r, t]`: the same request, several times faster to train on.
    """

    ids: Tensor
    numbers: Tensor
    rows: Tensor | None = None

    def spread(self, values: Tensor) -> Tensor:
        """What was worked out for `ids`, laid out as the request is: `(U, ...)` to `(R, T, ...)` where there are `rows`."""
        if self.rows is None:
            return values
        return F.embedding(self.rows, values.flatten(1)).view(*self.rows.shape, *values.shape[1:])

    def behaviours(self) -> Tensor:
        """Which of a history `(R, T)` are behaviours rather than padding: a behaviour's `ad_id` is never 0."""
        present = self.ids[..., 0] > PADDING
        return present if self.rows is None else present[self.rows]


class Fields(NamedTuple):
    """What a network has to know of the data: the layouts of `user`, `history` and `ad`, and the size of each vocabulary."""

    layouts: Mapping[str, Layout]
    sizes: Mapping[str, int]

    @classmethod
    def of(cls, schema: Schema, vocabularies: Vocabularies) -> "Fields":
        """The fields of a schema whose vocabularies have been learned."""
        return cls(schema.layouts, {name: v.size for name, v in vocabularies.categories.items()})

    def count(self, part: str) -> int:
        """F of a part."""
        return len(self.layouts[part].ids) + len(self.layouts[part].numbers)


class Embeddings(nn.Module):
    """Vectors of every field of a request, from one table for all vocabularies, so that a part is one gather.

    Row 0 of the table is zero: padding, whatever the field.
    """

    def __init__(self, fields: Fields, width: int) -> None:
        super().__init__()
        self.layouts = {name: layout for name, layout in fields.layouts.items() if fields.count(name)}
        self.sizes, starts, rows = dict(sorted(fields.sizes.items())), {}, 1
        for vocabulary, size in self.sizes.items():
            starts[vocabulary] = rows - 1  # id 1 is the vocabulary's first row
            rows += size - 1
        self.table = nn.Embedding(rows, width, padding_idx=PADDING)
        nn.init.normal_(self.table.weight, std=1e-4)
        with torch.no_grad():
            self.table.weight[PADDING].zero_()
        self.scales = nn.ParameterDict()
        for name, layout in self.layouts.items():
            self.register_buffer(f"{name}_offsets", offsets_of(layout, starts), persistent=False)
            self.scales[name] = nn.Parameter(torch.empty(layout.number_width, width).normal_(std=1e-2))

    def __contains__(self, name: str) -> bool:
        return name in self.layouts

    def rows_of(self, vocabulary: str) -> slice:
        """The rows of the table that a vocabulary has, for its ids from 1 on."""
        before = sum(size - 1 for name, size in self.sizes.items() if name < vocabulary)
        return slice(before + 1, before + self.sizes[vocabulary])

    def table_rows(self, name: str, ids: Tensor) -> Tensor:
        """Ids of a part `(..., W)` to rows of the table `(..., W)`."""
        return torch.where(ids > PADDING, ids + self.get_buffer(f"{name}_offsets"), PADDING)

    def forward(self, name: str, part: Part) -> Tensor:
        """Vectors `(..., F, D)` of a part: categories looked up, lists averaged over their values, numbers scaling a vector."""
        vectors = []
        if self.layouts[name].width:
            vectors.append(self._pool(self.layouts[name], part.ids, self.table(self.table_rows(name, part.ids))))
        if self.layouts[name].number_width:
            vectors.append(part.numbers.unsqueeze(-1) * self.scales[name])
        return part.spread(torch.cat(vectors, dim=-2) if len(vectors) > 1 else vectors[0])

    @staticmethod
    def _pool(layout: Layout, ids: Tensor, values: Tensor) -> Tensor:
        if all(slot.field.length == 1 for slot in layout.ids):
            return values
        pooled = []
        for slot in layout.ids:
            vectors = values[..., slot.columns, :]
            if slot.field.length > 1:
                counts = (ids[..., slot.columns] > PADDING).sum(-1, keepdim=True).clamp(min=1)
                vectors = vectors.sum(-2, keepdim=True) / counts.unsqueeze(-1).to(values.dtype)
            pooled.append(vectors)
        return torch.cat(pooled, dim=-2)


def offsets_of(layout: Layout, starts: Mapping[str, int]) -> Tensor:
    """What to add to the ids of a part `(..., W)` to have rows of a table, where each vocabulary `starts` (W,)."""
    return torch.tensor([starts[slot.field.vocabulary] for slot in layout.ids for _ in range(slot.field.length)], dtype=torch.int64)


class SplitLinear(nn.Linear):
    """A linear layer over [request side, candidate], its request half computed once a request, not once a candidate.

    W [u; a] + b = (W_u u + b) + W_a a, exactly.
    """

    def __init__(self, request: int, candidate: int, out: int) -> None:
        super().__init__(request + candidate, out)
        self.request = request

    def forward(self, request: Tensor, candidate: Tensor) -> Tensor:  # type: ignore[override]
        """`(R, C, out)` from `request (R, request)` and `candidate (R, C, candidate)`."""
        once = F.linear(request, self.weight[:, : self.request], self.bias)
        return once.unsqueeze(1) + F.linear(candidate, self.weight[:, self.request :])


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation over every axis but the last."""

    def forward(self, x: Tensor) -> Tensor:
        """Of `(..., features)`, that shape."""
        if not self.num_features:  # torch's fails on none, such as those of a user side without fields
            return x
        return super().forward(x.flatten(0, -2)).view(x.shape)


class Dice(nn.Module):
    """DIN eq. 3: x (p + (1 - p) α), p = sigmoid of x normalised over the batch; α is learned."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.norm = BatchNorm(features, affine=False, eps=1e-8)
        self.alpha = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        """Of `(..., features)`, that shape."""
        p = torch.sigmoid(self.norm(x))
        return x * (self.alpha + p * (1 - self.alpha))


class Tower(nn.Module):
    """The MLP of a network, from [request side, candidate] to one logit a candidate; its first layer is split.

    With `dice` its activations are Dice instead of batch norm and ReLU, and its input is normalised: decayed embeddings are tiny,
    and Dice, unlike batch norm before ReLU, would let them stay so.
    """

    def __init__(self, request: int, candidate: int, hidden: tuple[int, ...], dropout: float, dice: bool = False) -> None:
        super().__init__()
        self.norms = nn.ModuleList([BatchNorm(request), BatchNorm(candidate)] if dice else [])
        self.first = SplitLinear(request, candidate, hidden[0])
        rest: list[nn.Module] = []
        for i, width in enumerate(hidden):
            rest += [nn.Linear(hidden[i - 1], width)] if i else []
            rest += [Dice(width)] if dice else [BatchNorm(width), nn.ReLU()]
            rest += [nn.Dropout(dropout)] if dropout else []
        self.rest = nn.Sequential(*rest, nn.Linear(hidden[-1], 1))
        for layer in (self.first, *self.rest):
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight)
                nn.init.zeros_(layer.bias)

    @property
    def last(self) -> nn.Linear:
        """The layer that gives the logit."""
        last = self.rest[-1]
        assert isinstance(last, nn.Linear)  # noqa: S101  # as it was made
        return last

    @property
    def bias(self) -> Tensor:
        """What every logit has in it `(1,)`."""
        return self.last.bias

    def forward(self, request: Tensor, candidate: Tensor) -> Tensor:
        """Logits `(R, C)` from `request (R, request)` and `candidate (R, C, candidate)`."""
        if self.norms:
            request, candidate = self.norms[0](request), self.norms[1](candidate)
        logits: Tensor = self.rest(self.first(request, candidate))
        return logits.squeeze(-1)
