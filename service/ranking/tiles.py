"""Requests of any size as runs of a few fixed shapes, for a device that is fast only on shapes that it knows.

A request of C candidates becomes tiles: rows of `TILE` candidates that share its user side. The tiles of several requests stand
above each other; candidates, behaviours and whole tiles that are missing are zeros, which change no other score.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from features.encode import Feeds
from features.schema import AGES
from features.vocabulary import Numbers

TILE = 64
MOST = 128
"""Tiles of a run: 8,192 candidates. DIN's attention keeps about 260 MB of them, each with 100 behaviours and 80 units."""


class Shape(NamedTuple):
    """Of a run: its tiles, a power of two, and the behaviours of each."""

    tiles: int
    behaviours: int


class Piece(NamedTuple):
    """Tiles of one request that stand together in a run: `tiles` of them, from the request's `first` on."""

    request: int
    first: int
    tiles: int


def candidates_of(feeds: Feeds) -> int:
    """Candidates of a request."""
    return int(next(tensor.shape[1] for name, tensor in feeds.items() if name.startswith("ad_")))


def tiles_of(feeds: Feeds) -> int:
    """Tiles that a request takes."""
    return -(-candidates_of(feeds) // TILE)


def lengths(history_length: int) -> tuple[int, ...]:
    """Behaviours of the shapes for a history of that length: a quarter, half or all of it."""
    return tuple(sorted({max(1, -(-history_length // part)) for part in (4, 2, 1)}))


def shapes(history_length: int) -> list[Shape]:
    """All shapes of a model, the largest first: what is allocated for it also does for the others."""
    tiles = [1 << power for power in range(MOST.bit_length())]
    return [Shape(count, behaviours) for behaviours in reversed(lengths(history_length)) for count in reversed(tiles)]


def runs(requests: Sequence[Feeds]) -> Iterator[list[Piece]]:
    """The requests' tiles in order, at most `MOST` in a run."""
    run: list[Piece] = []
    room = MOST
    for request, feeds in enumerate(requests):
        first, left = 0, tiles_of(feeds)
        while left:
            count = min(left, room)
            run.append(Piece(request, first, count))
            first, left, room = first + count, left - count, room - count
            if not room:
                yield run
                run, room = [], MOST
    if run:
        yield run


def shape_of(run: Sequence[Piece], requests: Sequence[Feeds], history_length: int) -> Shape:
    """The smallest shape that the run fits into."""
    behaved = max((_behaviours(requests[piece.request]) for piece in run), default=1)
    tiles = 1 << (sum(piece.tiles for piece in run) - 1).bit_length()
    return Shape(tiles, next(length for length in lengths(max(history_length, behaved)) if length >= behaved))


def _behaviours(feeds: Feeds) -> int:
    return int(next((tensor.shape[1] for name, tensor in feeds.items() if name.startswith("history_")), 1))


def fill(buffers: Mapping[str, np.ndarray[Any, Any]], run: Sequence[Piece], requests: Sequence[Feeds]) -> None:
    """Write a run into its tensors: `user_* (tiles, W)`, `history_* (tiles, behaviours, W)`, `ad_* (tiles, TILE, W)`.

    Raises:
        KeyError: a request has no tensor of that name.
        TypeError, ValueError: it has one of another type or width.
    """
    for name, buffer in buffers.items():
        row = 0
        for piece in run:
            tensor, rows = requests[piece.request][name][0], buffer[row : row + piece.tiles]
            if name != AGES and tensor.shape[-1] != buffer.shape[-1]:
                raise ValueError(f"{name} is {tensor.shape[-1]} wide, expected {buffer.shape[-1]}")
            if name.startswith("ad_"):
                some = tensor[piece.first * TILE : (piece.first + piece.tiles) * TILE]
                flat = rows.reshape(-1, buffer.shape[2])
                np.copyto(flat[: len(some)], some, casting="no")
                flat[len(some) :] = 0
            elif name.startswith("history_"):
                np.copyto(rows[:, : len(tensor)], tensor, casting="no")
                rows[:, len(tensor) :] = 0
            else:
                np.copyto(rows, tensor, casting="no")
            row += piece.tiles
        buffer[row:] = 0


def take_apart(scores: Numbers, run: Sequence[Piece], into: Sequence[Numbers]) -> None:
    """Write the scores `(tiles, TILE)` of a run to those `(C,)` of its requests; both may have a last axis, of heads."""
    row = 0
    for piece in run:
        flat = scores[row : row + piece.tiles].reshape(-1, *scores.shape[2:])
        wanted = into[piece.request][piece.first * TILE : (piece.first + piece.tiles) * TILE]
        wanted[:] = flat[: len(wanted)]
        row += piece.tiles
