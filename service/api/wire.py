"""The wire format of `POST /rank`: one definition, from which come validation, the OpenAPI schema and every error's pointer."""

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, PlainValidator, Tag, WithJsonSchema

from features.state import HISTORY_LIMIT
from features.temperatures import COLDEST, HOTTEST

from ..ranking.query import Ranking
from ..telemetry.metrics import RequestTimings
from .examples import OF_ALL

TEXT_LENGTH, LIST_LENGTH, FEATURES, CANDIDATES, ID_LENGTH = 1_024, 1_000, 256, 100_000, 256
LOWEST, HIGHEST = -(2**63), 2**64 - 1
"""The whole numbers that msgpack, and so the store, can hold."""
ALL = "all"
TIMED = ("parse", "features", "queue", "inference")


def _value(value: object) -> object:
    """Written by hand: pydantic would report a value that fits no type of a union once for each of them."""
    if isinstance(value, str):
        fits = len(value) <= TEXT_LENGTH
    elif isinstance(value, list):
        fits = len(value) <= LIST_LENGTH and all(_is_scalar(element) for element in value)
    else:
        fits = value is None or _is_scalar(value)
    if not fits:
        of = f"a text of at most {TEXT_LENGTH} characters, a finite number, true or false"
        raise ValueError(f"expected {of}, a list of at most {LIST_LENGTH} of these, or null")
    return value


def _is_scalar(value: object) -> bool:
    if isinstance(value, str):
        return len(value) <= TEXT_LENGTH
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and LOWEST <= value <= HIGHEST


def _few(features: object) -> object:
    """Asked first: pydantic would check each of a million features before it counts them."""
    if isinstance(features, dict) and len(features) > FEATURES:
        raise ValueError(f"{len(features)} features; at most {FEATURES} are taken")
    return features


def _form(candidates: object) -> str | None:
    if isinstance(candidates, dict | CandidateColumns):
        return "columns"
    if candidates == ALL:
        return ALL
    if isinstance(candidates, list):
        return "rows" if candidates and isinstance(candidates[0], dict | Candidate) else "ids"
    return None


def _one_of(values: object) -> object:
    """A filter's values, as `_value` by hand; null is none: an ad without a value passes no filter."""
    if not isinstance(values, list) or not 1 <= len(values) <= LIST_LENGTH or not all(_is_scalar(each) for each in values):
        raise ValueError(f"expected a list of 1 to {LIST_LENGTH} values, each a text, a finite number, true or false")
    return values


_SCALARS: list[dict[str, Any]] = [
    {"type": "string", "maxLength": TEXT_LENGTH},
    {"type": "integer", "minimum": LOWEST, "maximum": HIGHEST},
    {"type": "number"},
    {"type": "boolean"},
]
_LIST = {"type": "array", "maxItems": LIST_LENGTH, "items": {"anyOf": _SCALARS}}
Value = Annotated[Any, PlainValidator(_value), WithJsonSchema({"anyOf": [*_SCALARS, _LIST, {"type": "null"}]})]
_OneOf = Annotated[Any, PlainValidator(_one_of), WithJsonSchema(_LIST | {"minItems": 1})]
Name = Annotated[str, Field(min_length=1, max_length=128)]
FeatureMap = Annotated[dict[Name, Value], Field(max_length=FEATURES), BeforeValidator(_few)]
Id = Annotated[str, Field(min_length=1, max_length=ID_LENGTH)]
Bid = Annotated[float, Field(ge=0, le=1e9)]
Multiplier = Annotated[float, Field(ge=0, le=1000)]
BidType = Literal["cpm", "cpc", "cpa"]
RequestId = Annotated[str, Field(pattern=r"^[\x21-\x7e]{1,128}$")]


class Wire(BaseModel):
    """Strict, closed and finite: what is not described here is refused by name."""

    # Ids are too many to be found in pydantic's cache of strings: each would only push another one out of it.
    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, frozen=True, cache_strings="keys", use_attribute_docstrings=True
    )


class Behaviour(Wire):
    """An ad that the user clicked."""

    ad_id: Id
    """Which."""
    ts: Annotated[int, Field(ge=0, lt=10**11)] | None = None
    """When, in seconds, not milliseconds, since 1970; a model that is given ages takes one without for older than all others."""


