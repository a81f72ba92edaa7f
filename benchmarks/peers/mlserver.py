"""MLServer: a custom runtime with a route of its own, its inference workers in processes behind the one of HTTP.

python -m benchmarks.peers.mlserver --bundle DIR --rowwise FILE --redis URL --port 8001 --workers 2
"""

import asyncio
import os
from tempfile import mkdtemp
from typing import Any

from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.handlers import custom_handler
from redis.asyncio import Redis

from .model import HOST, REDIS, command, key_of, loaded


class MLServerRanker(MLModel):  # type: ignore[misc]
    """A worker."""

    async def load(self) -> bool:
        """Once a worker."""
        self.model, self.ads = loaded()
        self.redis = Redis.from_url(os.environ[REDIS])
        return True

    @custom_handler(rest_path="/rank")  # type: ignore[untyped-decorator]
    async def rank(self, user: dict[str, str], candidates: list[str]) -> dict[str, Any]:
        """A ranking."""
        packed = await self.redis.get(key_of(user["id"]))
        return self.model.answer(self.ads, user["id"], packed, candidates)


def serve(port: int, workers: int) -> None:
    """So many inference workers."""
    settings = Settings(host=HOST, http_port=port, grpc_port=port + 1, parallel_workers=workers, debug=False)
    settings.metrics_port, settings.metrics_dir = port + 2, mkdtemp()
    model = ModelSettings(name="ranker", implementation="benchmarks.peers.mlserver.MLServerRanker")

    async def run() -> None:
        await MLServer(settings).start([model])  # it wants a loop when it is made

    asyncio.run(run())


if __name__ == "__main__":
    command(serve)()
