"""From a body to a query: reads the wire format, and says of whatever is wrong where in the caller's own document it stands."""

import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pydantic_core
from pydantic import ValidationError

from features.policy import EpsilonGreedy, PlackettLuce, Policy
from features.values import plain, plain_all

from ..errors import FieldProblem, InvalidError, NotJsonError
from ..ranking.ranker import MISTAKES_TOLD, Bids, Query, Ranking
from ..settings import Settings
from . import wire
from .wire import Behaviour, Candidate, CandidateColumns, RankRequest

ERRORS_LISTED = 1_000
POINTER_STEP = 128
REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
UNIONS = (("candidates",), ("options", "explore"))
"""Where pydantic puts the name of the form into the path that it took a value for."""
FORMS = "a list of ad ids, a list of objects with ad_id, or an object of columns"


def parse_request(body: bytes) -> RankRequest:
    """Read a body.

    Raises:
        NotJsonError: it is not JSON.
        InvalidError: it is not a request; its mistakes name the fields.
    """
    try:
        return RankRequest.model_validate_json(body)
    except ValidationError as error:
        raise refusal(error) from None


def refusal(error: ValidationError) -> NotJsonError | InvalidError:
    """What to tell the sender of a body that is not what it should be."""
    count = error.error_count()
    if count > ERRORS_LISTED:  # listing them would hold up every other request
        return InvalidError(f"{count} things are wrong with the request, too many to list")
    wrong = error.errors(include_url=False, include_input=False, include_context=False)
    if wrong[0]["type"] == "json_invalid":
        return NotJsonError(wrong[0]["msg"])
    mistakes = [_mistake(entry["loc"], entry["type"], entry["msg"]) for entry in wrong[:MISTAKES_TOLD]]
    number = f"{count} things are" if count > 1 else "one thing is"
    return InvalidError(f"{number} wrong with the request; errors says where", mistakes)


def sent_request_id(body: bytes) -> str | None:
    """The request's own id, from a body that may be wrong elsewhere."""
    try:
        document = pydantic_core.from_json(body)
    except ValueError:
        return None
    sent = document.get("request_id") if isinstance(document, dict) else None
    return sent if isinstance(sent, str) and REQUEST_ID.fullmatch(sent) else None


def _mistake(loc: Sequence[str | int], kind: str, message: str) -> FieldProblem:
    tag = next((len(union) for union in UNIONS if tuple(loc[: len(union)]) == union), len(loc))
    path = [*loc[:tag], *loc[tag + 1 :]]
    detail = message.removeprefix("Value error, ")
    if path[-1:] == ["[key]"]:
        path, detail = path[:-1], f"its name: {detail}"
    if kind == "extra_forbidden":
        detail = "unknown field"
    elif kind == "union_tag_not_found":
        detail = f"expected {FORMS}"
    return FieldProblem(tuple(map(short, path)), detail)


def short(step: str | int) -> str | int:
    """A step of a path, cut where a caller made it very long."""
    return step if isinstance(step, int) or len(step) <= POINTER_STEP else step[:POINTER_STEP] + "…"


def to_query(request: RankRequest, most: int, default: Policy | None = None) -> Query:
    """The request as the ranker takes it, the same for rows and columns; `most` candidates are allowed.

    `default` is the policy of a request that names none.

    Raises:
        InvalidError: too many candidates, columns of unequal length, or a history with only some times.
    """
    names, bids, sent = _columns(request.candidates)
    ad_ids = plain_all(names)
    if len(ad_ids) > most:
        detail = f"{len(ad_ids)} candidates; at most {most} are ranked in one request"
        raise InvalidError(detail, [FieldProblem(("candidates",), detail)])
    user, options = request.user, request.options
    history, times = (None, ()) if user.history is None else _in_time(user.history)
    deadline = None if options.deadline_ms is None else options.deadline_ms / 1000
    return Query(
        user_id=plain(user.id),
        user=user.features,
        history=history,
        history_ts=times,
        context=request.context,
        ad_ids=ad_ids,
        names=None if ad_ids is names else names,
        bids=bids,
        sent=sent,
        model=options.model,
        top_k=options.top_k,
        shown=options.shown,
        objective=options.objective,
        explain=options.explain,
        unknown_ads=options.unknown_ads,
        policy=default if options.explore is None else _policy(options.explore),
        deadline=deadline,
    )