class User(Wire):
    """Who is asked for. Features replace the stored ones name by name, a history replaces the stored history as a whole."""

    id: Id
    """Their id in the store, in the log and among a model's features."""
    features: FeatureMap = {}
    """By the schema's names; null is missing."""
    history: Annotated[list[Behaviour], Field(max_length=HISTORY_LIMIT, fail_fast=True)] | None = None
    """The ads that they clicked, oldest first: `{"ad_id": …, "ts": …}`."""


class Candidate(Wire):
    """An ad to rank; where there is nothing to say but its id, candidates may be a list of ids."""

    ad_id: Id
    """Its id in the catalogue; one that the catalogue lacks is ranked too, and marked `known: false`."""
    bid: Bid | None = None
    """What it pays for a click, or what `bid_type` says, to 6 decimals of the currency; for `objective: ecpm`."""
    bid_type: BidType | None = None
    """What the bid is for: `cpm`, a thousand impressions; `cpc`, a click, which is the default; `cpa`, a conversion, of models that predict
    it."""
    value: Bid | None = None
    """What a click on it is worth to you, or with `cpa` a conversion, to 6 decimals; for `objective: value`."""
    multiplier: Multiplier | None = None
    """What the bid is multiplied by, to 6 decimals, for the ad server's pacing: all that is said of a bid is said of the product."""
    features: FeatureMap | None = None
    """In place of the catalogue's, name by name; null is missing."""


class CandidateColumns(Wire):
    """The candidates as columns of equal length, the quickest form where there is more to say than ids."""

    ad_id: Annotated[list[Id], Field(min_length=1, max_length=CANDIDATES, fail_fast=True)]
    """Of each."""
    bid: Annotated[list[Bid | None], Field(max_length=CANDIDATES, fail_fast=True)] | None = None
    """Of each; null for those without."""
    bid_type: Annotated[list[BidType | None], Field(max_length=CANDIDATES, fail_fast=True)] | None = None
    """Of each; null is `cpc`."""
    value: Annotated[list[Bid | None], Field(max_length=CANDIDATES, fail_fast=True)] | None = None
    """Of each; null for those without."""
    multiplier: Annotated[list[Multiplier | None], Field(max_length=CANDIDATES, fail_fast=True)] | None = None
    """Of each; null is 1."""
    features: Annotated[list[FeatureMap | None], Field(max_length=CANDIDATES, fail_fast=True)] | None = None
    """Of each; null for those without."""


class ExploreGreedy(Wire):
    """The best first."""

    policy: Literal["greedy"]
    """This one, whatever the service's setting is."""


class ExploreEpsilonGreedy(Wire):
    """At each place the best ad that is left, but with the probability `epsilon` any one of those left."""

    policy: Literal["epsilon_greedy"]
    """This one."""
    epsilon: Annotated[float, Field(ge=0, le=1)]
    """The share of places that are drawn."""


class ExplorePlackettLuce(Wire):
    """At each place one of the ads left, in proportion to what it is ordered by ** (1 / `temperature`)."""

    policy: Literal["plackett_luce"]
    """This one."""
    temperature: Annotated[float, Field(ge=COLDEST, le=HOTTEST)]
    """The higher, the more is left to chance; towards 0 it is greedy."""


class ExploreThompson(Wire):
    """At each of the first 20 places one of the ads left, each as likely as it is the best for all that training could tell: ads that were
    seldom shown are tried. Their propensities are integrals, which take about half a millisecond a place with 200 candidates; of more
    than 1,000 it is refused.
    """

    policy: Literal["thompson"]
    """This one."""


def _known_policy(explore: object) -> str | None:
    named = explore.get("policy") if isinstance(explore, dict) else getattr(explore, "policy", None)
    return named if named in ("greedy", "epsilon_greedy", "plackett_luce", "thompson") else None


_POLICIES = "an object with policy: greedy, epsilon_greedy (and epsilon), plackett_luce (and temperature), or thompson"
Explore = Annotated[
    Annotated[ExploreGreedy, Tag("greedy")]
    | Annotated[ExploreEpsilonGreedy, Tag("epsilon_greedy")]
    | Annotated[ExplorePlackettLuce, Tag("plackett_luce")]
    | Annotated[ExploreThompson, Tag("thompson")],
    Discriminator(_known_policy, custom_error_type="no_such_policy", custom_error_message=f"expected {_POLICIES}"),
]


