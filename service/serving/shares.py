"""So much of a thing there is, and so much of it one caller may hold."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import OverLimitError


class Shares:
    """Counts what callers hold, by address; `most` in all, of which one may have `share`, though at least `least`."""

    def __init__(self, most: float, share: float, least: float = 1) -> None:
        self.most, self.of_one = most, max(least, most * share)
        self.held = 0
        self._by = Counter[str]()

    def take(self, peer: str | None, amount: int = 1) -> bool:
        """Whether it was to be had; else nothing is taken. None is a Unix socket, whose callers have no address: only `most` counts."""
        if self.held + amount > self.most or (peer is not None and self._by[peer] + amount > self.of_one):
            return False
        self.held += amount
        if peer is not None:
            self._by[peer] += amount
        return True

    @contextmanager
    def holding(self, peer: str | None, refusal: str) -> Iterator[None]:
        """Hold one as long as it lasts.

        Raises:
            OverLimitError: there is none left; `refusal` tells the caller.
        """
        if not self.take(peer):
            raise OverLimitError(refusal)
        try:
            yield
        finally:
            self.give_back(peer)

    def give_back(self, peer: str | None, amount: int = 1) -> None:
        """End holding it."""
        self.held -= amount
        if peer is not None:
            self._by[peer] -= amount
            if not self._by[peer]:
                del self._by[peer]
