"""What a network takes, gives and may say of its training: the contract between networks, the training loop and the exporter.

Shapes: R requests, T behaviours, C candidates, W id columns, N number columns. A row of a log is a request with one candidate.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from features.schema import AGES, Layout, Schema, Slot
from features.vocabulary import PADDING, Vocabularies

from .lookup import look_up
from .position_bias import PositionBias

CLICK = "click"
"""The head that every network has."""
Outputs = Mapping[str, Tensor]
"""Logits `(R, C)` by head, and whatever else a network's own loss needs, with R as its first axis."""


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
        return look_up(values.flatten(1), self.rows).view(*self.rows.shape, *values.shape[1:])

    def behaviours(self) -> Tensor:
        """Which of a history `(R, T)` are behaviours rather than padding: a behaviour's `ad_id` is never 0."""
        return self.ad_ids() > PADDING

    def ad_ids(self) -> Tensor:
        """The `ad_id` of each behaviour of a history `(R, T)`."""
        return self.ids[..., 0] if self.rows is None else self.ids[:, 0][self.rows]

    def first(self, requests: int) -> "Part":
        """That of the first requests."""
        if self.rows is not None:
            return self._replace(rows=self.rows[:requests])
        return Part(self.ids[:requests], self.numbers[:requests])


class RequestTensors(NamedTuple):
    """R requests: `user (R, W)`, behaviours `history (R, T, W)`, oldest first and padded at the end, candidates `ad (R, C, W)`."""

    user: Part
    history: Part
    ad: Part
    ages: Tensor | None = None
    """How old the behaviours are `(R, T)`, in seconds, 0 where there is padding; None where the schema has no ages."""

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "RequestTensors":
        """From the tensors of `Schema.tensors` by name; a part that the schema has no columns of has none here."""
        requests, parts = next(iter(tensors.values())).shape[0], []
        for name, shape in (("user", (requests,)), ("history", (requests, 1)), ("ad", (requests, 1))):
            ids, numbers = tensors.get(f"{name}_ids"), tensors.get(f"{name}_numbers")
            if numbers is None:
                numbers = torch.zeros((*(shape if ids is None else ids.shape[:-1]), 0))
            if ids is None:
                ids = torch.zeros((*numbers.shape[:-1], 0), dtype=torch.int64)
            parts.append(Part(ids, numbers))
        return cls(parts[0], parts[1], parts[2], tensors.get(AGES))

    def parts(self) -> dict[str, Part]:
        """The parts by name."""
        return {"user": self.user, "history": self.history, "ad": self.ad}

    def first(self, requests: int) -> "RequestTensors":
        """The first requests."""
        ages = None if self.ages is None else self.ages[:requests]
        return RequestTensors(self.user.first(requests), self.history.first(requests), self.ad.first(requests), ages)


class Labels(NamedTuple):
    """What came of R rows: by head `(R,)`, 0 or 1, and NaN where that is not known; and what each row weighs `(R,)`, None being 1."""

    heads: Mapping[str, Tensor]
    weight: Tensor | None = None
    maturity: Mapping[str, Tensor] = MappingProxyType({})
    """By head `(R,)`, how likely what is to come would have come by now: above 0, at most 1. A head that is not there waits for nothing."""
    place: Tensor | None = None
    """Where the ads were shown `(R,)`, from 0; None where nobody asks."""


