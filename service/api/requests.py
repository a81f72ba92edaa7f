"""From a body to a query: reads the wire format, and says of whatever is wrong where in the caller's own document it stands."""

import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pydantic_core
from pydantic import ValidationError

from features.policy import EpsilonGreedy, PlackettLuce, Policy, Thompson
from features.values import ValueTextError, plain, plain_all, text_of

from ..errors import FieldProblem, InvalidError, NotJsonError
from ..ranking.bids import BID_TYPES, CPC, HIGHEST, MICRO, Bids, Micros, times, to_micros
from ..ranking.query import MISTAKES_TOLD, Query, Ranking, Selection
from ..ranking.rules import Rules
from ..settings import Settings
from . import wire
from .wire import Behaviour, Candidate, CandidateColumns, RankRequest

ERRORS_LISTED = 1_000
POINTER_STEP = 128
REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
UNIONS = (("candidates",), ("options", "explore"))
"""Where pydantic puts the name of the form into the path that it took a value for."""
FORMS = "a list of ad ids, a list of objects with ad_id, an object of columns, or all"


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


def to_query(
    request: RankRequest,
    most: int,
    default: Policy | None = None,
    weights: Mapping[str, float] | None = None,
    arms: Mapping[str, Sequence[str]] | None = None,
) -> Query:
    """The request as the ranker takes it, the same for rows and columns; `most` candidates are allowed.

    `default` is the policy of a request that names none, `weights` are those of heads, for the objective that weighs them,
    `arms` are what there is by experiment.

    Raises:
        InvalidError: too many candidates, an experiment or arm that there is not, columns of unequal length,
            an amount with too many decimals, or a history with only some times.
    """
    selection = _selection(request, most)
    _check_arms(request.experiment, arms or {})
    names, offered, sent = _columns(request.candidates)
    ad_ids = plain_all(names)
    if len(ad_ids) > most:
        detail = f"{len(ad_ids)} candidates; at most {most} are ranked in one request"
        raise InvalidError.at(("candidates",), detail)
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
        selection=selection,
        names=None if ad_ids is names else names,
        bids=None if offered is NOTHING else _bids(request, len(ad_ids), *offered),
        sent=sent,
        model=options.model,
        version=options.version,
        top_k=options.top_k,
        shown=options.shown,
        objective=options.objective,
        weights=weights if weights and options.objective == "weighted" else {},
        min_score=options.min_score,
        reserve=None if options.reserve is None else int(_amounts([options.reserve], "reserve")[0]),
        prices=options.prices,
        rules=None if options.rules is None else _rules(options.rules),
        explain=options.explain,
        unknown_ads=options.unknown_ads,
        policy=default if options.explore is None else _policy(options.explore),
        deadline=deadline,
        experiment=request.experiment,
    )


def _check_arms(experiment: Mapping[str, str], arms: Mapping[str, Sequence[str]]) -> None:
    for name, arm in experiment.items():
        if name not in arms:
            raise InvalidError.at(
                ("experiment", name), f"no such experiment; the service's setting experiments has {', '.join(arms) or 'none'}"
            )
        if arm not in arms[name]:
            raise InvalidError.at(("experiment", name), f"no such arm; the experiment has {', '.join(arms[name])}")


def _selection(request: RankRequest, most: int) -> Selection | None:
    """What the candidates `all` are, None where they are listed."""
    if request.candidates != wire.ALL:
        for path, said in ((("filters",), request.filters), (("options", "retrieve"), request.options.retrieve)):
            if said:
                raise InvalidError.at(path, "is for the candidates all; leave it out, or send all in place of the list")
        return None
    if (request.options.retrieve or 0) > most:
        raise InvalidError.at(("options", "retrieve"), f"at most {most} candidates are ranked in one request")
    if request.options.top_k is None:
        raise InvalidError.at(("options", "top_k"), "missing; with the candidates all say how many ads the answer is to have")
    filters = {}
    for name, values in request.filters.items():
        try:
            filters[name] = [text for each in values if (text := text_of(each)) is not None]
        except ValueTextError as error:
            raise InvalidError.at(("filters", name), str(error)) from None
    return Selection(filters, most, request.options.retrieve)


