"""What takes long to make, for any number who ask: one at a time, and a pause after it, so that rankings go on. `/metrics`, for one."""

import asyncio
from collections.abc import Callable

PAUSE = 4.0
"""Of what making one took: expositions take a fifth of the time at most, however often they are asked for."""


class Scrapes:
    """Makes expositions; all who ask before one is begun get that one."""

    def __init__(self, make: Callable[[], bytes]) -> None:
        self._make = make
        self._lock = asyncio.Lock()
        self._next: asyncio.Task[bytes] | None = None
        self._free = 0.0

    async def text(self) -> bytes:
        """An exposition that was begun after this was called."""
        if self._next is None:
            self._next = asyncio.create_task(self._begin())
        return await asyncio.shield(self._next)

    async def _begin(self) -> bytes:
        loop = asyncio.get_running_loop()
        async with self._lock:
            await asyncio.sleep(self._free - loop.time())
            self._next, begun = None, loop.time()
            try:
                return await asyncio.to_thread(self._make)
            finally:
                self._free = loop.time() + PAUSE * (loop.time() - begun)
