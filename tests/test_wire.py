"""An answer is, byte for byte, the JSON that a serialiser makes of the same objects."""

import json
from types import SimpleNamespace

import numpy as np
import pydantic_core
from hypothesis import given
from hypothesis import strategies as st

from service.api.wire import TIMED, RankAnswer, answer
from service.ranking.placing import shortest
from service.ranking.query import Degraded, Ranking
from service.telemetry.metrics import RequestTimings

IDS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=6) | st.sampled_from(['a",', '"', "\\", "\u0000", "\u2028", "😀", 'x","y'])
BIDS = st.none() | st.floats(0, 1e9)
SCORES = st.floats(0, 1, width=32)
ADS = st.lists(st.tuples(IDS, SCORES, BIDS, st.booleans()), max_size=12)


def plainly(ranking: Ranking, timings: dict[str, float]) -> bytes:
    ads = []
    for place, ad_id in enumerate(ranking.ad_ids):
        ad = {"ad_id": ad_id, "rank": place + 1, "p_click": ranking.p_click[place]}
        for name in ("ecpm", "score", "price"):
            if (column := getattr(ranking, name)) is not None and column[place] is not None:
                ad[name] = column[place]
        if ranking.propensity is not None:
            ad["propensity"] = ranking.propensity[place]
        if ranking.known is not None and not ranking.known[place]:
            ad["known"] = False
        if ranking.ads_seen is not None:
            ad["explain"] = ranking.ads_seen[place]
        ad |= dict(ranking.why[place]) if place < len(ranking.why) else {}
        ads.append(ad)
    omitted = [{"ad_id": ad_id, "reason": reason} for ad_id, reason in ranking.omitted]
    degraded = [entry._asdict() for entry in ranking.degraded]
    document = {
        "request_id": "r1",
        "model": ranking.model.facts(),
        "ads": ads,
        "omitted": omitted,
        "degraded": degraded,
        "timings_ms": timings,
    }
    return pydantic_core.to_json(document if ranking.seen is None else {**document, "explain": ranking.seen})


@given(ADS, st.booleans(), st.booleans(), st.booleans(), st.booleans(), st.lists(st.tuples(IDS, st.just("top_k")), max_size=2))
def test_the_bytes_are_those_of_the_objects(ads, with_bids, with_known, explained, explored, omitted):
    scores = np.array([ad[1] for ad in ads], np.float32)
    clicks = shortest(scores)
    degraded = [Degraded("user", "store_timeout", "sent_features")] if with_known else []
    model = SimpleNamespace(facts=lambda: {"name": "din", "version": "1", "schema": "f"})
    encoded = SimpleNamespace(model=model, degraded=degraded)
    ranking = Ranking(
        encoded,
        np.arange(len(ads)),
        [ad[0] for ad in ads],
        clicks,
        [None if ad[2] is None else click * ad[2] * 1000 for ad, click in zip(ads, clicks, strict=True)] if with_bids else None,
        [ad[3] for ad in ads] if with_known else None,
        omitted,
        {"user": {"age": 3}} if explained else None,
        [{"ad_id": i, "price": 0.5} for i in range(len(ads))] if explained else None,
        [place / 8 for place in range(len(ads))] if explained else None,
        [place / 4 for place in range(len(ads))] if with_bids else None,
        [1 / (place + 3) for place in range(len(ads))] if explored else None,
        [{"attention": [0.5, -1.0], "contributions": {"ad.genre": 0.25, "rest": float(place)}} for place in range(len(ads) // 2)]
        if explained
        else (),
    )
    body = answer("r1", ranking, RequestTimings("/rank"))
    timings = json.loads(body)["timings_ms"]
    assert list(timings) == [*TIMED, "total"]
    assert body == plainly(ranking, timings)
    RankAnswer.model_validate_json(body)


@given(st.lists(SCORES, min_size=1))
def test_a_probability_is_the_shortest_decimal_of_its_float32(scores):
    given_scores = np.array(scores, np.float32)
    assert shortest(given_scores) == [float(str(score)) for score in given_scores]
    assert np.array_equal(np.array(shortest(given_scores), np.float32), given_scores)
