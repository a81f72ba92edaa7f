"""Asks a ranker for rankings and tells it events: `Adrank` waits, `AsyncAdrank` is for asyncio. Both keep their connections.

Needs `pip install 'adrank[client]'` and nothing else of adrank.
"""

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NotRequired, Self, TypedDict

import httpx
from httpx_retries import Retry, RetryTransport

EVENTS = 1_000
"""The most events of one request, as the service takes them by default."""
BUSY = (429, 503)
RANKING = Retry(
    total=2, allowed_methods=["POST", "GET"], status_forcelist=BUSY, retry_on_exceptions=(httpx.ConnectError,), backoff_factor=0.05
)
"""A ranking that may have been made is not asked for again: both would be logged."""
TELLING = Retry(total=8, allowed_methods=["POST"], status_forcelist=(*BUSY, 502, 504), backoff_factor=0.2, max_backoff_wait=10)
"""An event is done once by its id, so it is told until there is an answer."""

Features = Mapping[str, Any]
NOTHING: Features = {}
Event = dict[str, Any]
Candidates = Sequence[str] | Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]] | Literal["all"]
"""Ids, or objects with `ad_id`, or columns, or all ads of the catalogue, as `POST /rank` takes them."""
Filters = Mapping[str, Sequence[Any]]
"""By category or list of ads, of the candidates `all`: the values of which an ad must have one."""


class RankedAd(TypedDict):
    """An ad of an answer; what is not required is there where the request asked for it."""

    ad_id: str
    rank: int
    p_click: float
    ecpm: NotRequired[float]
    score: NotRequired[float]
    price: NotRequired[float]
    propensity: NotRequired[float]
    known: NotRequired[bool]
    explain: NotRequired[dict[str, Any]]
    attention: NotRequired[list[float]]
    contributions: NotRequired[dict[str, float]]


class RankedAds(TypedDict):
    """The answer of `POST /rank`: `ads`, best first, and whatever is not among them in `omitted`."""

    request_id: str
    model: dict[str, str]
    ads: list[RankedAd]
    omitted: list[dict[str, str]]
    omitted_by_reason: NotRequired[dict[str, int]]
    degraded: list[dict[str, str]]
    timings_ms: dict[str, float]
    explain: NotRequired[dict[str, Any]]


class EventResult(TypedDict):
    """What became of an event."""

    event_id: str | None
    status: Literal["accepted", "duplicate", "rejected"]
    reason: NotRequired[str]
    detail: NotRequired[str]
    pointer: NotRequired[str]


class RefusedError(Exception):
    """The service refused a request; `errors` has a JSON pointer into it, and a sentence, for each thing that is wrong."""

    def __init__(self, status: int, problem: Mapping[str, Any]) -> None:
        self.status, self.code, self.errors = status, str(problem.get("code", "")), list(problem.get("errors", ()))
        wrong = "".join(f"; {each['pointer']}: {each['detail']}" for each in self.errors)
        super().__init__(f"{status} {problem.get('detail') or problem.get('title') or 'without a reason'}{wrong}")


def event(kind: Literal["impression", "click", "conversion", "user", "ad"], **fields: Any) -> Event:
    """An event that happens now, with an id of its own; both may be given. Make it once, and send it as often as it takes."""
    return {"type": kind, "event_id": uuid.uuid4().hex, "ts": time.time(), **fields}


def _ranking(user: str | Mapping[str, Any], candidates: Candidates, context: Features, options: Features, *others: Any) -> Any:
    asked = {"user": {"id": user} if isinstance(user, str) else user, "candidates": candidates, "context": context, "options": options}
    named = zip(("filters", "experiment", "request_id"), others, strict=True)
    return {"json": asked | {name: value for name, value in named if value}, "extensions": {"retry": RANKING}}


def _telling(events: Sequence[Event], retry: Retry) -> Iterator[Any]:
    for first in range(0, len(events), EVENTS):
        yield {"json": {"events": events[first : first + EVENTS]}, "extensions": {"retry": retry}}


def _read(answer: httpx.Response) -> Any:
    if answer.is_success:
        return answer.json()
    try:
        problem = answer.json()
    except ValueError:
        problem = {"detail": answer.text[:200]}  # a proxy's words
    raise RefusedError(answer.status_code, problem if isinstance(problem, dict) else {})


def _connection(url: str, token: str | None, timeout: float) -> Any:
    return {"base_url": url, "timeout": timeout, "headers": {"authorization": f"Bearer {token}"} if token else {}}


class Adrank:
    """A ranker at an address, for one thread or several."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        token: str | None = None,
        timeout: float = 2.0,
        transport: httpx.BaseTransport | None = None,
        telling: Retry = TELLING,
    ) -> None:
        """`timeout` in seconds; `transport`: httpx's, for a Unix socket or a proxy; `telling`: how often and how long events are tried."""
        self._retry = telling
        self._http = httpx.Client(transport=RetryTransport(transport, RANKING), **_connection(url, token, timeout))

    def rank(
        self,
        user: str | Mapping[str, Any],
        candidates: Candidates,
        *,
        context: Features = NOTHING,
        options: Features = NOTHING,
        filters: Filters = NOTHING,
        experiment: Mapping[str, str] = NOTHING,
        request_id: str | None = None,
    ) -> RankedAds:
        """Rank candidates for a user: an id, or an object with features and a history.

        Raises:
            RefusedError: the request is wrong, or the service is too busy after two more tries.
            httpx.TransportError: no answer.
        """
        asked = _ranking(user, candidates, context, options, filters, experiment, request_id)
        answer: RankedAds = _read(self._http.post("/rank", **asked))
        return answer

    def tell(self, events: Sequence[Event]) -> list[EventResult]:
        """Tell events, in batches, again until each batch is answered; the outcomes in their order.

        Raises:
            RefusedError, httpx.TransportError: a batch had no good answer; tell all again, what was done is not done twice.
        """
        results = list[EventResult]()
        for batch in _telling(events, self._retry):
            results += _read(self._http.post("/v1/events", **batch))["events"]
        return results

    def models(self) -> dict[str, Any]:
        """`GET /v1/models`: what is live.

        Raises:
            RefusedError, httpx.TransportError: no good answer.
        """
        return dict(_read(self._http.get("/v1/models")))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()


class AsyncAdrank:
    """A ranker at an address, for one event loop. Its methods do and raise what those of `Adrank` do."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        token: str | None = None,
        timeout: float = 2.0,
        transport: httpx.AsyncBaseTransport | None = None,
        telling: Retry = TELLING,
    ) -> None:
        """As `Adrank`."""
        self._retry = telling
        self._http = httpx.AsyncClient(transport=RetryTransport(transport, RANKING), **_connection(url, token, timeout))

    async def rank(
        self,
        user: str | Mapping[str, Any],
        candidates: Candidates,
        *,
        context: Features = NOTHING,
        options: Features = NOTHING,
        filters: Filters = NOTHING,
        experiment: Mapping[str, str] = NOTHING,
        request_id: str | None = None,
    ) -> RankedAds:
        """See `Adrank.rank`."""
        asked = _ranking(user, candidates, context, options, filters, experiment, request_id)
        answer: RankedAds = _read(await self._http.post("/rank", **asked))
        return answer

    async def tell(self, events: Sequence[Event]) -> list[EventResult]:
        """See `Adrank.tell`."""
        return [
            outcome for batch in _telling(events, self._retry) for outcome in _read(await self._http.post("/v1/events", **batch))["events"]
        ]

    async def models(self) -> dict[str, Any]:
        """See `Adrank.models`."""
        return dict(_read(await self._http.get("/v1/models")))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()