def default_policy(settings: Settings) -> Policy | None:
    """The policy of requests that name none; None is greedy."""
    if settings.explore == "epsilon_greedy":
        return EpsilonGreedy(settings.epsilon)
    return PlackettLuce(settings.temperature) if settings.explore == "plackett_luce" else None


def _policy(explore: wire.Explore) -> Policy | None:
    if isinstance(explore, wire.ExploreEpsilonGreedy):
        return EpsilonGreedy(explore.epsilon)
    return PlackettLuce(explore.temperature) if isinstance(explore, wire.ExplorePlackettLuce) else None


def _columns(candidates: CandidateColumns | list[Candidate] | list[str]) -> tuple[list[str], Bids | None, Mapping[int, dict[str, Any]]]:
    if isinstance(candidates, CandidateColumns):
        ad_ids, bids, features = candidates.ad_id, candidates.bid, candidates.features
        for name, column in (("bid", bids), ("features", features)):
            if column is not None and len(column) != len(ad_ids):
                detail = f"{len(column)} values, but ad_id has {len(ad_ids)}"
                raise InvalidError("the columns are not equally long", [FieldProblem(("candidates", name), detail)])
        return ad_ids, _bids(bids), {i: sent for i, sent in enumerate(features or ()) if sent}
    if isinstance(candidates[0], str):
        return cast("list[str]", candidates), None, {}  # type: ignore[redundant-cast]  # mypy takes the first for all of them
    rows = [row for row in candidates if isinstance(row, Candidate)]
    return [row.ad_id for row in rows], _bids([row.bid for row in rows]), {i: row.features for i, row in enumerate(rows) if row.features}


def _bids(bids: Sequence[float | None] | None) -> Bids | None:
    """NaN where there is none; None where there is none at all."""
    if bids is None:
        return None
    numbers = np.array(bids, np.float64)
    return None if np.isnan(numbers).all() else numbers


def _in_time(history: list[Behaviour]) -> tuple[Sequence[str], Sequence[float]]:
    """Ad ids, oldest first, by their times, and these beside them; as sent, and no times, where none has one."""
    times = [behaviour.ts for behaviour in history if behaviour.ts is not None]
    if times and len(times) < len(history):
        absent = next(i for i, behaviour in enumerate(history) if behaviour.ts is None)
        detail = "missing, though other behaviours have one: send all times, or none"
        raise InvalidError("the history has times for some behaviours only", [FieldProblem(("user", "history", absent, "ts"), detail)])
    ordered = sorted(history, key=lambda behaviour: behaviour.ts or 0)
    return plain_all([behaviour.ad_id for behaviour in ordered]), [behaviour.ts or 0 for behaviour in ordered] if times else ()


def as_sent(ranking: Ranking) -> Ranking:
    """The ranking with the ids of ads as the caller wrote them, each candidate's own."""
    query = ranking.query
    if query.names is None:
        return ranking
    names: dict[str, deque[str]] = {}
    for ad_id, name in zip(query.ad_ids, query.names, strict=True):
        names.setdefault(ad_id, deque()).append(name)
    first = {ad_id: each.popleft() for ad_id, each in names.items()}
    omitted = [(names[ad_id].popleft() if reason == "duplicate" else first[ad_id], reason) for ad_id, reason in ranking.omitted]
    return replace(ranking, ad_ids=[first[ad_id] for ad_id in ranking.ad_ids], omitted=omitted)


def locate(request: RankRequest, mistake: FieldProblem) -> FieldProblem:
    """A mistake's path, which speaks of rows, in the form that this caller sent."""
    if isinstance(request.candidates, CandidateColumns) and mistake.path[0] == "candidates" and len(mistake.path) > 2:
        _, row, name, *rest = mistake.path
        return FieldProblem(("candidates", name, row, *rest), mistake.detail)
    if mistake.path[0] == "candidates" and isinstance(request.candidates, list) and isinstance(request.candidates[0], str):
        return FieldProblem(mistake.path[:2], f"{'.'.join(map(str, mistake.path[2:]))} {mistake.detail}")
    return mistake
