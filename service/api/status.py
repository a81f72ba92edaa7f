"""What probes, Prometheus and people ask for: health, metrics, models, schemas and the OpenAPI document."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import fields
from typing import Any

import pydantic_core
from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

from features.schema import Schema

from ..ranking.ranker import Ranker
from ..telemetry.metrics import CONTENT_TYPE, Metrics
from ..telemetry.scrapes import Scrapes

Health = Callable[[], Awaitable[dict[str, Any]]]


def status_routes(ranker: Ranker, metrics: Metrics, health: Health, notice: Callable[[], str | None]) -> APIRouter:
    """What probes, Prometheus and people ask for."""
    router = APIRouter()
    scrapes = Scrapes(metrics.exposition)

    @router.get("/livez")
    async def livez() -> dict[str, str]:
        """Whether the process answers at all."""
        return {"status": "alive"}

    @router.get("/readyz", responses={503: {"description": "Not ready; the body says why"}})
    async def readyz(request: Request) -> Response:
        """Whether to send requests here, and what is wrong if not."""
        report = await health()
        # Degraded is ready: without its store the service still ranks, and if all replicas went unready there would be none.
        unready = report["status"] == "unready"
        request.state.observed.outcome = "not_ready" if unready else "ok"
        return _json(report, 503 if unready else 200)

    @router.get("/metrics", response_class=PlainTextResponse)
    async def exposition() -> Response:
        """The metrics, for Prometheus."""
        ranker.catalogue.observe()
        metrics.flush()
        return Response(await scrapes.text(), headers={"content-type": CONTENT_TYPE})

    @router.get("/v1/models")
    async def models() -> Response:
        """The models that are loaded, those that challenge them, and those that were refused."""
        known = ranker.models
        loaded = [
            {
                **model.facts(),
                "default": name == known.default,
                "provider": model.scorer.provider,
                "precision": model.precision,
                "loaded": model.loaded,
                "challenger": ranker.challenges[name].as_dict() if name in ranker.challenges else None,
            }
            for name, model in sorted(known.loaded.items())
        ]
        return _json({"models": loaded, "default": known.default, "notice": notice(), "refused": known.refused})

    @router.get("/v1/schema")
    async def schema() -> Response:
        """The features that each model takes, by the fingerprint of its schema."""
        schemas: dict[str, dict[str, Any]] = {}
        for name, model in sorted(ranker.models.loaded.items()):
            # `asdict` copies each field, which takes as long as a few rankings.
            parts = {part.name: getattr(model.bundle.schema, part.name) for part in fields(Schema)}
            entry = schemas.setdefault(model.bundle.fingerprint, {"models": [], **parts})
            entry["models"].append(name)
        return _json({"schemas": schemas})

    return router


def _json(document: Mapping[str, Any], status: int = 200) -> Response:
    return Response(pydantic_core.to_json(document), status, media_type="application/json")
