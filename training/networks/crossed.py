"""Crosses of two fields: a weight for each pair of their values that occurs together, hashed into one table."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from features.schema import Slot
from features.vocabulary import PADDING, UNKNOWN

from .contract import Fields, Part, RequestTensors, full_name
from .lookup import EmbeddingTable

PRIME = 2**31 - 1
"""Numbers below it multiply without overflow in int64, so that torch and ONNX Runtime hash alike."""
FACTORS = (1_000_003, 69_069, 1_566_083_941)
"""Of the two values and of the cross."""


class Side(NamedTuple):
    """One field of a cross: the part that it is of, and its columns there."""

    part: str
    slot: Slot


def parse_crosses(text: str, fields: Fields) -> list[tuple[Side, Side]]:
    """The crosses in a text such as `user_id*ad_id,history.genre*genre`; `history.` means the behaviours' field.

    Raises:
        ValueError: a cross is no pair, or has a field that is not there or is a number; the message says which there are.
    """
    crosses = []
    for cross in filter(None, (piece.strip() for piece in text.split(","))):
        names = [name.strip() for name in cross.split("*")]
        if len(names) != 2:
            raise ValueError(f"crosses: {cross!r} is not a pair of fields such as user_id*ad_id")
        first, second = (_side(cross, name, fields) for name in names)
        if (first, second) in crosses:
            raise ValueError(f"crosses: {cross!r} is there twice; leave one out")
        crosses.append((first, second))
    return crosses


def _side(cross: str, name: str, fields: Fields) -> Side:
    known: dict[str, list[Side]] = {}
    for part, layout in fields.layouts.items():
        for slot in layout.ids:
            path = full_name(part, slot)
            for alias in (path,) if part == "history" else (path, slot.field.name):
                known.setdefault(alias, []).append(Side(part, slot))
    found = known.get(name, [])
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"crosses: {name} in {cross!r} may be {' or '.join(side.slot.field.path for side in found)}; write it so")
    paths = ", ".join(sorted(name for name in known if "." in name)) or "none"
    raise ValueError(f"crosses: there is no field {name!r} of categories to cross in {cross!r}; there are {paths}")


class Crosses(nn.Module):
    """The weights of all crosses, in one table: a pair's row is a hash of the two ids and of the cross.

    Where a field has several values, and for each behaviour, the mean over the pairs. A pair with padding or an unknown value has no
    weight: row 0, which is zero and stays so.
    """

    def __init__(self, crosses: list[tuple[Side, Side]], size: int) -> None:
        super().__init__()
        self.crosses, self.size = crosses, size
        self.table = EmbeddingTable(1 + size, 1)
        nn.init.zeros_(self.table.weight)

    def rows(self, number: int, first: Tensor, second: Tensor) -> Tensor:
        """Rows of the table for ids of a cross, by its number: of `first (...)` with `second (...)`, which broadcast."""
        by_first = (first % PRIME) * FACTORS[0] % PRIME
        mixed = (by_first + second % PRIME) % PRIME * FACTORS[1] % PRIME
        mixed = (mixed + number + 1) * FACTORS[2] % PRIME
        return torch.where((first > UNKNOWN) & (second > UNKNOWN), mixed % self.size + 1, PADDING)

    def forward(self, request: RequestTensors) -> Tensor:
        """The sum of the crosses' weights `(R, 1 or C)`."""
        return sum(self.each(request), request.ad.numbers.new_zeros((1, 1)))

    def explained(self, request: RequestTensors) -> tuple[Sequence[str], Tensor]:
        """The addends, by cross `(R, C, K)`."""
        names = ["*".join(full_name(*side) for side in cross) for cross in self.crosses]
        count = request.ad.numbers.shape[1]
        return names, torch.stack([weights.expand(-1, count) for weights in self.each(request)], dim=-1)

    def each(self, request: RequestTensors) -> list[Tensor]:
        """Each cross's weights `(R, 1 or C)`."""
        parts, found = request.parts(), []
        for number, (one, other) in enumerate(self.crosses):
            first, second = (_values(parts[side.part], side) for side in (one, other))  # (R, 1 or C, W)
            rows = self.rows(number, first.unsqueeze(3), second.unsqueeze(2)).flatten(2)
            present = (rows > PADDING).sum(2).clamp(min=1)
            found.append(self.table(rows).sum((2, 3)) / present)
        return found


def _values(part: Part, side: Side) -> Tensor:
    """The ids of a field `(R, 1 or C, W)`, W being all behaviours' values in a history."""
    ids = part.ids[..., side.slot.columns]
    if side.part == "ad":
        return ids
    if side.part == "history":
        ids = ids if part.rows is None else ids[part.rows]
        ids = torch.where(part.behaviours().unsqueeze(-1), ids, PADDING).flatten(1)
    return ids.unsqueeze(1)
