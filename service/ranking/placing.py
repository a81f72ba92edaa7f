"""From scores to a ranking: what candidates are worth, which of them may stand in the answer, and in which order."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import orjson

from features.encode import Mask
from features.policy import EpsilonGreedy, Policy, Thompson
from features.schema import IDENTITY
from features.state import unpack_features
from features.vocabulary import UNKNOWN, Ids, Numbers

from .bids import ABSENT, CLICK, CONVERSION, CPM, Bids, Floats, Worth, best_below, from_micros, second_prices, worth_of
from .explain import explain_ad, explain_request
from .ordering import arrange, best_first
from .query import Degraded, Encoded, Ranking, check_counters
from .rules import Filling, Placed

OTHER = 2**40
"""Numbers of values from here on are no ids of a vocabulary."""


def ranked(encoded: Encoded, scores: Numbers, random: np.random.Generator) -> Ranking:
    """Ads best first, or as the policy drew them, within the rules; the others omitted, and why. Ties go by ad id."""
    query, ad_ids, repeated = encoded.query, encoded.request.candidates, encoded.repeated
    heads = scores[None] if scores.ndim == 1 else scores.T
    finite: Mask = np.isfinite(heads[0]) if len(heads) == 1 else np.logical_and.reduce(np.isfinite(heads))
    if np.count_nonzero(finite) < len(finite):
        encoded.degraded.append(Degraded("inference", "not_finite", "omitted"))
        heads = np.where(finite, heads, np.float32(0))
    plain = query.bids is None and not query.weights and query.min_score is None and query.policy is None
    p = {name: np.array(shortest(head), np.float64) for name, head in zip(encoded.model.scorer.heads, () if plain else heads, strict=False)}
    bids = query.bids if query.bids is None or repeated is None else query.bids.take(repeated)
    worth, rankable = worth_of(query.objective, bids, p, query.weights, heads[0]), _rankable(encoded)
    rows, low = _fit(encoded, finite & rankable, p, worth)
    best = best_first(rows, worth.by, ad_ids)
    placed = _placed(encoded, best, worth, _policy(encoded, p, best, bids), random)
    kept = placed.order
    places, known = kept.tolist(), encoded.known.take(kept)
    omitted = [] if repeated is None else [(ad_id, "duplicate") for ad_id in _others(query.ad_ids, repeated)]
    by_reason = None if query.selection is None else dict(query.passed_over)
    if len(places) < len(ad_ids):
        without = {"unknown_ad": ~rankable, "not_scored": rankable & ~finite, **low}
        fallen = [*((reason, those.nonzero()[0]) for reason, those in without.items()), *placed.fallen.items()]
        if by_reason is None:
            omitted += [(ad_ids[row], reason) for reason, those in fallen for row in those.tolist()]
        else:
            by_reason |= {reason: len(those) for reason, those in fallen if len(those)}
    ranking = Ranking(
        encoded,
        rows,
        list(map(ad_ids.__getitem__, places)),
        shortest(heads[0].take(kept)),
        None if worth.ecpm is None else from_micros(worth.ecpm.take(kept)),
        None if np.count_nonzero(known) == len(known) else known.tolist(),
        omitted,
        propensity=None if query.policy is None or placed.propensity is None else placed.propensity.tolist(),
        bids=bids,
        kept=kept,
        p_conversion=p[CONVERSION].take(kept).tolist() if CONVERSION in p else None,
        omitted_by_reason=by_reason,
    )
    if query.objective in ("value", "weighted"):
        ranking.score = from_micros(worth.by.take(kept)) if query.objective == "value" else worth.by.take(kept).tolist()
    if query.prices:
        reserves = [max(query.reserve or 0, each) for each in (query.rules.reserves if query.rules else ()) or (0,)]
        ranking.price = from_micros(second_prices(worth, kept, placed.below, reserves))
    if query.explain:
        encoder = encoded.model.bundle.encoder
        ranking.seen = explain_request(encoder, encoded.feeds, encoded.behaviours)
        ranking.ads_seen = [explain_ad(encoder, encoded.feeds, row) for row in places]
    return ranking


def _fit(encoded: Encoded, fit: Mask, p: Mapping[str, Floats], worth: Worth) -> tuple[Ids, dict[str, Mask]]:
    """Which of the candidates that can be ranked may have a place, or are pinned; the others by the cap or floor that keeps them out."""
    query, low = encoded.query, _had(encoded)
    if not low and query.min_score is None and query.reserve is None:
        return fit.nonzero()[0], low
    if query.min_score is not None:
        low["below_floor"] = fit & (p[CLICK] < query.min_score)
    if query.reserve is not None and worth.ecpm is not None:
        low["below_reserve"] = fit & (worth.ecpm < query.reserve)
    pinned = list(_pinned(encoded).values()) if query.rules else []
    for reason, those in low.items():
        those[pinned] = False
        low[reason] = those & fit
        fit = fit & ~those
    return fit.nonzero()[0], low


def _policy(encoded: Encoded, p: Mapping[str, Floats], best: Ids, bids: Bids | None) -> Policy | None:
    """The query's policy for rows that stand best first; of p(click) a logit's deviation makes one of its logarithm.

    Where they are ordered by eCPM, that of an ad which pays by impressions is known.
    """
    policy = encoded.query.policy
    if not isinstance(policy, Thompson):
        return policy
    bundle = encoded.model.bundle
    if bundle.ad_deviations is None:  # of a canary: those that rank by default are asked before
        return EpsilonGreedy(0.0)
    column = next(slot.start for slot in bundle.encoder.layouts["ad"].ids if slot.field.name == IDENTITY["ad"])
    spread = (1 - p[CLICK].take(best)) * bundle.ad_deviations[encoded.feeds["ad_ids"][0, best, column]]
    if bids is not None and encoded.query.objective == "ecpm":
        spread = np.where(bids.kind.take(best) == CPM, 0.0, spread)
    return Thompson(spread)


def _had(encoded: Encoded) -> dict[str, Mask]:
    """The candidates that the user was shown too often, or has clicked, by the rule that keeps them out.

    Raises:
        InvalidError: the model that ranks has no such counter.
    """
    rules, request = encoded.query.rules, encoded.request
    if rules is None:
        return {}
    check_counters(rules, encoded.model)
    # Halfway to one more: at a steady rate that comes to as many in a window as are allowed.
    had = dict[str, Mask]()
    if request.counted is not None:
        columns = dict(zip(encoded.model.bundle.encoder.counted, request.counted, strict=True))
        had = {f"frequency_{name}": columns[name] > most - 0.5 for name, most in rules.frequency.items()}
    if rules.already_clicked:
        clicked = set(request.history)
        had["already_clicked"] = np.fromiter((ad_id in clicked for ad_id in request.candidates), np.bool_, len(request.candidates))
    return had


def _placed(encoded: Encoded, best: Ids, worth: Worth, policy: Policy | None, random: np.random.Generator) -> Placed:
    """Rows that stand best first, at places."""
    query = encoded.query
    if query.rules is None or not query.rules.by_place:
        order, propensity = arrange(best, worth.by, policy, query.top_k, random)
        below = best_below(worth, order)[: query.top_k] if query.prices else []
        return Placed(order[: query.top_k], propensity, below, {"top_k": order[query.top_k :]} if query.top_k else {})
    codes = {name: _codes(encoded, name).take(best) for name in query.rules.features}
    at = {row: number for number, row in enumerate(best.tolist())}
    pins = {place: at[row] for place, row in _pinned(encoded).items() if row in at}
    ecpm = np.zeros(len(best), np.int64) if worth.ecpm is None else worth.ecpm.take(best)
    filling = Filling(query.rules, worth.by.take(best).astype(np.float64), ecpm, codes, pins)
    placed = filling.fill(min(query.top_k or len(best), len(best)), policy, random)
    return placed._replace(order=best.take(placed.order), fallen={reason: best.take(those) for reason, those in placed.fallen.items()})


def _pinned(encoded: Encoded) -> dict[int, int]:
    """The request's candidates that are pinned, by place."""
    pinned = {} if encoded.query.rules is None else encoded.query.rules.pinned
    return {place: encoded.request.candidates.index(ad_id) for place, ad_id in pinned.items()}


