"""`POST /rank` and `/v1/rank`: from a body to ranked ads."""

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute
from starlette.background import BackgroundTask
from starlette.types import ASGIApp, Receive, Scope, Send

from .. import errors
from ..feedback.impression_log import ServedLog
from ..ranking.explanations import Explanations
from ..ranking.query import Query, Ranking
from ..ranking.ranker import Ranker
from ..serving.shares import Shares
from ..settings import Settings
from ..telemetry.metrics import Metrics, RequestTimings
from .bodies import Reader, peer
from .openapi import OF_EVENTS, RANKED, content, errors_of, reads
from .requests import as_sent, default_policy, locate, parse_request, sent_request_id, to_query
from .wire import RankRequest, answer


def rank_routes(ranker: Ranker, explanations: Explanations, served: ServedLog, metrics: Metrics, settings: Settings) -> APIRouter:
    """The routes that rank. They take a raw request: pydantic reads its bytes at once, rather than what a framework made of them."""
    router, policy, weights, arms = APIRouter(), default_policy(settings), settings.head_weights, settings.arms
    bodies, places = Reader(settings), Shares(settings.max_inflight, settings.peer_inflight_share)
    metrics.under_way = lambda: places.held
    busy = f"{settings.max_inflight} requests are being ranked already, or too many of yours; try again"

    async def rank(request: Request) -> Response:
        """Rank ads for a user, the likeliest click first."""
        body = await bodies.read(request.scope, request.receive)
        with places.holding(peer(request.scope), busy):  # only now: who sends slowly must not hold a place
            stages: RequestTimings = request.state.observed
            stages.enter("parse")
            wire, query = read(request, body.text(settings.max_body_bytes))
            stages.model, stages.experiment = ranker.models.label(query.model), query.experiment
            try:
                ranking = await ranker.rank(query, stages)
            except errors.InvalidError as error:
                raise errors.InvalidError(error.detail, [locate(wire, mistake) for mistake in error.mistakes]) from None
            if query.explain:
                await explanations.add(ranking, stages)
            answered = answer(query.request_id, as_sent(ranking), stages)
        left = has_left(request)
        return Response(answered, media_type="application/json", background=BackgroundTask(log, ranking, left))

    def read(request: Request, body: bytes) -> tuple[RankRequest, Query]:
        """The request, its id noted for the answer even if the rest of it is wrong."""
        try:
            wire = parse_request(body)
            request.state.request_id = wire.request_id or request.state.request_id
            query = to_query(wire, settings.max_candidates, policy, weights, arms)
            query.request_id = request.state.request_id
        except errors.InvalidError:
            request.state.request_id = sent_request_id(body) or request.state.request_id
            raise
        return wire, query

    async def log(ranking: Ranking, left: bool) -> None:
        """What was served, once it has been sent, unless its caller had left."""
        if left:
            served.left()
        else:
            served.put(ranking)

    answers = {"200": {"description": "Successful Response", **content("application/json", "RankAnswer")}, **errors_of(OF_EVENTS)}
    for path, name in RANKED.items():
        router.add_api_route(
            path, rank, methods=["POST"], operation_id=name, response_class=Response, responses=answers, openapi_extra=reads("RankRequest")
        )
    return router


class Direct:
    """The middleware that ranks without the way from a request to a route, which takes a fifth as long as a small ranking."""

    def __init__(self, app: ASGIApp, ranking: APIRouter) -> None:
        self._app = app
        self._direct = {route.path: route.endpoint for route in ranking.routes if isinstance(route, APIRoute)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        rank = self._direct.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        app = self._app if rank is None else await rank(Request(scope, receive))
        await app(scope, receive, send)


def has_left(request: Request) -> bool:
    """Whether the caller of a request whose body has been read has closed its connection. Waits for nothing.

    One step of the wait for the next message says whether it is there already. `Request.is_disconnected` does the same for as much time
    as the whole route takes. A client that has closed its half still gets its answer, but nobody knows whether it reads it.
    """
    if getattr(request.state, "half_closed", False):
        return True
    waiting = request.receive()
    try:
        waiting.send(None)  # type: ignore[attr-defined]  # a coroutine, as every server makes it
    except StopIteration as came:
        return bool(came.value["type"] == "http.disconnect")
    waiting.close()  # type: ignore[attr-defined]
    return False
