from dataclasses import replace

import bundles
import numpy as np
import pytest
from msgspec import msgpack

from features.encode import AdTable, Request, encode_request
from features.events import Event, pack_event, unpack_event
from features.packing import StateError
from features.served import ServedRecord, pack_served, unpack_served
from features.state import pack_features

ADS = {ad_id: pack_features(features) for ad_id, features in bundles.ADS.items()}
SERVED = ServedRecord(
    request_id="r1",
    ts=1_763_800_000.25,
    model="din",
    version=20261122101500,
    user_id="u1",
    user={"age": "25", "interests": ["news"], "income": 9.5},
    context={"slot": "feed"},
    history=["a3", "gone", "never"],
    ad_ids=["a1", "new", "gone"],
    p_click=[0.5, 0.25, 0.125],
    propensity=[1.0, 1.0, 1.0],
    ads={"a1": ADS["a1"], "a3": ADS["a3"], "gone": ADS["a4"]},
    sent={"new": {"genre": "news"}, "a1": {"price": 3.5}},
    unknown=["new", "gone"],
)


BIDDING = replace(SERVED, objective="ecpm", bids=[10**15, -1, 0], bid_types=["cpa", "cpc", "cpm"], prices=[3, 0, 0])


@pytest.mark.parametrize(("served", "form"), [(SERVED, 2), (BIDDING, 4), (replace(SERVED, objective="weighted"), 4)])
def test_a_served_ranking_packed_and_unpacked_is_the_same(served: ServedRecord, form: int) -> None:
    assert msgpack.decode(pack_served(served))[0] == form  # readers of before know the first two, which most rankings are
    again = unpack_served(pack_served(served))
    assert again == ServedRecord(**{name: getattr(again, name) for name in again.__slots__})
    assert [getattr(again, name) for name in again.__slots__] == [
        list(value) if isinstance(value := getattr(served, name), tuple) else value for name in again.__slots__
    ]


def test_it_encodes_as_the_service_encoded_it() -> None:
    encoder = bundles.encoder()
    table = AdTable(encoder)
    for ad_id, source in (("a1", "a1"), ("a3", "a3"), ("gone", "a4"), ("another", "a5")):
        table.put([ad_id], encoder.encode_one("ad", bundles.ADS[source], ad_id))
    table.remove(["gone"])
    sent = {0: {"price": 3.5}, 1: {"genre": "news"}}
    request = Request("u1", SERVED.user, SERVED.context, SERVED.history, SERVED.ad_ids, sent)
    expected, known = encode_request(table, request)
    assert known.tolist() == [True, False, False]
    feeds = unpack_served(pack_served(SERVED)).feeds(encoder)
    assert feeds.keys() == expected.keys()
    for name, tensor in expected.items():
        assert np.array_equal(feeds[name], tensor), name


def test_the_ads_to_encode_can_be_chosen() -> None:
    feeds = SERVED.feeds(bundles.encoder(), ["new", "a1"])
    assert np.array_equal(feeds["ad_ids"][0, ::-1], SERVED.feeds(bundles.encoder())["ad_ids"][0, :2])


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"\xc1",
        msgpack.encode(None),
        msgpack.encode([1]),
        msgpack.encode([3, *msgpack.decode(pack_served(SERVED))[1:]]),
        msgpack.encode([1, *msgpack.decode(pack_served(SERVED))[1:]]),
        pack_served(SERVED)[:-1],
        pack_served(replace(SERVED, shown=len(SERVED.ad_ids) + 1)),
        pack_served(replace(SERVED, shown=-1)),
        pack_served(replace(BIDDING, bids=[1])),
        pack_served(replace(BIDDING, prices=[1])),
        pack_served(replace(BIDDING, candidates=["a1", "a2"])),
    ],
)
def test_what_is_no_served_ranking_is_refused(value: bytes) -> None:
    with pytest.raises(StateError):
        unpack_served(value)


def test_a_record_from_before_it_said_what_is_shown_says_nothing() -> None:
    said = replace(SERVED, shown=1)
    old = msgpack.encode([1, *msgpack.decode(pack_served(said))[1:-1]])
    assert unpack_served(pack_served(said)).shown == 1
    assert unpack_served(old) == unpack_served(pack_served(replace(said, shown=0)))


def test_columns_of_different_length_are_refused() -> None:
    document = msgpack.decode(pack_served(SERVED))
    document[10] = [0.5]
    with pytest.raises(StateError, match="differ in length"):
        unpack_served(msgpack.encode(document))


CLICK = Event("click", "e1", 1_763_800_001, "u1", "r1", "a1")


@pytest.mark.parametrize(
    "event",
    [
        CLICK,
        Event("impression", "e2", 1.5, request_id="r1", ad_id="a1", position=3),
        Event("conversion", "e3", 2, "u1", "r1", "a1", value=0.0),
        Event("user", "e4", 3, "u1", features={"age": "25", "income": None}),
        Event("ad", "e5", 4, ad_id="a1", features={"price": 1.0}, active=False),
    ],
)
def test_an_event_packed_and_unpacked_is_the_same(event: Event) -> None:
    assert unpack_event(pack_event(event)) == event
    assert event.entity_id == {"impression": "r1", "conversion": "r1", "ad": "a1"}.get(event.type, "u1")


@pytest.mark.parametrize(
    "document",
    [None, [], {}, {"type": "click"}, {"type": "view", "event_id": "e", "ts": 1}, {"type": "click", "event_id": "e", "ts": "1"}, {"a": 1}],
)
def test_what_is_no_event_is_refused(document: object) -> None:
    with pytest.raises(StateError):
        unpack_event(msgpack.encode(document))
    with pytest.raises(StateError):
        unpack_event(b"\xc1")