def _rules(rules: wire.RankRules) -> Rules:
    return Rules(
        max_per=rules.max_per,
        distance=rules.distance,
        trade_off=1.0 if rules.diversity is None else rules.diversity.trade_off,
        alike=() if rules.diversity is None else rules.diversity.by,
        pinned={int(place): plain(ad_id) for place, ad_id in rules.pinned.items()},
        reserves=_amounts(rules.reserves, "rules.reserves").tolist(),
        frequency=rules.frequency,
        already_clicked=rules.already_clicked,
    )


def default_policy(settings: Settings) -> Policy | None:
    """The policy of requests that name none; None is greedy."""
    if settings.explore == "epsilon_greedy":
        return EpsilonGreedy(settings.epsilon)
    if settings.explore == "thompson":
        return Thompson()
    return PlackettLuce(settings.temperature) if settings.explore == "plackett_luce" else None


def _policy(explore: wire.Explore) -> Policy | None:
    if isinstance(explore, wire.ExploreEpsilonGreedy):
        return EpsilonGreedy(explore.epsilon)
    if isinstance(explore, wire.ExploreThompson):
        return Thompson()
    return PlackettLuce(explore.temperature) if isinstance(explore, wire.ExplorePlackettLuce) else None


Offered = tuple[Sequence[float | None] | None, Sequence[str | None] | None, Sequence[float | None] | None, Sequence[float | None] | None]
"""The columns `OFFER`, None where no candidate has one."""
NOTHING: Offered = (None, None, None, None)
OFFER = ("bid", "bid_type", "value", "multiplier")
KINDS: dict[str | None, int] = {None: CPC, **{name: kind for kind, name in enumerate(BID_TYPES)}}


def _columns(candidates: CandidateColumns | list[Candidate] | list[str] | str) -> tuple[list[str], Offered, Mapping[int, dict[str, Any]]]:
    if isinstance(candidates, str):  # all: none is listed
        return [], NOTHING, {}
    if isinstance(candidates, CandidateColumns):
        ad_ids, features = candidates.ad_id, candidates.features
        offered = candidates.bid, candidates.bid_type, candidates.value, candidates.multiplier
        for name, column in (*zip(OFFER, offered, strict=True), ("features", features)):
            if column is not None and len(column) != len(ad_ids):
                detail = f"{len(column)} values, but ad_id has {len(ad_ids)}"
                raise InvalidError("the columns are not equally long", [FieldProblem(("candidates", name), detail)])
        return ad_ids, offered, {i: sent for i, sent in enumerate(features or ()) if sent}
    if isinstance(candidates[0], str):
        return cast("list[str]", candidates), NOTHING, {}  # type: ignore[redundant-cast]  # mypy takes the first for all of them
    rows = [row for row in candidates if isinstance(row, Candidate)]
    said = set[str]().union(*(row.model_fields_set for row in rows))
    columns = tuple([getattr(row, name) for row in rows] if name in said else None for name in OFFER)
    return [row.ad_id for row in rows], cast("Offered", columns), {i: row.features for i, row in enumerate(rows) if row.features}


def _bids(request: RankRequest, count: int, bids: Any, kinds: Any, values: Any, multipliers: Any) -> Bids | None:
    """What candidates offer, None where they offer nothing."""
    said = [column for column in (bids, values, kinds) if column is not None]
    if all(column.count(None) == count for column in said):
        return None
    bid, value = (
        np.full(count, -1) if column is None else _amounts(column, name, request) for name, column in (("bid", bids), ("value", values))
    )
    if multipliers is not None:
        bid = times(bid, np.abs(_amounts([1 if each is None else each for each in multipliers], "multiplier", request)) * 1000)
        if len(high := np.flatnonzero(bid > HIGHEST)):
            detail = f"the bid times it is more than {HIGHEST // MICRO:,}"
            raise InvalidError(detail, [locate(request, FieldProblem(("candidates", int(high[0]), "multiplier"), detail))])
    return Bids(bid, np.full(count, CPC) if kinds is None else np.array([KINDS[kind] for kind in kinds]), value)


def _amounts(amounts: Sequence[float | None], name: str, request: RankRequest | None = None) -> Micros:
    """In micros; of candidates where there is a request, else an option."""
    micros, wrong = to_micros(amounts)
    if wrong:
        detail = "needs more than 6 decimals; round it to millionths"
        paths = [("candidates", i, name) if request else ("options", *name.split(".")) for i in wrong[:MISTAKES_TOLD]]
        problems = [FieldProblem(path, detail) for path in paths]
        raise InvalidError(
            f"{len(wrong)} amounts have more than 6 decimals", [locate(request, each) if request else each for each in problems]
        )
    return micros


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
