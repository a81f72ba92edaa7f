"""HTTP: routes, the limits on a body, and errors as problem+json. Knows nothing about how a ranking is made."""

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

import pydantic_core
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import errors
from .errors import Kind, Mistake, ServiceError
from .metrics import CONTENT_TYPE, Metrics, Stages
from .ranker import Query, Ranker
from .requests import locate, parse_request, sent_request_id, to_query
from .settings import Settings
from .wire import Problem, RankAnswer, RankRequest, answer

REFERENCE = "#/components/schemas/{model}"
ROUTES = frozenset({"/rank", "/v1/rank", "/livez", "/readyz", "/metrics", "/v1/models", "/v1/schema", "/docs", "/openapi.json"})


def _content(kind: str, model: str) -> dict[str, Any]:
    return {"content": {kind: {"schema": {"$ref": REFERENCE.format(model=model)}}}}


RANK_ERRORS: dict[int | str, dict[str, Any]] = {
    kind.status: {"description": kind.title, **_content("application/problem+json", "Problem")}
    for error, kind in errors.KINDS.items()
    if error is not errors.CallerLeftError
}
RANK_BODY = {"requestBody": {"required": True, **_content("application/json", "RankRequest")}}

log = logging.getLogger(__name__)
Health = Callable[[], Awaitable[dict[str, Any]]]


def rank_routes(ranker: Ranker, metrics: Metrics, settings: Settings) -> APIRouter:
    """`POST /rank` and `/v1/rank`."""
    router = APIRouter()
    places = asyncio.Semaphore(settings.max_inflight)

    @router.post("/rank", responses={200: {"model": RankAnswer}, **RANK_ERRORS}, openapi_extra=RANK_BODY, operation_id="rank")
    @router.post("/v1/rank", responses={200: {"model": RankAnswer}, **RANK_ERRORS}, openapi_extra=RANK_BODY, operation_id="rank_v1")
    async def rank(request: Request) -> Response:
        """Rank ads for a user, the likeliest click first."""
        if places.locked():
            raise errors.OverLimitError(f"{settings.max_inflight} requests are being ranked already; try again")
        async with places:
            with metrics.ranking() as stages:
                return Response(await _rank(request, stages), media_type="application/json")

    async def _rank(request: Request, stages: Stages) -> bytes:
        body = await read_body(request, settings.max_body_bytes, settings.body_timeout_ms / 1000)
        with stages.stage("parse"):
            wire, query = _read(request, body, settings.max_candidates)
        request.state.observed.model = ranker.models.label(query.model)
        try:
            ranking = await ranker.rank(query, stages)
        except errors.InvalidError as error:
            raise errors.InvalidError(error.detail, [locate(wire, mistake) for mistake in error.mistakes]) from None
        with stages.stage("post"):
            return answer(request.state.request_id, ranking, stages)

    return router


def _read(request: Request, body: bytes, most: int) -> tuple[RankRequest, Query]:
    """The request, its id noted for the answer even if the rest of it is wrong."""
    try:
        wire = parse_request(body)
        request.state.request_id = wire.request_id or request.state.request_id
        return wire, to_query(wire, most)
    except errors.InvalidError:
        request.state.request_id = sent_request_id(body) or request.state.request_id
        raise


async def read_body(request: Request, limit: int, seconds: float) -> bytes:
    """The body, of at most `limit` bytes however it is sent, arriving within `seconds`.

    Raises:
        ServiceError: it is not JSON by its type, too large, too slow, or its sender left.
    """
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise errors.NotJsonTypeError("send the header Content-Type: application/json")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise errors.NotJsonTypeError("send the body as it is, without a Content-Encoding")
    declared = request.headers.get("content-length", "0")
    too_large = errors.TooLargeError(f"the body is over the limit of {limit} bytes")
    if declared.isdecimal() and int(declared) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        raise errors.SlowBodyError(f"the body did not arrive within {seconds:g} s") from None
    except ClientDisconnect:
        raise errors.CallerLeftError("the caller left before the body was whole") from None
    return bytes(body)