class Fields(NamedTuple):
    """What a network has to know of the data: the layouts of `user`, `history` and `ad`, and the size of each vocabulary."""

    layouts: Mapping[str, Layout]
    sizes: Mapping[str, int]
    heads: tuple[str, ...] = (CLICK,)
    """The outcomes that the rows have labels for."""
    ages: bool = False
    """Whether requests have the ages of behaviours."""
    shard_rows: int = 0
    """Tables of more rows than this are to be split over processes (`shards.py`); 0: none is."""

    @classmethod
    def of(cls, schema: Schema, vocabularies: Vocabularies, heads: tuple[str, ...] = (CLICK,)) -> "Fields":
        """The fields of a schema whose vocabularies have been learned."""
        return cls(schema.layouts, {name: v.size for name, v in vocabularies.categories.items()}, heads, schema.history_ages)

    def only(self, names: Mapping[str, Collection[str]]) -> "Fields":
        """Those of some names by part, and their vocabularies. Their columns stay where they are in a request."""
        layouts = {
            part: Layout(*(tuple(slot for slot in slots if slot.field.name in names.get(part, ())) for slots in (each.ids, each.numbers)))
            for part, each in self.layouts.items()
        }
        used = {slot.field.vocabulary for layout in layouts.values() for slot in layout.ids}
        return self._replace(layouts=layouts, sizes={name: size for name, size in self.sizes.items() if name in used})

    def count(self, part: str) -> int:
        """F of a part."""
        return len(self.layouts[part].ids) + len(self.layouts[part].numbers)

    @property
    def categories(self) -> "Fields":
        """These without the numbers."""
        return self._replace(layouts={part: Layout(layout.ids, ()) for part, layout in self.layouts.items()})

    @property
    def without_history(self) -> "Fields":
        """These without those of the history, which share their weights with the ads."""
        return self._replace(layouts={**self.layouts, "history": Layout((), ())})

    @property
    def numbers(self) -> int:
        """Columns of all numbers beside a candidate, where a vector has several: see `numbers_of`."""
        return sum(slot.stop - slot.start for layout in self.layouts.values() for slot in layout.numbers)

    @property
    def request(self) -> int:
        """F of the request side, where each field of the history is one more, pooled over the behaviours."""
        return self.count("user") + self.count("history")

    @property
    def all(self) -> int:
        """F of the request side and the candidate."""
        return self.request + self.count("ad")

    @property
    def shared(self) -> list[int]:
        """Which of an ad's fields a behaviour has too, in the behaviour's order: those can be compared."""
        names = self.names("ad")
        return [names.index(name) for name in self.names("history")]

    def require_history(self, what: str) -> None:
        """Let no network be built that needs a history where there is none; `what` says what it does with it.

        Raises:
            ValueError: the schema has no history.
        """
        if not self.count("history"):
            raise ValueError(f"{what}, and this schema has no [history]; train deepfm instead")

    def behaviours_of(self, ads: Part) -> Part:
        """Ads `(..., W)` as the behaviours on them: the columns that a history has too, in its order."""
        ad, history = self.layouts["ad"], self.layouts["history"]
        pairs = ((ads.ids, ad.ids, history.ids), (ads.numbers, ad.numbers, history.numbers))
        return Part(*(block[..., _columns_of(slots, wanted)] for block, slots, wanted in pairs))

    def names(self, part: str) -> list[str]:
        """The fields of a part in the order of their vectors, such as `genre`."""
        return [slot.field.name for slot in (*self.layouts[part].ids, *self.layouts[part].numbers)]


def _columns_of(slots: Sequence[Slot], wanted: Sequence[Slot]) -> list[int]:
    """The columns that the fields of some slots have in others."""
    own = {slot.field.name: slot for slot in slots}
    return [column for slot in wanted for column in range(own[slot.field.name].start, own[slot.field.name].stop)]


def full_name(part: str, slot: Slot) -> str:
    """What a field is called among all: `user.age`, `context.slot`, `ad.genre`, and of a behaviour `history.genre`."""
    return f"history.{slot.field.name}" if part == "history" else slot.field.path


@dataclass(frozen=True)
class MLPSettings:
    """What most networks can be told: the widths and the dropout of an MLP on embeddings. Those with more add to it."""

    embedding: int = 16
    """Width of every value's vector."""
    hidden: tuple[int, ...] = (200, 80)
    """Widths of the MLP's layers."""
    dropout: float = 0.1
    """Share of their activations that a training step leaves out."""


class Explained(NamedTuple):
    """What a network can say of a click's logits, of which fields and pairs of fields add to them, and of how behaviours weigh in them."""

    names: tuple[str, ...] = ()
    """Fields such as `user.age`, and pairs such as `user.age*ad.genre`."""
    addends: Tensor | None = None
    """What each of them adds to the logit `(R, C, K)`; what is left is the bias and all that is no sum by field."""
    attention: Tensor | None = None
    """How much each behaviour weighs for each candidate `(R, C, T)`, 0 where there is padding."""

    @classmethod
    def of(cls, *addends: tuple[Sequence[str], Tensor]) -> "Explained":
        """Of names and what they add `(R, C, ...)`, together; one field has no pairs, and ONNX joins no nothing."""
        return cls(tuple(name for names, _ in addends for name in names), torch.cat([values for names, values in addends if names], dim=-1))


