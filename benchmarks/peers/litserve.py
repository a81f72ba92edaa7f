"""LitServe: HTTP in processes of its own, which hand requests to the workers that have the model.

python -m benchmarks.peers.litserve --bundle DIR --rowwise FILE --redis URL --port 8001 --workers 2
"""

import os
from typing import Any

import litserve
from redis import Redis

from .model import HOST, REDIS, command, key_of, loaded


class PeerApi(litserve.LitAPI):  # type: ignore[misc]
    """A worker."""

    def setup(self, device: str) -> None:  # noqa: ARG002  # as LitServe calls it
        """Once a worker."""
        self.model, self.ads = loaded()
        self.redis = Redis.from_url(os.environ[REDIS])

    def predict(self, request: dict[str, Any]) -> dict[str, Any]:
        """A ranking."""
        user_id = request["user"]["id"]
        return self.model.answer(self.ads, user_id, self.redis.get(key_of(user_id)), request["candidates"])


def serve(port: int, workers: int) -> None:
    """So many workers, and as many processes of HTTP."""
    server = litserve.LitServer(
        PeerApi(api_path="/rank"), accelerator="cpu", devices=1, workers_per_device=workers, healthcheck_path="/readyz", fast_queue=True
    )
    server.run(HOST, port, num_api_servers=workers, generate_client_file=False, log_level="warning", access_log=False)


if __name__ == "__main__":
    command(serve)()
