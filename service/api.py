"""HTTP: routes, and the limits on a body. Knows nothing about how a ranking is made."""

from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pydantic_core
from fastapi import APIRouter, FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from . import errors
from .bodies import Reader, peer
from .edge import EVENTS, Edge, problem
from .errors import ServiceError
from .event_wire import events_answer, read_batch
from .events import Intake
from .explanations import Explanations
from .explore import Policy
from .metrics import CONTENT_TYPE, Metrics, Stages
from .openapi import RANKED
from .ranker import Made, Query, Ranker
from .requests import as_sent, default_policy, locate, parse_request, sent_request_id, to_query
from .scrapes import Scrapes
from .served import ServedLog
from .settings import Settings
from .shares import Shares
from .tokens import Guard
from .wire import RankRequest, answer

if TYPE_CHECKING:
    from .traces import Tracer

DOCS = Path(__file__).with_name("docs.html")

Health = Callable[[], Awaitable[dict[str, Any]]]


class RankEndpoint:
    """`POST /rank` and `/v1/rank`, as plain ASGI: a framework's way from a request to an answer costs more than the ranking."""

    def __init__(self, ranker: Ranker, explanations: Explanations, served: ServedLog, metrics: Metrics, settings: Settings) -> None:
        self._ranker, self._explanations, self._served, self._metrics, self._settings = ranker, explanations, served, metrics, settings
        self._policy = default_policy(settings)
        self._bodies, self._places = Reader(settings), Shares(settings.max_inflight, settings.peer_inflight_share)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Rank ads for a user, the likeliest click first."""
        try:
            body, made = await self._answer(scope, receive)
        except ServiceError as error:
            kind = errors.KINDS[type(error)]
            if kind.retry_after is not None:
                self._metrics.shed(kind.code)
            await problem(scope, kind, error.detail, error.mistakes)(scope, receive, send)
            return
        left = has_left(scope, receive)
        headers = [(b"content-length", b"%d" % len(body)), (b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})
        if left:
            self._served.left()
        else:
            self._served.put(made)

    async def _answer(self, scope: Scope, receive: Receive) -> tuple[bytes, Made]:
        settings, metrics, caller = self._settings, self._metrics, peer(scope)
        body = await self._bodies.read(scope, receive)
        # Only now: who sends slowly must not hold a place.
        if not self._places.take(caller):
            raise errors.OverLimitError(f"{settings.max_inflight} requests are being ranked already, or too many of yours; try again")
        metrics.under_way += 1
        try:
            return await self._rank(scope["state"], body.text(settings.max_body_bytes))
        finally:
            self._places.give_back(caller)
            metrics.under_way -= 1

    async def _rank(self, state: dict[str, Any], body: bytes) -> tuple[bytes, Made]:
        stages: Stages = state["observed"]
        stages.enter("parse")
        wire, query = _read(state, body, self._settings.max_candidates, self._policy)
        stages.model = self._ranker.models.label(query.model)
        try:
            made = await self._ranker.rank(query, stages)
        except errors.InvalidError as error:
            raise errors.InvalidError(error.detail, [locate(wire, mistake) for mistake in error.mistakes]) from None
        if query.explain:
            await self._explanations.add(made, stages)
        return answer(state["request_id"], as_sent(made.ranking, query), stages), made


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
        self._intake, self._settings = intake, settings
        self._bodies, self._places = Reader(settings), Shares(settings.max_event_batches, 1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Take a batch of events, and say what became of each."""
        if scope["method"] != "POST":
            raise HTTPException(405)
        try:
            response = Response(await self._answer(scope, receive), 202, media_type="application/json")
        except ServiceError as error:
            response = problem(scope, errors.KINDS[type(error)], error.detail, error.mistakes)
        await response(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive) -> bytes:
        settings = self._settings
        body = await self._bodies.read(scope, receive, plain=_origin(scope) in settings.origins)
        if not self._places.take(None):
            raise errors.OverLimitError(f"{settings.max_event_batches} batches of events are being taken already; try again")
        try:
            sent = await read_batch(body.text(settings.max_body_bytes), settings.max_events)
            return events_answer(scope["state"]["request_id"], sent, await self._intake.take(sent))
        finally:
            self._places.give_back(None)


def has_left(scope: Scope, receive: Receive) -> bool:
    """Whether the caller of a request whose body has been read has closed its connection. Waits for nothing.

    ASGI tells only those who wait for the next message: one step of that says whether it is there already. A client that has closed
    its half still gets its answer, but nobody knows whether it reads it.
    """
    if scope["state"].get("half_closed"):
        return True
    waiting = receive()
    try:
        waiting.send(None)  # type: ignore[attr-defined]  # a coroutine, as every server makes it
    except StopIteration as came:
        return bool(came.value["type"] == "http.disconnect")
    waiting.close()  # type: ignore[attr-defined]
    return False


def _origin(scope: Scope) -> str | None:
    """The page that a browser sent the request for; it says so itself, and other clients need not."""
    return next((value.decode("latin-1") for name, value in scope["headers"] if name == b"origin"), None)


def state_routes(ranker: Ranker, metrics: Metrics, health: Health, notice: Callable[[], str | None]) -> APIRouter:
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

    @router.get("/metrics", responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})
    async def exposition(request: Request) -> Response:
        """The metrics, for Prometheus."""
        ranker.catalogue.observe()
        metrics.flush()
        try:
            return Response(await scrapes.text(), headers={"content-type": CONTENT_TYPE})
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
    prefix = ""

    def take(self, endpoint: RankEndpoint, metrics: Metrics, tracer: "Tracer | None" = None, guard: Guard | None = None) -> None:
        """Rank with the endpoint. Its routes are there for who asks with another method than POST."""
        self.rank = Edge(endpoint, metrics, tracer, guard)
        self.add_middleware(Edge, metrics=metrics, tracer=tracer, guard=guard)
        self.router.routes += [Route(path, endpoint, methods=["POST"], include_in_schema=False) for path in RANKED]

    def take_events(self, endpoint: EventsEndpoint, origins: Collection[str]) -> None:
        """Take events with the endpoint, from pages of these origins too."""
        app: ASGIApp = endpoint
        if origins:  # a beacon comes with the cookies of this host, and its page reads the answer only if it says that it may be read
            app = CORSMiddleware(
                app, origins, ["POST"], ["authorization", "content-encoding"], allow_credentials=True, expose_headers=["x-request-id"]
            )
        self.router.routes.append(Route(EVENTS, app, methods=["POST", "OPTIONS"], include_in_schema=False))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "http":
            if self.prefix and scope["path"].startswith(f"{self.prefix}/"):
                scope["path"] = scope["path"].removeprefix(self.prefix)
            if scope["method"] == "POST" and scope["path"] in RANKED:
                await self.rank(scope, receive, send)
                return
            if scope["method"] == "HEAD":  # as GET; the server leaves the body out, going by its own scope
                scope = {**scope, "method": "GET"}
        await super().__call__(scope, receive, send)
