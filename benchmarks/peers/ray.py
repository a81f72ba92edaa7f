"""Ray Serve: replicas of a deployment behind its proxy, on a Ray of this machine.

python -m benchmarks.peers.ray --bundle DIR --rowwise FILE --redis URL --port 8001 --workers 2
"""

import os
import signal
from pathlib import Path

import ray
from ray import serve as ray_serve
from redis.asyncio import Redis
from starlette.requests import Request
from starlette.responses import JSONResponse

from .model import BUNDLE, HOST, REDIS, ROWWISE, command, key_of, loaded


class RayRanker:
    """A replica."""

    def __init__(self) -> None:
        self.model, self.ads = loaded()
        self.redis = Redis.from_url(os.environ[REDIS])

    async def __call__(self, request: Request) -> JSONResponse:
        """A ranking, or whether it is ready."""
        if request.url.path == "/readyz":
            return JSONResponse("ready")
        asked = await request.json()
        user_id = asked["user"]["id"]
        packed = await self.redis.get(key_of(user_id))
        return JSONResponse(self.model.answer(self.ads, user_id, packed, asked["candidates"]))


def serve(port: int, workers: int) -> None:
    """So many replicas."""
    variables = {name: os.environ[name] for name in (BUNDLE, ROWWISE, REDIS, "OMP_NUM_THREADS") if name in os.environ}
    ray.init(num_cpus=workers, include_dashboard=False, runtime_env={"env_vars": {**variables, "PYTHONPATH": str(Path.cwd())}})
    ray_serve.start(http_options={"host": HOST, "port": port})
    options = {"num_cpus": 1, "num_gpus": 0}
    ray_serve.run(ray_serve.deployment(num_replicas=workers, ray_actor_options=options, max_ongoing_requests=100)(RayRanker).bind())
    signal.sigwait([signal.SIGTERM, signal.SIGINT])
    ray_serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    command(serve)()
