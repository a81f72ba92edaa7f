"""`POST /v1/events`: what users did, and what became of users and ads."""

from collections.abc import Collection

from fastapi import APIRouter, Request, Response
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from ..feedback.ingest import Intake
from ..serving.shares import Shares
from ..settings import Settings
from .bodies import Reader
from .event_wire import events_answer, read_batch
from .openapi import EVENTS, OF_RANKINGS, content, errors_of, reads


def event_routes(intake: Intake, settings: Settings) -> APIRouter:
    """The route that takes events."""
    router, bodies, places = APIRouter(), Reader(settings), Shares(settings.max_event_batches, 1)
    busy = f"{settings.max_event_batches} batches of events are being taken already; try again"
    answers = {"202": {"description": "What became of each", **content("application/json", "EventsAnswer")}, **errors_of(OF_RANKINGS)}

    @router.post(
        EVENTS, operation_id="events", status_code=202, response_class=Response, responses=answers, openapi_extra=reads("EventBatch")
    )
    async def events(request: Request) -> Response:
        """Take impressions, clicks, conversions and news of users and ads, each once by its id, and say what became of each."""
        # Beacons of browsers have no type of JSON; a page says itself where it is from, and other clients need not.
        body = await bodies.read(request.scope, request.receive, plain=request.headers.get("origin") in settings.origins)
        with places.holding(None, busy):
            sent = await read_batch(body.text(settings.max_body_bytes), settings.max_events)
            answered = events_answer(request.state.request_id, sent, await intake.take(sent))
        return Response(answered, 202, media_type="application/json")

    return router


class EventsCORS(CORSMiddleware):
    """CORS of events alone: a beacon comes with the cookies of this host, and its page reads the answer only if it says that it may be."""

    def __init__(self, app: ASGIApp, origins: Collection[str]) -> None:
        sent = ["authorization", "content-encoding"]
        super().__init__(app, origins, ["POST"], sent, allow_credentials=True, expose_headers=["x-request-id"])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        await (super().__call__ if scope["type"] == "http" and scope["path"] == EVENTS else self.app)(scope, receive, send)
