"""The OpenAPI document: FastAPI's own, and what it cannot see of routes that read a raw request."""

import functools
from collections.abc import Awaitable, Callable
from typing import Any, Literal

import pydantic_core
from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi

from .. import errors
from .event_wire import EventBatch, EventsAnswer
from .examples import EXAMPLES
from .wire import Problem, RankAnswer, RankRequest, Wire

RANKED = {"/rank": "rank", "/v1/rank": "rank_v1"}
"""The paths that rank, and their names in the document."""
EVENTS = "/v1/events"
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
BEARER = {
    "type": "http",
    "scheme": "bearer",
    "description": "Where the service has tokens (ADRANK_TOKENS): 401 without one, 403 with one that lacks the scope rank, events or read.",
}


def content(kind: str, model: str) -> dict[str, Any]:
    """A body of a media type, described by one of `MODELS`."""
    return {"content": {kind: {"schema": {"$ref": REFERENCE.format(model=model)}}}}


def reads(model: str) -> dict[str, Any]:
    """What a route reads, for its `openapi_extra`."""
    return {"requestBody": {"required": True, **content("application/json", model)}}


def errors_of(others: tuple[type[errors.ServiceError], ...]) -> dict[int | str, dict[str, Any]]:
    """The answers to what can go wrong, but for what only the other routes have; those of one status together."""
    titles: dict[int | str, list[str]] = {}
    for error, kind in errors.KINDS.items():
        if error not in (*others, errors.CallerLeftError, errors.MetricsGoneError):
            titles.setdefault(str(kind.status), []).append(kind.title)
    return {
        status: {"description": "; ".join(meanings), **content("application/problem+json", "Problem")}
        for status, meanings in titles.items()
    }


def describe(app: FastAPI) -> Callable[[], dict[str, Any]]:
    """What makes the document."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(
                title=app.title, version=app.version, description=app.description, routes=app.routes, servers=app.servers
            )
            components = document.setdefault("components", {})
            components["securitySchemes"] = {"bearer": BEARER}
            document["security"] = [{"bearer": []}, {}]  # the latter where the service has no tokens
            for model, mode in MODELS:
                described = model.model_json_schema(ref_template=REFERENCE, mode=mode)
                components.setdefault("schemas", {}).update({**described.pop("$defs", {}), model.__name__: described})
            for path, (body, answer) in EXAMPLES.items():
                for operation in document["paths"][path].values():
                    operation["summary"] = operation.pop("description")
                    if body is not None:
                        operation["requestBody"]["content"]["application/json"]["example"] = body
                    good = next(each for status, each in operation["responses"].items() if status.startswith("2"))
                    next(iter(good["content"].values()))["example"] = answer
            app.openapi_schema = document
        return app.openapi_schema

    return openapi


def openapi_page(app: FastAPI) -> Callable[[Request], Awaitable[Response]]:
    """The route of the document, rendered once."""
    rendered = functools.cache(lambda: pydantic_core.to_json(app.openapi()))

    async def page(_request: Request) -> Response:
        return Response(rendered(), media_type="application/json")

    return page
