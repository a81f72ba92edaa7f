"""HTTP's edge: ids, metrics, traces and logs of every request, and errors as problem+json. Knows nothing of what a request asks."""

import logging
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .. import errors
from ..errors import FieldProblem, Kind
from ..public import SCORING
from ..telemetry.logs import REQUEST, RateLimitFilter
from ..telemetry.metrics import Metrics, RequestTimings
from .console import CONSOLE
from .docs import DOCS
from .openapi import EVENTS, RANKED
from .tokens import Guard

if TYPE_CHECKING:
    from ..telemetry.tracing import Trace, Tracer

READ, WRITTEN = "GET, HEAD, OPTIONS", "OPTIONS, POST"
METHODS = {
    **dict.fromkeys([*RANKED, EVENTS], WRITTEN),
    **dict.fromkeys(("/livez", "/readyz", "/metrics", "/v1/models", "/v1/schema", "/openapi.json", *DOCS, *CONSOLE), READ),
}
"""What each path takes."""
ROUTES = frozenset(METHODS)
TRACED = frozenset({*RANKED, EVENTS})
PLAIN = {errors.KINDS[kind].code for kind in (errors.ScoringError, errors.MetricsGoneError)}
"""Whose detail is no word of the caller's, so that the log may have it: ONNX Runtime's on the model, or our own."""
TOLD = (10, 1.0)
"""So many failed requests are logged in so many seconds, by each worker; metrics count them all."""

log = logging.getLogger(__name__)
failures = logging.getLogger(f"{__name__}.failures")
failures.addFilter(RateLimitFilter(*TOLD))


def problem(
    scope: Scope, kind: Kind, detail: str, mistakes: Sequence[FieldProblem] = (), headers: Mapping[str, str] | None = None
) -> Response:
    """An error as problem+json; notes its code as the outcome of the request."""
    scope["state"]["observed"].outcome = kind.code
    scope["state"]["detail"] = detail
    detail = SCORING if kind is errors.KINDS[errors.ScoringError] else detail
    wait = {} if kind.retry_after is None else {"retry-after": str(kind.retry_after)}
    body = errors.document(kind, detail, scope["state"]["request_id"], mistakes)
    return Response(body, kind.status, {**kind.headers, **(headers or {}), **wait}, media_type="application/problem+json")


def foreseen(scope: Scope, error: errors.ServiceError) -> Response:
    """What `errors.py` knows, as problem+json."""
    return problem(scope, errors.KINDS[type(error)], error.detail, error.mistakes)


class Edge:
    """The middleware around all routes: every request gets an id, is counted and timed, and whatever goes wrong inside becomes a problem.

    Behind a proxy, paths may begin with `prefix`.
    """

    def __init__(
        self, app: ASGIApp, metrics: Metrics, tracer: "Tracer | None" = None, guard: Guard | None = None, prefix: str = ""
    ) -> None:
        self._app, self._metrics, self._tracer, self._guard, self._prefix = app, metrics, tracer, guard, prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = self._meant(scope)
        path, state = scope["path"], scope.setdefault("state", {})
        state["request_id"] = os.urandom(16).hex()
        state["observed"] = stages = self._metrics.begin(path if path in ROUTES else "other")
        REQUEST.set(state)
        trace = None if self._tracer is None else self._begin_trace(self._tracer, scope)
        status: int | None = None

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", state["request_id"].encode())]
                if trace is not None and trace.recorded:
                    message["headers"].append((b"traceresponse", trace.response))
            await send(message)

        try:
            await (self._refusal(scope) or self._app)(scope, receive, noting)
            stages.finish()
        except Exception as error:
            response = self._failed(scope, error)
            if status is not None:
                raise
            await response(scope, receive, noting)
        finally:
            self._metrics.end(stages)
            if status is not None and status >= 500:
                _tell(scope, status)
            if trace is not None and trace.recorded and self._tracer is not None:
                self._tracer.end(trace, stages, scope, status)

    def _meant(self, scope: Scope) -> Scope:
        """Without the prefix, and HEAD as GET: the server leaves the body out, going by its own scope."""
        if self._prefix and scope["path"].startswith(f"{self._prefix}/"):
            scope["path"] = scope["path"].removeprefix(self._prefix)
        return {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope

    def _refusal(self, scope: Scope) -> Response | None:
        """The answer to a request that is not let in."""
        if self._guard is None:
            return None
        sent = [value for name, value in scope["headers"] if name == b"authorization"]
        refusal = self._guard.refuse(scope["path"], scope["method"], sent)
        if refusal is None:
            return None
        return problem(scope, refusal.kind, refusal.detail, headers={"www-authenticate": refusal.challenge})

    def _failed(self, scope: Scope, error: Exception) -> Response:
        """The answer to a request that went wrong."""
        if isinstance(error, errors.ServiceError):  # of a ranking, which takes a short way past the handlers of routes
            kind = errors.KINDS[type(error)]
            if kind.retry_after is not None:
                self._metrics.shed(kind.code)
            return foreseen(scope, error)
        response = problem(scope, errors.UNEXPECTED, "the service made a mistake; its log has it under this request_id")
        failures.error("the request failed in a way nobody foresaw", exc_info=error, extra=_details(scope, errors.UNEXPECTED.status))
        return response

    def _begin_trace(self, tracer: "Tracer", scope: Scope) -> "Trace | None":
        if scope["path"] not in TRACED or scope["method"] != "POST":
            return None
        trace = tracer.begin(scope["headers"], scope["state"]["observed"])
        if trace is not None:
            scope["state"]["trace_id"] = trace.id
        return trace


def _tell(scope: Scope, status: int) -> None:
    """Log a failed request, unless it was a probe, or has been logged with what went wrong."""
    stages: RequestTimings = scope["state"]["observed"]
    if stages.route != "/readyz" and stages.outcome != errors.UNEXPECTED.code:
        failures.log(logging.ERROR if status == 500 else logging.WARNING, "a request failed", extra=_details(scope, status))


def _details(scope: Scope, status: int) -> dict[str, Any]:
    stages: RequestTimings = scope["state"]["observed"]
    fields = {"request_id": scope["state"]["request_id"], "route": stages.route, "status": status, "code": stages.outcome}
    if stages.outcome in PLAIN:
        fields["detail"] = scope["state"]["detail"]
    return fields


def add_error_handlers(app: FastAPI) -> None:
    """Errors of the service and of routing, as problems: below the middleware, so that what that adds to answers is on them too."""

    async def service(request: Request, error: Exception) -> Response:
        if not isinstance(error, errors.ServiceError):
            raise error
        return foreseen(request.scope, error)

    async def routing(request: Request, error: Exception) -> Response:
        if not isinstance(error, HTTPException):
            raise error
        path, server = request.scope["path"], request.scope["path"] == "*"
        allow = {"allow": "GET, HEAD, OPTIONS, POST" if server else METHODS.get(path, "")}
        if request.method == "OPTIONS" and (server or path in METHODS):
            return Response(status_code=204, headers=allow)
        if error.status_code == 405:
            return problem(request.scope, errors.WRONG_METHOD, f"{path} takes {allow['allow']}", headers=allow)
        return problem(request.scope, errors.NOT_FOUND, "see /docs for what there is", headers=error.headers)

    app.add_exception_handler(HTTPException, routing)
    app.add_exception_handler(errors.ServiceError, service)