class Diversity(Wire):
    """Maximal marginal relevance: each place gets the ad with the most of trade_off · worth + (1 - trade_off) · (1 - likeness), where worth
    is what ads are ordered by, as a share of the best ad's, and likeness that to the ad above that is most like it.
    """

    trade_off: Annotated[float, Field(ge=0, le=1)]
    """1: by worth alone; 0: by what differs alone."""
    by: Annotated[list[Name], Field(min_length=1, max_length=8)]
    """Categories of ads, such as `category`: two ads are alike in the share of them that have the same value."""


class RankRules(Wire):
    """What holds for the ads of the answer. Features are categories of ads by the schema's names; an ad that has no value of one is free of
    its rules. An ad that falls is in `omitted`, with the rule that keeps it from the next place as its reason. Places times candidates are
    at most 1,048,576, but for `frequency` and `already_clicked` alone.
    """

    max_per: Annotated[dict[Name, Annotated[int, Field(ge=1, le=CANDIDATES)]], Field(max_length=8)] = {}
    """At most so many ads of one value, by feature: `{"advertiser": 2}`; the others are omitted as `max_per_advertiser`."""
    distance: Annotated[dict[Name, Annotated[int, Field(ge=2, le=1_000)]], Field(max_length=8)] = {}
    """From an ad to the next with the same value it is at least so many places, by feature; 2: never side by side. What then finds no
    place is omitted as `distance_` and the feature."""
    diversity: Diversity | None = None
    """Order by worth and difference."""
    pinned: Annotated[dict[Annotated[str, Field(pattern=r"^[1-9][0-9]{0,4}$")], Id], Field(max_length=100)] = {}
    """Candidates by the place where they stand whatever they are worth: `{"1": "a7"}`. No floor, reserve or rule holds for them, but they
    count in the rules for others; they have no price."""
    reserves: Annotated[list[Bid], Field(max_length=1_000)] = []
    """The least eCPM at each place, the last for all further ones; where no ad reaches it the answer ends, and the others are omitted as
    `below_reserve`. Beside `reserve`, which holds for all places."""
    frequency: Annotated[dict[Name, Annotated[int, Field(ge=1, le=1_000)]], Field(max_length=8)] = {}
    """About how often at most an ad is shown to the user in a window, by the model's counter of that, `by = ["user", "ad_id"]`:
    `{"seen_1d": 3}`; those above it are omitted as `frequency_seen_1d`."""
    already_clicked: bool = False
    """Omit ads that are among the user's behaviours, as `already_clicked`."""


Arm = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")]


class Options(Wire):
    """How to rank."""

    model: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    """The name of the model to rank with; without it the service's default."""
    version: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    """The version of it to rank with, of those that are loaded: the live one, or a canary or shadow, whoever the user is, and no other if
    it fails. Such a ranking is a trial: it is not logged, whatever is shown, and counts for no challenger's judgement."""
    top_k: Annotated[int, Field(ge=1, le=CANDIDATES)] | None = None
    """Answer with the first so many; the others are in `omitted`. Without `shown` it says that so many are shown. With the candidates
    `all` it must be there."""
    retrieve: Annotated[int, Field(ge=1, le=CANDIDATES)] | None = None
    """With the candidates `all`: of those that pass the filters so many are ranked, the nearest to the request's vector by a model that has
    vectors (docs/retrieval.md); the others are counted as `not_retrieved`. Without it all are ranked."""
    shown: Annotated[int, Field(ge=0, le=CANDIDATES)] | None = None
    """How many ads of the answer, from the first, are shown; 0: what is shown will be reported. Only what is said so, or reported by an
    impression event, is trained on."""
    objective: Literal["pctr", "ecpm", "value", "weighted"] = "pctr"
    """Order by p(click); by eCPM, what a thousand impressions pay (1,000 · p(click) · bid, with `cpa` 1,000 · p(conversion) · bid, with
    `cpm` the bid), for which every candidate needs a bid; by what they are worth (1,000 · p · `value`), for which every candidate needs
    one; or by the sum of p(head) · weight over the heads of the service's setting `weights`."""
    min_score: Annotated[float, Field(ge=0, le=1)] | None = None
    """The least p(click) of an ad; those below are in `omitted` as `below_floor`."""
    reserve: Bid | None = None
    """The least eCPM of an ad, what a thousand impressions are to pay, to 6 decimals; those below are in `omitted` as `below_reserve`."""
    prices: bool = False
    """With `objective: ecpm`, say of each ad what it has to pay for what it bids for, by the generalised second price: the least bid with
    which its eCPM would reach that of the best ad below it, or the reserve. Nothing is charged here."""
    rules: RankRules | None = None
    """What holds for the ads of the answer after they are scored: how many alike, how far apart, how different, which where."""
    explain: bool = False
    """Answer too with what the model was given, the user's features and behaviours and each ad's features, and with what it made of it:
    each behaviour's weight and what each field added to the logit, of networks that have such (docs/models.md)."""
    unknown_ads: Literal["rank", "omit"] = "rank"
    """What becomes of an ad that the catalogue does not have and that comes without a feature that is not null: `rank` puts it
    among the others, about in the middle; `omit` leaves it out, into `omitted` as `unknown_ad`."""
    explore: Explore | None = None
    """Rank by chance, and say with which probability; without it the service's setting counts."""
    deadline_ms: Annotated[float, Field(gt=0, le=60_000)] | None = None
    """From the arrival of the request; a ranking that has not been scored by then is answered with 504."""


