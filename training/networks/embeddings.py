"""The vectors of a request's fields, from one table for all vocabularies."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from features.schema import Layout, Slot, lay_out
from features.vocabulary import PADDING

from .contract import Fields, Part, RequestTensors, full_name
from .lookup import EmbeddingTable, sum_up


class Embeddings(nn.Module):
    """Vectors of every field of a request, from one table for all vocabularies, so that a part is one gather.

    Row 0 of the table is zero: padding, whatever the field.
    """

    def __init__(self, fields: Fields, width: int, deviation: float = 1e-4) -> None:
        """`deviation` is that of the vectors that it begins with."""
        super().__init__()
        whole = {name: layout for name, layout in fields.layouts.items() if fields.count(name)}
        self.layouts = {name: lay_out(tuple(slot.field for slot in (*each.ids, *each.numbers))) for name, each in whole.items()}
        self.sizes, starts, rows = dict(sorted(fields.sizes.items())), {}, 1
        for vocabulary, size in self.sizes.items():
            starts[vocabulary] = rows - 1  # id 1 is the vocabulary's first row
            rows += size - 1
        table = EmbeddingTable(rows, width, split=0 < fields.shard_rows < rows)
        table.deviation = deviation
        self.table: nn.Embedding = table
        nn.init.normal_(self.table.weight, std=deviation)
        with torch.no_grad():
            self.table.weight[PADDING].zero_()
        self.scales = nn.ParameterDict()
        self.columns: dict[str, tuple[list[int], ...]] = {}
        """Those of a part's ids and numbers that are its fields'; all, but of `Fields.only`."""
        for name, layout in self.layouts.items():
            self.register_buffer(f"{name}_offsets", offsets_of(layout, starts), persistent=False)
            self.columns[name] = tuple(
                [c for slot in slots for c in range(slot.start, slot.stop)] for slots in (whole[name].ids, whole[name].numbers)
            )
            self.scales[name] = nn.Parameter(torch.empty(layout.number_width, width).normal_(std=1e-2))

    def __contains__(self, name: str) -> bool:
        return name in self.layouts

    @property
    def names(self) -> tuple[str, ...]:
        """The fields in the order of `of_all`, such as `user.age` and `history.genre`."""
        parts = [(part, self.layouts[part]) for part in ("user", "history", "ad") if part in self]
        return tuple(full_name(part, slot) for part, layout in parts for slot in (*layout.ids, *layout.numbers))

    def rows_of(self, vocabulary: str) -> slice:
        """The rows of the table that a vocabulary has, for its ids from 1 on."""
        before = sum(size - 1 for name, size in self.sizes.items() if name < vocabulary)
        return slice(before + 1, before + self.sizes[vocabulary])

    def table_rows(self, name: str, ids: Tensor) -> Tensor:
        """Ids of a part `(..., W)` to rows of the table `(..., W)`, W being the columns of these fields alone."""
        ids = self._own(name, 0, ids)
        return torch.where(ids > PADDING, ids + self.get_buffer(f"{name}_offsets"), PADDING)

    def forward(self, name: str, part: Part) -> Tensor:
        """Vectors `(..., F, D)` of a part: categories looked up, lists averaged over their values, numbers scaling a vector each.

        A dense vector is the sum over its numbers: a linear layer from its length to D.
        """
        vectors = []
        if self.layouts[name].width:
            vectors.append(self._pool(self.layouts[name], self._own(name, 0, part.ids), self.table(self.table_rows(name, part.ids))))
        if self.layouts[name].number_width:
            vectors.append(self._scaled(self.layouts[name].numbers, self._own(name, 1, part.numbers), self.scales[name]))
        return part.spread(torch.cat(vectors, dim=-2) if len(vectors) > 1 else vectors[0])

    @staticmethod
    def _scaled(slots: Sequence[Slot], numbers: Tensor, scales: Tensor) -> Tensor:
        if all(slot.field.kind == "number" for slot in slots):
            return numbers.unsqueeze(-1) * scales
        return torch.stack([numbers[..., slot.columns] @ scales[slot.columns] for slot in slots], dim=-2)

    def _own(self, name: str, block: int, values: Tensor) -> Tensor:
        """The columns of these fields, of a part's ids (block 0) or numbers (1)."""
        columns = self.columns[name][block]
        return values if values.shape[-1] == len(columns) else values[..., columns]

    def of_request(self, request: RequestTensors) -> Tensor:
        """Vectors `(R, F, D)` of what the candidates share: the user's fields, then the history's, each the mean over the behaviours.

        Where every field is the ad's there are none: `(R, 0, 1)`, which broadcasts against any width.
        """
        vectors: list[Tensor] = [self("user", request.user)] if "user" in self else []
        if "history" in self:
            mask = request.history.behaviours()
            count = mask.sum(1).clamp(min=1)[:, None, None]
            vectors.append(self._summed(request.history, mask) / count)
        if not vectors:
            return request.user.numbers.new_zeros((len(request.user.numbers), 0, 1))
        return torch.cat(vectors, dim=1)

    def _summed(self, history: Part, mask: Tensor) -> Tensor:
        """The sum of the behaviours' vectors `(R, F, D)`; that of a batch without laying them out a behaviour each."""
        if history.rows is None:
            laid_out: Tensor = self("history", history) * mask[..., None, None]
            return laid_out.sum(1)
        distinct = self("history", history._replace(rows=None)) * (history.ids[:, 0] > PADDING)[:, None, None]
        sums: Tensor = sum_up(distinct.flatten(1), history.rows).view(-1, *distinct.shape[1:])
        return sums

    def of_all(self, request: RequestTensors) -> Tensor:
        """Vectors `(R, C, F, D)` of all fields beside each candidate, those of the request first, repeated for each."""
        shared: Tensor = self.of_request(request)
        if "ad" not in self:
            return shared.unsqueeze(1).expand(-1, request.ad.numbers.shape[1], -1, -1)
        return beside(shared, self("ad", request.ad))

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

    def fused(self, _tile: int | None) -> nn.Module:
        """See `fuse.py`."""
        return FusedEmbeddings(self)


