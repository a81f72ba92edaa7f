"""FastAPI, pydantic and redis-py, run by uvicorn with uvloop and httptools.

python -m benchmarks.peers.fastapi --bundle DIR --rowwise FILE --redis URL --port 8001 --workers 2
"""

import gc
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel, Field
from redis.asyncio import Redis

from .model import REDIS, command, key_of, loaded


class PeerUser(BaseModel):
    """Who is asking."""

    id: str


class PeerRequest(BaseModel):
    """A user and the ads to rank."""

    user: PeerUser
    candidates: list[str] = Field(min_length=1)


class PeerAd(BaseModel):
    """An ad and its probability of a click."""

    ad_id: str
    rank: int
    p_click: float


class PeerAnswer(BaseModel):
    """The ads, best first."""

    request_id: str
    model: str
    ads: list[PeerAd]


def create() -> FastAPI:
    """The application, as the environment configures it."""
    (model, ads), redis = loaded(), Redis.from_url(os.environ[REDIS])

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        gc.collect()
        gc.freeze()
        yield
        await redis.aclose()

    app = FastAPI(lifespan=lifespan)

    @app.get("/readyz")
    async def ready() -> dict[str, str]:
        return {"status": "ready"}

    @app.post("/rank", response_model=PeerAnswer)
    async def rank(request: PeerRequest) -> PeerAnswer:
        packed = await redis.get(key_of(request.user.id))
        found = model.answer(ads, request.user.id, packed, request.candidates)
        return PeerAnswer(**{**found, "ads": [PeerAd(**ad) for ad in found["ads"]]})

    return app


def serve(port: int, workers: int) -> None:
    """So many processes of it."""
    uvicorn.run(f"{__spec__.name}:create", factory=True, port=port, workers=workers, loop="uvloop", http="httptools", access_log=False)


if __name__ == "__main__":
    command(serve)()