_IDS = Annotated[list[Id], Field(min_length=1, max_length=CANDIDATES, fail_fast=True), Tag("ids")]
_ROWS = Annotated[list[Candidate], Field(min_length=1, max_length=CANDIDATES, fail_fast=True), Tag("rows")]
_ALL = Annotated[Literal["all"], Tag(ALL)]
Candidates = Annotated[_IDS | _ROWS | Annotated[CandidateColumns, Tag("columns")] | _ALL, Discriminator(_form)]
Filters = Annotated[dict[Name, _OneOf], Field(max_length=FEATURES), BeforeValidator(_few)]


class RankRequest(Wire):
    """A user and the ads to rank for them."""

    model_config = ConfigDict(json_schema_extra={"examples": [OF_ALL]})

    request_id: RequestId | None = None
    """Comes back in the answer and stands in the log, for events to name; made up where it is not sent. Never the same for two rankings."""
    user: User
    """Who the ads are ranked for."""
    context: FeatureMap = {}
    """Features of the request, by the schema's names: page, slot, device, time."""
    candidates: Candidates
    """The ads: a list of ids, a list of objects, an object of columns, or `all`, the active ads of the catalogue that pass the filters."""
    filters: Filters = {}
    """With the candidates `all`: by category or list of ads, values of which an ad must have one: `{"category": ["travel", "food"]}`."""
    options: Options = Options()
    """How to rank."""
    experiment: Annotated[dict[Arm, Arm], Field(max_length=8)] = {}
    """The arm of each experiment that the user is in: `{"button": "green"}`, of those in the service's setting `experiments`. It changes
    nothing here: it stands in the log and in the metrics (docs/experiments.md)."""


class ModelFacts(Wire):
    """The model that ranked; `schema` is the fingerprint of its features."""

    name: str
    version: str
    fingerprint: Annotated[str, Field(alias="schema")]


class AdAnswer(Wire):
    """A ranked ad. `ecpm` is there where it bids, in whole millionths; `score` is what ads are ordered by with the objectives `value` and
    `weighted`; `price` is there where the request asked for `prices`. `known` is there, and false, for an ad that the catalogue does not
    have; `propensity` where the ranking explored: the probability with which the policy puts this ad at this place, given the ads above
    it. The last three are there where the request
    said `explain`: `explain` is what the model was given, and what it made of it are `attention`, the weight of each behaviour, oldest
    first, and `contributions`, what fields, pairs of fields and the `rest` add to the logit before calibration.
    """

    ad_id: str
    rank: int
    p_click: float
    ecpm: float | None = None
    score: float | None = None
    price: float | None = None
    propensity: float | None = None
    known: bool = True
    explain: dict[str, Any] | None = None
    attention: list[float] | None = None
    contributions: dict[str, float] | None = None


class OmittedAnswer(Wire):
    """A candidate that is not ranked, and why."""

    ad_id: str
    reason: (
        Literal["already_clicked", "below_floor", "below_reserve", "duplicate", "not_scored", "top_k", "unknown_ad"]
        | Annotated[str, Field(pattern="^(max_per|distance|frequency)_")]
    )


class DegradedAnswer(Wire):
    """Something the ranking did without."""

    stage: str
    reason: str
    fallback: str


