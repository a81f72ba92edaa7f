"""What a model saw of a request, by field name: the encoded ids and numbers, for a person who wonders about a ranking."""

from collections.abc import Sequence
from typing import Any

from features.encode import Encoder, Feeds
from features.schema import Layout, Slot

Seen = dict[str, Any]


def explain_request(encoder: Encoder, feeds: Feeds, behaviours: int) -> dict[str, Seen]:
    """The user's and the context's fields, and for each field of the history one entry a behaviour, oldest first."""
    layout = encoder.layouts["user"]
    sides = {side: _of_side(layout, side) for side in ("user", "context")}
    seen = {side: _fields(part, feeds, "user", (0,)) for side, part in sides.items()}
    rows = [_fields(encoder.layouts["history"], feeds, "history", (0, t)) for t in range(behaviours)]
    return {**seen, "history": {name: [row[name] for row in rows] for name in encoder.schema.history_fields}}


def explain_ad(encoder: Encoder, feeds: Feeds, candidate: int) -> Seen:
    """The fields of one candidate, by its position among those scored."""
    return _fields(encoder.layouts["ad"], feeds, "ad", (0, candidate))


def _of_side(layout: Layout, side: str) -> Layout:
    def mine(slots: Sequence[Slot]) -> tuple[Slot, ...]:
        return tuple(slot for slot in slots if slot.field.side == side)

    return Layout(mine(layout.ids), mine(layout.numbers))


def _fields(layout: Layout, feeds: Feeds, part: str, at: tuple[int, ...]) -> Seen:
    seen: Seen = {}
    for slot in layout.ids:
        ids = feeds[f"{part}_ids"][at][slot.columns].tolist()
        seen[slot.field.name] = ids if slot.field.kind == "list" else ids[0]
    for slot in layout.numbers:
        numbers = feeds[f"{part}_numbers"][at][slot.columns].tolist()
        seen[slot.field.name] = numbers if slot.field.kind == "vector" else numbers[0]
    return seen