def _codes(encoded: Encoded, name: str) -> Ids:
    """What each candidate has of a feature, as numbers; below 0 where it has nothing. Values that are no others' in the vocabulary may be
    several, or share a bucket, so those are told apart by themselves.
    """
    encoder = encoded.model.bundle.encoder
    slot = next(slot for slot in encoder.layouts["ad"].ids if slot.field.name == name)
    codes = encoded.feeds["ad_ids"][0, :, slot.start].copy()
    unsure = np.flatnonzero(codes <= UNKNOWN) if not slot.field.buckets else np.arange(len(codes))
    ad_ids = [encoded.request.candidates[row] for row in unsure.tolist()]
    packed, values = encoded.view.features(ad_ids), dict[Any, int]()
    for row, ad_id in zip(unsure.tolist(), ad_ids, strict=True):
        stored = unpack_features(packed[ad_id]) if encoded.known[row] else {}
        said = {name: encoded.request.sent.get(row, {}).get(name, stored.get(name))}
        value = encoder.usable("ad", said)[0].get(name)
        codes[row] = ABSENT if value is None else OTHER + values.setdefault(value, len(values))
    return codes


def _rankable(encoded: Encoded) -> Mask:
    """Which candidates may be ranked: all but those of which nothing is known, where the request wants those omitted.

    While the catalogue has not been read, no ad can be told from an unknown one: then all are ranked, as `degraded` says.
    """
    if encoded.query.unknown_ads == "rank" or any(entry.stage == "catalogue" for entry in encoded.degraded):
        return np.ones(len(encoded.known), np.bool_)
    rankable = encoded.known.copy()
    rankable[[row for row, features in encoded.request.sent.items() if any(value is not None for value in features.values())]] = True
    return rankable


def _others(ad_ids: Sequence[str], ranked: Sequence[int]) -> list[str]:
    places = set(ranked)
    return [ad_id for i, ad_id in enumerate(ad_ids) if i not in places]


def shortest(scores: Numbers) -> list[float]:
    """The shortest decimals that are these finite float32."""
    decimals: list[float] = orjson.loads(orjson.dumps(np.ascontiguousarray(scores), option=orjson.OPT_SERIALIZE_NUMPY))
    return decimals