class RankAnswer(Wire):
    """The ads, best first. Each candidate is in `ads` or in `omitted`, once; with the candidates `all`, `omitted` is empty and
    `omitted_by_reason` says how many ads of the catalogue are not in `ads`, and why: the reasons of `omitted`, `filtered` and
    `not_retrieved`. `explain` has what the model was given of `user`, `context` and `history`, and a `notice`, a sentence, where not all
    ads could be explained.
    """

    request_id: str
    model: ModelFacts
    ads: list[AdAnswer]
    omitted: list[OmittedAnswer]
    omitted_by_reason: dict[str, int] | None = None
    degraded: list[DegradedAnswer]
    timings_ms: dict[str, float]
    explain: dict[str, Any] | None = None


class ErrorAnswer(Wire):
    """One thing wrong: a JSON pointer into the request, and what is wrong there."""

    pointer: str
    detail: str


class Problem(Wire):
    """An error, as RFC 9457 has it."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str
    errors: list[ErrorAnswer]


_ranks: list[bytes] = []


def answer(request_id: str, ranking: Ranking, stages: RequestTimings) -> bytes:
    """The ranking as the JSON of a `RankAnswer`; `ads` goes from columns to bytes, without an object for each ad."""
    timed = [*TIMED, *(["explain"] if "explain" in stages.seconds else [])]
    seconds = {**{name: stages.seconds.get(name, 0.0) for name in timed}, "total": stages.total}
    before = {"request_id": request_id, "model": ranking.model.facts()}
    after: dict[str, Any] = {
        "omitted": [{"ad_id": ad_id, "reason": reason} for ad_id, reason in ranking.omitted],
        "degraded": [entry._asdict() for entry in ranking.degraded],
        "timings_ms": {name: round(spent * 1000, 3) for name, spent in seconds.items()},
    }
    if ranking.omitted_by_reason is not None:
        after["omitted_by_reason"] = ranking.omitted_by_reason
    if ranking.seen is not None:
        after["explain"] = ranking.seen
    return b"".join((orjson.dumps(before)[:-1], b',"ads":[', *_ads(ranking), b"],", orjson.dumps(after)[1:]))


def _ads(ranking: Ranking) -> list[bytes]:
    """The pieces of the array: for each ad what stands between two ads, its id, its rank, and its numbers."""
    count = len(ranking.ad_ids)
    if not count:
        return []
    while len(_ranks) < count:
        _ranks.append(b'","rank":%d,"p_click":' % (len(_ranks) + 1))
    pieces = [b'},{"ad_id":"'] * (4 * count)
    pieces[0] = b'{"ad_id":"'
    pieces[1::4] = _escaped(ranking.ad_ids)
    pieces[2::4] = _ranks[:count]
    pieces[3::4] = _numbers(ranking)
    return [*pieces, b"}"]


def _numbers(ranking: Ranking) -> list[bytes]:
    """What an ad says after its rank. All of it but p_click is there for some rankings only."""
    texts = _listed(ranking.p_click)
    columns = {"ecpm": ranking.ecpm, "score": ranking.score, "price": ranking.price, "propensity": ranking.propensity}
    for name, column in columns.items():
        if column is not None:
            said = b',"%s":' % name.encode()
            texts = [text if each == b"null" else text + said + each for text, each in zip(texts, _listed(column), strict=True)]
    if ranking.known is not None:
        texts = [text if known else text + b',"known":false' for text, known in zip(texts, ranking.known, strict=True)]
    if ranking.ads_seen is not None:
        texts = [b'%s,"explain":%s' % (text, orjson.dumps(seen)) for text, seen in zip(texts, ranking.ads_seen, strict=True)]
    if ranking.why:
        texts[: len(ranking.why)] = [b"%s,%s" % (text, orjson.dumps(why)[1:-1]) for text, why in zip(texts, ranking.why, strict=False)]
    return texts


def _listed(numbers: Sequence[float | None]) -> list[bytes]:
    return orjson.dumps(numbers)[1:-1].split(b",")


def _escaped(texts: Sequence[str]) -> list[bytes]:
    """Each as JSON, without its quotes."""
    together = orjson.dumps(texts)
    if b"\\" not in together:  # nothing had to be escaped, so no text holds a quote
        return together[2:-2].split(b'","')
    return [orjson.dumps(text)[1:-1] for text in texts]
