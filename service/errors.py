"""What can go wrong with a request, said without HTTP, and the one table that gives each its status."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pydantic_core


@dataclass(frozen=True, slots=True)
class FieldProblem:
    """One thing wrong in a request: the path to it in the caller's document, and what is wrong."""

    path: Sequence[str | int]
    detail: str

    @property
    def pointer(self) -> str:
        """The path as a JSON pointer (RFC 6901); empty for the whole document."""
        return "".join("/" + str(step).replace("~", "~0").replace("/", "~1") for step in self.path)


class ServiceError(Exception):
    """A request cannot be answered; `detail` says why and what to do, `mistakes` where."""

    def __init__(self, detail: str, mistakes: Sequence[FieldProblem] = ()) -> None:
        super().__init__(detail)
        self.detail = detail
        self.mistakes = tuple(mistakes)


class NotJsonError(ServiceError):
    """The body is not JSON."""


class NotJsonTypeError(ServiceError):
    """The body says it is something else than JSON."""


class CodingError(ServiceError):
    """The body is in a coding that is not read."""


class DamagedBodyError(ServiceError):
    """The body is not what its coding says."""


class TooLargeError(ServiceError):
    """The body is over the limit."""


class SlowBodyError(ServiceError):
    """The body did not arrive in time."""


class CallerLeftError(ServiceError):
    """The caller closed the connection before the body was whole; nobody reads the answer."""


class InvalidError(ServiceError):
    """The request is JSON but not a valid request; `mistakes` name the fields."""

    @classmethod
    def at(cls, path: tuple[str | int, ...], detail: str) -> "InvalidError":
        """Of one field, which says all of it."""
        return cls(detail, [FieldProblem(path, detail)])


class UnknownModelError(ServiceError):
    """The request names a model that is not loaded."""


class OverLimitError(ServiceError):
    """Too many requests are being answered already."""


class NotReadyError(ServiceError):
    """There is no model to rank with yet."""


class DeadlineError(ServiceError):
    """The request's own deadline passed before its candidates were scored."""


class ScoringError(ServiceError):
    """The model failed on a request or cannot be loaded; the fault is the model's or the machine's, not the caller's."""


class DeviceError(ScoringError):
    """The device that is to score is not there, or does not start."""


class RuntimeTooOldError(ScoringError):
    """The graph is in a format that the installed onnxruntime does not take; `needs` says which one does."""

    def __init__(self, detail: str, needs: str) -> None:
        super().__init__(detail)
        self.needs = needs


class StoreDownError(ServiceError):
    """The store did not take events; they may be sent again, whatever part of them it took."""


class MetricsGoneError(ServiceError):
    """What the workers counted has been removed from under them."""


class BacklogError(ServiceError):
    """So many events wait to be joined that no more are taken."""


@dataclass(frozen=True, slots=True)
class Kind:
    """How an error is told: its HTTP status, its code (also the `outcome` of metrics), a title, seconds to wait before a retry, headers."""

    status: int
    code: str
    title: str
    retry_after: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


KINDS: dict[type[ServiceError], Kind] = {
    NotJsonError: Kind(400, "not_json", "The body is not JSON"),
    DamagedBodyError: Kind(400, "damaged_body", "The body is not what its Content-Encoding says"),
    UnknownModelError: Kind(404, "unknown_model", "No such model"),
    SlowBodyError: Kind(408, "slow_body", "The body did not arrive in time"),
    TooLargeError: Kind(413, "too_large", "The body is too large"),
    NotJsonTypeError: Kind(415, "not_json_type", "The content type is not JSON", headers={"accept": "application/json"}),
    CodingError: Kind(415, "unknown_coding", "The content coding is not read", headers={"accept-encoding": "gzip, identity"}),
    InvalidError: Kind(422, "invalid", "The request is not valid"),
    OverLimitError: Kind(429, "over_limit", "Too many requests at once", 1),
    CallerLeftError: Kind(499, "caller_left", "The caller closed the connection"),
    ScoringError: Kind(500, "scoring_failed", "The model could not score the request"),
    NotReadyError: Kind(503, "not_ready", "The service is not ready", 2),
    StoreDownError: Kind(503, "store_down", "The store did not take the events", 1),
    MetricsGoneError: Kind(503, "metrics_gone", "The metrics are lost"),
    BacklogError: Kind(503, "backlog", "Too many events wait to be joined", 10),
    DeadlineError: Kind(504, "deadline", "The deadline passed"),
}
MALFORMED = Kind(400, "malformed", "The request is not proper HTTP")
URL_TOO_LONG = Kind(414, "url_too_long", "The URL is too long")
HEAD_TOO_LARGE = Kind(431, "head_too_large", "The head of the request is too large")
NOT_IMPLEMENTED = Kind(501, "not_implemented", "The request asks for what is not done here")
FULL = Kind(503, "full", "Too many connections", 1)
WRONG_VERSION = Kind(505, "wrong_version", "The version of HTTP is not spoken")
"""What a connection refuses, before there is a request that could be counted."""
UNAUTHENTICATED = Kind(401, "unauthenticated", "A token is needed")
FORBIDDEN = Kind(403, "forbidden", "The token does not allow this")
NOT_FOUND = Kind(404, "not_found", "No such page")
WRONG_METHOD = Kind(405, "wrong_method", "The page does not take this method")
UNEXPECTED = Kind(500, "unexpected", "The service made a mistake")


def document(kind: Kind, detail: str, request_id: str, mistakes: Sequence[FieldProblem] = ()) -> bytes:
    """The JSON of an error (RFC 9457), the same wherever it was found."""
    return pydantic_core.to_json(
        {
            "type": f"urn:adrank:problem:{kind.code}",
            "title": kind.title,
            "status": kind.status,
            "detail": detail,
            "code": kind.code,
            "request_id": request_id,
            "errors": [{"pointer": mistake.pointer, "detail": mistake.detail} for mistake in mistakes],
        }
    )
