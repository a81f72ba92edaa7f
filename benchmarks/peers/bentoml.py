"""BentoML: a service class, its workers started by the arbiter of `bentoml serve`.

python -m benchmarks.peers.bentoml --bundle DIR --rowwise FILE --redis URL --port 8001 --workers 2
"""

import os
import sys
from typing import Any

import bentoml
from redis.asyncio import Redis

from .model import HOST, REDIS, command, key_of, loaded

WORKERS = "PEER_WORKERS"


@bentoml.service(workers=int(os.environ.get(WORKERS, "1")), metrics={"enabled": False}, logging={"access": {"enabled": False}})
class BentoRanker:
    """A worker."""

    def __init__(self) -> None:
        self.model, self.ads = loaded()
        self.redis = Redis.from_url(os.environ[REDIS])

    @bentoml.api(route="/rank")  # type: ignore[untyped-decorator]
    async def rank(self, user: dict[str, str], candidates: list[str]) -> dict[str, Any]:
        """A ranking."""
        packed = await self.redis.get(key_of(user["id"]))
        return self.model.answer(self.ads, user["id"], packed, candidates)


def serve(port: int, workers: int) -> None:
    """So many workers."""
    os.environ |= {WORKERS: str(workers), "BENTOML_DO_NOT_TRACK": "True"}
    words = ["-m", "bentoml", "serve", "benchmarks.peers.bentoml:BentoRanker", "--host", HOST, "--port", str(port)]
    os.execv(sys.executable, [sys.executable, *words])


if __name__ == "__main__":
    command(serve)()
