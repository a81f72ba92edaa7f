"""HTTP: routes, and the limits on a body. Knows nothing about how a ranking is made."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pydantic_core
from fastapi import APIRouter, FastAPI, Request, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from . import errors
from .edge import EVENTS, Edge, problem
from .errors import ServiceError
from .event_wire import events_answer, read_batch
from .events import Intake
from .explore import Policy
from .metrics import CONTENT_TYPE, Metrics, Stages
from .openapi import RANKED
from .ranker import Made, Query, Ranker
from .requests import as_sent, default_policy, locate, parse_request, sent_request_id, to_query
from .served import ServedLog
from .settings import Settings
from .tokens import Guard
from .wire import RankRequest, answer

if TYPE_CHECKING:
    from .traces import Tracer

DOCS = Path(__file__).with_name("docs.html")

Health = Callable[[], Awaitable[dict[str, Any]]]


class RankEndpoint:
    """`POST /rank` and `/v1/rank`, as plain ASGI: a framework's way from a request to an answer costs more than the ranking."""

    def __init__(self, ranker: Ranker, served: ServedLog, metrics: Metrics, settings: Settings) -> None:
        self._ranker, self._served, self._metrics, self._settings = ranker, served, metrics, settings
        self._policy = default_policy(settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Rank ads for a user, the likeliest click first."""
        made: list[Made] = []
        try:
            body = await self._answer(scope, receive, made.append)
        except ServiceError as error:
            kind = errors.KINDS[type(error)]
            if kind.retry_after is not None:
                self._metrics.shed(kind.code)
            await problem(scope, kind, error.detail, error.mistakes)(scope, receive, send)
            return
        if has_left(receive):
            self._served.left()
            made.clear()
        headers = [(b"content-length", b"%d" % len(body)), (b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})
        for ranked in made[-1:]:
            self._served.put(ranked)

    async def _answer(self, scope: Scope, receive: Receive, on_ranked: Callable[[Made], None]) -> bytes:
        settings, metrics = self._settings, self._metrics
        if metrics.under_way >= settings.max_inflight:
            raise errors.OverLimitError(f"{settings.max_inflight} requests are being ranked already; try again")
        metrics.under_way += 1
        try:
            body = await read_body(scope, receive, settings.max_body_bytes, settings.body_timeout_ms / 1000)
            return await self._rank(scope["state"], body, on_ranked)
        finally:
            metrics.under_way -= 1

    async def _rank(self, state: dict[str, Any], body: bytes, on_ranked: Callable[[Made], None]) -> bytes:
        stages: Stages = state["observed"]
        stages.enter("parse")
        wire, query = _read(state, body, self._settings.max_candidates, self._policy)
        stages.model = self._ranker.models.label(query.model)
        try:
            ranking = await self._ranker.rank(query, stages, on_ranked)
        except errors.InvalidError as error:
            raise errors.InvalidError(error.detail, [locate(wire, mistake) for mistake in error.mistakes]) from None
        return answer(state["request_id"], as_sent(ranking, query), stages)


def _read(state: dict[str, Any], body: bytes, most: int, default: Policy | None) -> tuple[RankRequest, Query]:
    """The request, its id noted for the answer even if the rest of it is wrong."""
    try:
        wire = parse_request(body)
        state["request_id"] = wire.request_id or state["request_id"]
        query = to_query(wire, most, default)
        query.request_id = state["request_id"]
        return wire, query
    except errors.InvalidError:
        state["request_id"] = sent_request_id(body) or state["request_id"]
        raise


class EventsEndpoint:
    """`POST /v1/events`, as plain ASGI."""

    def __init__(self, intake: Intake, settings: Settings) -> None:
        self._intake, self._settings, self._under_way = intake, settings, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Take a batch of events, and say what became of each."""
        try:
            response = Response(await self._answer(scope, receive), 202, media_type="application/json")
        except ServiceError as error:
            response = problem(scope, errors.KINDS[type(error)], error.detail, error.mistakes)
        await response(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive) -> bytes:
        settings = self._settings
        if self._under_way >= settings.max_event_batches:
            raise errors.OverLimitError(f"{settings.max_event_batches} batches of events are being taken already; try again")
        self._under_way += 1
        try:
            body = await read_body(scope, receive, settings.max_body_bytes, settings.body_timeout_ms / 1000)
            sent = await read_batch(body, settings.max_events)
            return events_answer(scope["state"]["request_id"], sent, await self._intake.take(sent))
        finally:
            self._under_way -= 1


def has_left(receive: Receive) -> bool:
    """Whether the caller of a request whose body has been read has closed its connection. Waits for nothing.

    ASGI tells only those who wait for the next message: one step of that says whether it is there already.
    """
    waiting = receive()
    try:
        waiting.send(None)  # type: ignore[attr-defined]  # a coroutine, as every server makes it
    except StopIteration as came:
        return bool(came.value["type"] == "http.disconnect")
    waiting.close()  # type: ignore[attr-defined]
    return False


async def read_body(scope: Scope, receive: Receive, limit: int, seconds: float) -> bytes:
    """The body, of at most `limit` bytes however it is sent, arriving within `seconds`.

    Raises:
        ServiceError: it is not JSON by its type, too large, too slow, or its sender left.
    """
    headers = dict(scope["headers"])
    kind = headers.get(b"content-type", b"application/json").partition(b";")[0].strip().lower()
    if kind != b"application/json" and not (kind.startswith(b"application/") and kind.endswith(b"+json")):
        raise errors.NotJsonTypeError("send the header Content-Type: application/json")
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise errors.NotJsonTypeError("send the body as it is, without a Content-Encoding")
    declared = headers.get(b"content-length", b"0")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(limit)
    try:
        async with asyncio.timeout(seconds):
            return await _whole(receive, limit)
    except TimeoutError:
        raise errors.SlowBodyError(f"the body did not arrive within {seconds:g} s") from None


async def _whole(receive: Receive, limit: int) -> bytes:
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise errors.CallerLeftError("the caller left before the body was whole")
        parts.append(message.get("body", b""))
        size, more = size + len(parts[-1]), message.get("more_body", False)
        if size > limit:
            raise _too_large(limit)
    return b"".join(parts)


def _too_large(limit: int) -> errors.TooLargeError:
    return errors.TooLargeError(f"the body is over the limit of {limit} bytes")


def state_routes(ranker: Ranker, metrics: Metrics, health: Health, notice: Callable[[], str | None]) -> APIRouter:
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
    async def exposition(request: Request) -> Response:
        """The metrics, for Prometheus."""
        ranker.catalogue.observe()
        metrics.flush()
        try:
            return Response(await asyncio.to_thread(metrics.exposition), headers={"content-type": CONTENT_TYPE})
        except errors.MetricsGoneError as error:  # not an empty answer with 200, which nothing but an alert on absence would notice
            return problem(request.scope, errors.KINDS[type(error)], error.detail)

    @router.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        """The OpenAPI document for people. Our own page: FastAPI's loads Swagger UI from the internet and is blank without it."""
        return Response(DOCS.read_bytes(), media_type="text/html")

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
                "challenger": ranker.challenges[name].told() if name in ranker.challenges else None,
            }
            for name, model in sorted(known.loaded.items())
        ]
        return _json({"models": loaded, "default": known.default, "notice": notice(), "refused": known.refused})

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


class Application(FastAPI):
    """FastAPI for all but rankings: it and its own middleware stand before any that is added, and take time of every request."""

    rank: ASGIApp

    def take(self, endpoint: RankEndpoint, metrics: Metrics, tracer: "Tracer | None" = None, guard: Guard | None = None) -> None:
        """Rank with the endpoint. Its routes are there for who asks with another method than POST."""
        self.rank = Edge(endpoint, metrics, tracer, guard)
        self.add_middleware(Edge, metrics=metrics, tracer=tracer, guard=guard)
        self.router.routes += [Route(path, endpoint, methods=["POST"], include_in_schema=False) for path in RANKED]

    def take_events(self, endpoint: EventsEndpoint) -> None:
        """Take events with the endpoint."""
        self.router.routes.append(Route(EVENTS, endpoint, methods=["POST"], include_in_schema=False))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        ranks = scope["type"] == "http" and scope["path"] in RANKED and scope["method"] == "POST"
        await (self.rank if ranks else super().__call__)(scope, receive, send)
