"""What the connections of a server may hold together: places, and answers that nobody reads."""

import math
import resource
from collections.abc import Callable
from typing import Any

from uvicorn.server import ServerState

from ..settings import Settings
from .shares import Shares

SPARE_FILES = 96
"""Open files of a process that are no connections."""


class ConnectionState(ServerState):
    """What the connections of a server share. `surplus` of them are to end, each with its next answer."""

    connections: set[Any]

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self.surplus: float = 0
        self.on_closed: Callable[[], None] = lambda: None
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        room = math.inf if files == resource.RLIM_INFINITY else max(16, files - SPARE_FILES)
        self.places = Shares(min(settings.max_connections, room), settings.peer_share)

    def look(self, now: float) -> None:
        """End what has had its time; and of clients that do not read the longest stalled, until what they hold is within its limit."""
        for each in list(self.connections):
            each.look(now)
        stalled = sorted((each for each in self.connections if each.stalled_until < math.inf), key=lambda each: each.stalled_until)
        over = sum(each.unsent for each in stalled) - self.settings.max_unsent_bytes
        for each in stalled:
            if over > 0:
                over -= each.unsent
                each.abort("the answers that clients do not read take too much memory")