def offsets_of(layout: Layout, starts: Mapping[str, int]) -> Tensor:
    """What to add to the ids of a part `(..., W)` to have rows of a table, where each vocabulary `starts` (W,)."""
    return torch.tensor([starts[slot.field.vocabulary] for slot in layout.ids for _ in range(slot.field.length)], dtype=torch.int64)


def flat(vectors: Tensor) -> Tensor:
    """`(R, F, D)` to `(R, F * D)`; F may be 0, which ONNX cannot flatten."""
    return vectors.flatten(1) if vectors.shape[1] else vectors.squeeze(2)


def numbers_of(request: RequestTensors) -> Tensor:
    """All numbers beside each candidate as they are `(R, C, N)`: the user's, the means of the behaviours', the ad's."""
    shared, past = request.user.numbers, request.history
    if past.numbers.shape[-1]:
        mask = past.behaviours().unsqueeze(-1)
        mean = (past.spread(past.numbers) * mask).sum(1) / mask.sum(1).clamp(min=1)
        shared = torch.cat([shared, mean], dim=1)
    return beside(shared, request.ad.numbers)


def beside(request: Tensor, candidate: Tensor) -> Tensor:
    """`(R, C, A + B, ...)` of `request (R, A, ...)`, repeated for each candidate, and `candidate (R, C, B, ...)`; A may be 0."""
    if not request.shape[1]:
        return candidate
    return torch.cat([request.unsqueeze(1).expand(-1, candidate.shape[1], *request.shape[1:]), candidate], dim=2)


def table_of(rows: Tensor) -> nn.Embedding:
    """A table of given rows."""
    table: nn.Embedding = nn.Embedding.from_pretrained(rows)  # type: ignore[no-untyped-call]
    return table


class FusedEmbeddings(Embeddings):
    """`Embeddings` whose table has a row of zeros for each vocabulary, so that an id needs an addition to be a row and no choice."""

    def __init__(self, embed: Embeddings) -> None:
        nn.Module.__init__(self)
        self.layouts, self.sizes, self.scales, self.columns = embed.layouts, embed.sizes, embed.scales, embed.columns
        starts, pieces, row, old = {}, [], 0, 1
        for vocabulary, size in embed.sizes.items():
            starts[vocabulary] = row
            pieces += [torch.zeros(1, embed.table.embedding_dim), embed.table.weight[old : old + size - 1].detach()]
            row, old = row + size, old + size - 1
        self.table = table_of(torch.cat(pieces) if pieces else embed.table.weight)
        for name, layout in self.layouts.items():
            self.register_buffer(f"{name}_offsets", offsets_of(layout, starts))

    def table_rows(self, name: str, ids: Tensor) -> Tensor:
        """See `Embeddings`."""
        return self._own(name, 0, ids) + self.get_buffer(f"{name}_offsets")

    def fused(self, _tile: int | None) -> nn.Module:
        """It is."""
        return self