def state_routes(ranker: Ranker, metrics: Metrics, health: Health) -> APIRouter:
    """What probes, Prometheus and people ask for."""
    router = APIRouter()

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

    @router.get("/metrics", responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})
    async def exposition() -> Response:
        """The metrics, for Prometheus."""
        ranker.catalogue.observe()
        return Response(await asyncio.to_thread(metrics.exposition), headers={"content-type": CONTENT_TYPE})

    @router.get("/v1/models")
    async def models() -> Response:
        """The models that are loaded, and those that were refused."""
        known = ranker.models
        loaded = [
            {**model.facts(), "default": name == known.default, "provider": model.scorer.provider, "loaded": model.loaded}
            for name, model in sorted(known.loaded.items())
        ]
        return _json({"models": loaded, "refused": known.refused})

    @router.get("/v1/schema")
    async def schema() -> Response:
        """The features that each model takes, by the fingerprint of its schema."""
        schemas: dict[str, dict[str, Any]] = {}
        for name, model in sorted(ranker.models.loaded.items()):
            entry = schemas.setdefault(model.bundle.fingerprint, {"models": [], **asdict(model.bundle.schema)})
            entry["models"].append(name)
        return _json({"schemas": schemas})

    return router


def _json(document: Mapping[str, Any], status: int = 200) -> Response:
    return Response(pydantic_core.to_json(document), status, media_type="application/json")


def problem(scope: Scope, kind: Kind, detail: str, mistakes: Sequence[Mistake] = (), headers: Mapping[str, str] | None = None) -> Response:
    """An error as problem+json; notes its code as the outcome of the request."""
    scope["state"]["observed"].outcome = kind.code
    document = {
        "type": f"urn:adrank:problem:{kind.code}",
        "title": kind.title,
        "status": kind.status,
        "detail": detail,
        "code": kind.code,
        "request_id": scope["state"]["request_id"],
        "errors": [{"pointer": mistake.pointer, "detail": mistake.detail} for mistake in mistakes],
    }
    wait = {} if kind.retry_after is None else {"retry-after": str(kind.retry_after)}
    body = pydantic_core.to_json(document)
    return Response(body, kind.status, {**(headers or {}), **wait}, media_type="application/problem+json")


class Edge:
    """The process's edge: every request gets an id, is counted and timed, and whatever goes wrong inside becomes a problem."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["request_id"] = uuid.uuid4().hex
        with self._metrics.request(scope["path"] if scope["path"] in ROUTES else "other") as state["observed"]:
            async with _whatever_happens(scope, receive, send) as noting:
                await self._app(scope, receive, noting)
            state["observed"].finish()


@asynccontextmanager
async def _whatever_happens(scope: Scope, receive: Receive, send: Send) -> AsyncIterator[Send]:
    """A `send` that adds the request's id; what nobody foresaw is logged, and answered if no answer has begun."""
    begun = False

    async def noting(message: Message) -> None:
        nonlocal begun
        if message["type"] == "http.response.start":
            begun = True
            message["headers"] = [*message["headers"], (b"x-request-id", scope["state"]["request_id"].encode())]
        await send(message)

    try:
        yield noting
    except Exception:
        log.exception("request %s failed in a way nobody foresaw", scope["state"]["request_id"])
        response = problem(scope, errors.UNEXPECTED, "the service made a mistake; its log has it under this request_id")
        if begun:
            raise
        await response(scope, receive, noting)


def add_error_handlers(app: FastAPI, metrics: Metrics) -> None:
    """Errors of the service and of routing, as problems."""

    async def told(request: Request, error: Exception) -> Response:
        if isinstance(error, ServiceError):
            kind = errors.KINDS[type(error)]
            if kind.retry_after is not None:
                metrics.shed(kind.code)
            return problem(request.scope, kind, error.detail, error.mistakes)
        raise error

    async def routing(request: Request, error: Exception) -> Response:
        if not isinstance(error, HTTPException):
            raise error
        kind = errors.WRONG_METHOD if error.status_code == 405 else errors.NOT_FOUND
        return problem(request.scope, kind, "see /docs for what there is", headers=error.headers)

    app.add_exception_handler(ServiceError, told)
    app.add_exception_handler(HTTPException, routing)


def describe(app: FastAPI) -> Callable[[], dict[str, Any]]:
    """What makes the OpenAPI document: FastAPI's own, with the types that the routes read and write by hand."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            components = document.setdefault("components", {}).setdefault("schemas", {})
            for model in (RankRequest, Problem):
                described = model.model_json_schema(ref_template=REFERENCE)
                components.update(described.pop("$defs", {}))
                components[model.__name__] = described
            app.openapi_schema = document
        return app.openapi_schema

    return openapi
