"""The OpenAPI document: FastAPI's own, with what the routes that are plain ASGI read and write."""

import functools
from collections.abc import Awaitable, Callable
from typing import Any, Literal

import pydantic_core
from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi

from . import errors
from .event_wire import EventBatch, EventsAnswer
from .wire import Problem, RankAnswer, RankRequest, Wire

RANKED = {"/rank": "rank", "/v1/rank": "rank_v1"}
"""The paths that rank, and their names in the document."""
REFERENCE = "#/components/schemas/{model}"
MODELS: tuple[tuple[type[Wire], Literal["validation", "serialization"]], ...] = (
    (RankRequest, "validation"),
    (RankAnswer, "serialization"),
    (EventBatch, "validation"),
    (EventsAnswer, "serialization"),
    (Problem, "validation"),
)
OF_EVENTS = (errors.StoreDownError, errors.BacklogError)
OF_RANKINGS = (errors.UnknownModelError, errors.ScoringError, errors.NotReadyError, errors.DeadlineError)


def _content(kind: str, model: str) -> dict[str, Any]:
    return {"content": {kind: {"schema": {"$ref": REFERENCE.format(model=model)}}}}


def _errors(others: tuple[type[errors.ServiceError], ...]) -> dict[str, dict[str, Any]]:
    """The answers to what can go wrong, but for what only the other routes have; those of one status together."""
    titles: dict[str, list[str]] = {}
    for error, kind in errors.KINDS.items():
        if error not in (*others, errors.CallerLeftError, errors.MetricsGoneError):
            titles.setdefault(str(kind.status), []).append(kind.title)
    return {status: {"description": "; ".join(told), **_content("application/problem+json", "Problem")} for status, told in titles.items()}


BEARER = {
    "type": "http",
    "scheme": "bearer",
    "description": "Where the service has tokens (ADRANK_TOKENS): 401 without one, 403 with one that lacks the scope rank, events or read.",
}
RANK_OPERATION = {
    "summary": "Rank",
    "description": "Rank ads for a user, the likeliest click first.",
    "requestBody": {"required": True, **_content("application/json", "RankRequest")},
    "responses": {"200": {"description": "Successful Response", **_content("application/json", "RankAnswer")}, **_errors(OF_EVENTS)},
}
EVENTS_OPERATION = {
    "operationId": "events",
    "summary": "Events",
    "description": "Take impressions, clicks, conversions and news of users and ads, each once by its id, and say what became of each.",
    "requestBody": {"required": True, **_content("application/json", "EventBatch")},
    "responses": {"202": {"description": "What became of each", **_content("application/json", "EventsAnswer")}, **_errors(OF_RANKINGS)},
}


def describe(app: FastAPI) -> Callable[[], dict[str, Any]]:
    """What makes the document."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(
                title=app.title, version=app.version, description=app.description, routes=app.routes, servers=app.servers
            )
            operations = {path: {"post": {**RANK_OPERATION, "operationId": name}} for path, name in RANKED.items()}
            document["paths"] = {**operations, "/v1/events": {"post": EVENTS_OPERATION}, **document["paths"]}
            document.setdefault("components", {})["securitySchemes"] = {"bearer": BEARER}
            document["security"] = [{"bearer": []}, {}]  # the latter where the service has no tokens
            components = document["components"].setdefault("schemas", {})
            for model, mode in MODELS:
                described = model.model_json_schema(ref_template=REFERENCE, mode=mode)
                components.update(described.pop("$defs", {}))
                components[model.__name__] = described
            app.openapi_schema = document
        return app.openapi_schema

    return openapi


def openapi_page(app: FastAPI) -> Callable[[Request], Awaitable[Response]]:
    """The route of the document, rendered once."""
    rendered = functools.cache(lambda: pydantic_core.to_json(app.openapi()))

    async def page(_request: Request) -> Response:
        return Response(rendered(), media_type="application/json")

    return page