class Network(nn.Module):
    """A CTR network: blocks, and `forward(request) -> {head: logits (R, C)}`. The first line of its docstring is its line in `--help`.

    `forward` is all that it has to have. What is below has a default, for most networks the right one.
    """

    settings: ClassVar[Any]
    """The dataclass of its settings."""
    intercept_at: ClassVar[str] = "bias"
    """Where its `intercept` is."""
    own_heads: ClassVar[tuple[str, ...]] = (CLICK,)
    """What it predicts where no other heads are asked for."""
    many_heads: ClassVar[bool] = False
    """Whether it has all of `fields.heads` itself; others are trained once for each head, on the same embeddings (`heads.py`)."""
    splits: bool = True
    """Whether its tables may be split over processes: Adam alone changes them, and nothing looks at a whole one."""
    int8_pays: ClassVar[bool] = False
    """Whether an int8 graph of it is faster and as good."""
    retrieves: bool = False
    """Whether it has `ad_vectors` and `request_vectors`."""
    settles_after: int = 0
    """Steps before an epoch of it may be chosen: until then `after_step` changes what it is."""
    starts_from: str = ""
    """The network whose bundle its embeddings are meant to begin with, by `--init-from`."""
    embedding_l2: float = 0.01
    """λ of the decay of its embeddings where nobody says otherwise. Products of vectors alone stay at 0 with as much."""
    position_bias: PositionBias | None
    """What a training that keeps places apart gives it, and takes off in the end; `forward` knows nothing of it."""

    def __init__(self, fields: Fields, _settings: Any) -> None:
        """Build it for the fields of a schema.

        Raises:
            ValueError: it cannot be built for these fields or settings; the message says why, and what to do.
        """
        super().__init__()
        self.fields = fields
        self.position_bias = None
        self.heads: tuple[str, ...] = fields.heads if self.many_heads else (CLICK,)

    def forward(self, request: RequestTensors) -> dict[str, Tensor]:
        """Logits `(R, C)` by head."""
        raise NotImplementedError

    @property
    def intercept(self) -> Tensor:
        """What every logit of a click has in it `(1,)`: where the logits are moved when rows are sampled otherwise."""
        bias: Tensor = attrgetter(self.intercept_at)(self)
        return bias

    def ad_vectors(self, _ads: Part) -> Tensor | None:
        """Vectors `(A, K)` of ads `(A, W)` whose inner products with `request_vectors` order them as the logits do, where it has such."""
        return None

    def request_vectors(self, _request: RequestTensors) -> Tensor | None:
        """Vectors `(R, K)` to search for among `ad_vectors`; what the request has for candidates plays no part."""
        return None

    def explained(self, _request: RequestTensors) -> Explained:
        """What there is to say of the click's logits, by the blocks that make them; by default nothing."""
        return Explained()

    def loss(self, outputs: Outputs, _request: RequestTensors, labels: Labels) -> Tensor:
        """What a step lessens, of rows with one candidate: the sum of the heads' cross-entropies."""
        losses = [
            cross_entropy(outputs[head].squeeze(1), labels.heads[head], labels.weight, labels.maturity.get(head)) for head in self.heads
        ]
        return torch.stack(losses).sum() if len(losses) > 1 else losses[0]

    def begin(self, ads: Part) -> None:
        """Called before the first step, with all ads of the data set `(A, W)`."""

    def flatten(self) -> None:
        """Called before the first step where there are few rows: let what overfits them begin without a say."""

    def first_weights(self) -> list[nn.Parameter]:
        """The weights that learn alone, before all others, where there are few rows, and decay less there; none: all learn at once."""
        return []

    def optimisers(self, learning_rate: float) -> list[torch.optim.Optimizer]:
        """What trains the weights, but for `position_bias`."""
        own = [weight for name, weight in self.named_parameters() if not name.startswith("position_bias.")]
        return [torch.optim.Adam(own, lr=learning_rate, fused=True)]

    def after_step(self, steps: int) -> None:
        """Called after each step, with how many there have been."""


def cross_entropy(logits: Tensor, labels: Tensor, weight: Tensor | None = None, maturity: Tensor | None = None) -> Tensor:
    """Mean cross-entropy in nats of `logits (R,)`, over the rows whose `labels (R,)` are known, each by its weight `(R,)`.

    A row of `maturity (R,)` m below 1 is no negative yet: what is seen of it is 1 with probability m σ(logit), so that a 0 costs
    -log(1 - m σ(a)) = log(1 + e^a) - log(1 + (1 - m) e^a), and a 1 as ever -log σ(a), but for log m, which no weight changes
    (Chapelle 2014, https://doi.org/10.1145/2623330.2623634, his likelihood where all rows share one delay).
    """
    known = ~torch.isnan(labels)
    if weight is None and maturity is None and known.is_cpu and bool(known.all()):  # another device would have to be waited for
        return F.binary_cross_entropy_with_logits(logits, labels)
    share = known.to(logits.dtype) if weight is None else torch.where(known, weight, 0.0)
    each = F.binary_cross_entropy_with_logits(logits, labels.nan_to_num(), reduction="none")
    if maturity is not None:
        each = each - (1 - labels.nan_to_num()) * F.softplus(logits + torch.log1p(-maturity))
    return (each * share).sum() / share.sum().clamp(min=1e-12)
