import contextlib
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import msgpack

from features.packing import StateError
from features.state import (
    FEATURES_LIMIT,
    HISTORY_LIMIT,
    Ad,
    UserState,
    pack_ad,
    pack_features,
    pack_user,
    unpack_ad,
    unpack_features,
    unpack_user,
)
from tests.test_datasets import patient

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
whole = st.integers(-(2**63), 2**64 - 1)
features = st.dictionaries(texts, st.none() | texts | whole | st.floats(allow_nan=False) | st.lists(texts, max_size=3), max_size=4)
histories = st.lists(st.tuples(texts, whole), max_size=20)
clicks = st.lists(st.tuples(texts, st.integers(0, 5) | st.floats(0, 5)), max_size=12)
updates = st.lists(st.tuples(features, st.integers(0, 5)), max_size=6)
STATE = UserState({"age": "25", "income": 1.5, "interests": ["a", "b"]}, ["a1", "a2"], [1, 2])


@patient
@given(texts, features, histories)
def test_a_state_packed_and_unpacked_is_the_same(user_id: str, known: dict[str, object], history: list[tuple[str, int]]) -> None:
    state = UserState(known, [ad_id for ad_id, _ in history], [ts for _, ts in history])
    again = unpack_user(user_id, pack_user(user_id, state))
    assert again == state
    assert [type(value) for value in again.features.values()] == [type(value) for value in known.values()]


@patient
@given(texts, features, st.booleans())
def test_an_ad_packed_and_unpacked_is_the_same(ad_id: str, known: dict[str, object], active: bool) -> None:
    assert unpack_ad(ad_id, pack_ad(Ad(ad_id, known, active))) == Ad(ad_id, known, active)


def test_the_newest_behaviours_are_kept() -> None:
    count = HISTORY_LIMIT + 7
    state = unpack_user("u", pack_user("u", UserState({}, [f"a{i}" for i in range(count)], range(count))))
    assert len(state.ad_ids) == len(state.ts) == HISTORY_LIMIT
    assert (state.ad_ids[0], state.ad_ids[-1]) == ("a7", f"a{count - 1}")
    assert (state.ts[0], state.ts[-1]) == (7, count - 1)


def test_another_user_s_state_is_refused_and_not_named() -> None:
    value = pack_user("secret-user", STATE)
    assert unpack_user("secret-user", value) == STATE
    for other in ("u", "secret-user ", "SECRET-USER", ""):
        with pytest.raises(StateError, match="another user") as caught:
            unpack_user(other, value)
        assert "secret-user" not in str(caught.value)


@pytest.mark.parametrize(
    "document",
    [
        None,
        7,
        "text",
        {},
        [],
        [1, "u", {}, []],
        [2, "u", {}, [], []],
        [3, "u", {}, [], [], {}],
        [True, "u", {}, [], []],
        [2, "u", {}, [], [], []],
        [2, 3, {}, [], [], {}],
        [1, "u", {}, [], []],
        [2, "u", [], [], [], {}],
        [2, "u", {}, {}, [], {}],
        [2, "u", {}, ["a"], [], {}],
        [2, "u", {}, [3], [3], {}],
        [2, "u", {}, ["a"], ["x"], {}],
        [2, "u", {}, ["a"], [True], {}],
        [3, "u", {}, [], [], {}, []],
        [3, "u", {}, [], [], {}, {"click@60": {"a1": [1.0]}}],
        [3, "u", {}, [], [], {}, {"click@60": {"a1": [1.0, "x"]}}],
        [4, "u", {}, [], [], {}, {}],
    ],
)
def test_what_is_no_state_is_refused(document: object) -> None:
    with pytest.raises(StateError, match="user 'u'"):
        unpack_user("u", msgpack.encode(document))


@pytest.mark.parametrize(
    "document", [None, [], [1, True, {}], [1, True], [2, True, {}], [1, True, []], [2, True, {}, []], [True, True, {}], {"a": 1}]
)
def test_what_is_no_ad_is_refused(document: object) -> None:
    with pytest.raises(StateError, match="ad 'a1'"):
        unpack_ad("a1", msgpack.encode(document))


def test_a_value_cut_short_or_with_more_behind_it_is_refused() -> None:
    for value, unpack in ((pack_user("u", STATE), unpack_user), (pack_ad(Ad("u", {"price": 1.0})), unpack_ad)):
        for damaged in (*(value[:i] for i in range(len(value))), value + b"\0"):
            with pytest.raises(StateError):
                unpack("u", damaged)


@patient
@given(st.binary(max_size=40) | st.binary(max_size=40).map(lambda tail: b"\x95\x01\xa1u" + tail))
def test_damaged_bytes_are_a_state_error_or_a_state(value: bytes) -> None:
    for unpack in (unpack_user, unpack_ad):
        with contextlib.suppress(StateError):
            unpack("u", value)


@patient
@given(st.data())
def test_a_changed_byte_is_a_state_error_or_another_state_of_the_same_user(data: st.DataObject) -> None:
    value = bytearray(pack_user("u", STATE))
    for _ in range(data.draw(st.integers(1, 3))):
        value[data.draw(st.integers(0, len(value) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(StateError):
        state = unpack_user("u", bytes(value))
        assert len(state.ad_ids) == len(state.ts)
        assert all(isinstance(ad_id, str) for ad_id in state.ad_ids)
        assert isinstance(state.features, dict)


@patient
@given(clicks, st.randoms())
def test_clicks_land_in_their_place_by_time_in_whatever_order_they_come(behaviours: list[tuple[str, float]], random: Random) -> None:
    state, shuffled = UserState(), random.sample(behaviours, len(behaviours))
    for ad_id, ts in shuffled:
        state = state.clicked(ad_id, ts)
    assert list(zip(state.ad_ids, state.ts, strict=True)) == sorted(shuffled, key=lambda behaviour: behaviour[1])


@patient
@given(updates, st.randoms())
def test_of_each_feature_the_newest_word_holds_in_whatever_order_words_come(news: list[tuple[dict[str, Any], int]], random: Random) -> None:
    distinct = list({ts: (change, ts) for change, ts in news}.values())
    state, ad = UserState(), Ad("a", {})
    for change, ts in random.sample(distinct, len(distinct)):
        state, ad = state.updated(change, ts), ad.updated(change, None, ts)
    last: dict[str, Any] = {}
    for change, _ in sorted(distinct, key=lambda word: word[1]):
        last |= change
    expected = {name: value for name, value in last.items() if value is not None}
    assert (state.features, ad.features) == (expected, expected)
    again = unpack_user("u", pack_user("u", state))
    assert (again.features, again.changed) == (state.features, state.changed)


def test_an_ad_that_left_does_not_come_back_by_an_older_word() -> None:
    gone = Ad("a", {"price": 1.0}).updated({}, False, 10)
    assert not gone.updated({"price": 2.0}, True, 9).active
    assert gone.updated({"price": 2.0}, True, 9).features == {"price": 2.0}
    assert gone.updated({}, True, 11).active
    assert not gone.updated({"price": 3.0}, None, 12).active


def test_features_are_not_told_without_end() -> None:
    state = UserState().updated({str(i): "x" for i in range(FEATURES_LIMIT)}, 1)
    with pytest.raises(StateError, match="more than 256"):
        state.updated({"one more": "x"}, 2)
    more = state.updated({"never": None, "0": None}, 2).updated({"one more": "x"}, 3)
    assert more.features.keys() == {*state.features, "one more"} - {"0"}


def test_what_was_taken_away_is_not_remembered_without_end() -> None:
    state = UserState().updated({"kept": "x"}, 0)
    for ts in range(1, 2 * FEATURES_LIMIT):
        state = state.updated({f"name {ts}": None}, ts)
    assert len(state.changed) == FEATURES_LIMIT
    assert state.features == {"kept": "x"}
    assert state.updated({"kept": "older"}, -1).features == {"kept": "x"}
    assert state.updated({f"name {2 * FEATURES_LIMIT - 1}": "late"}, 5).features == {"kept": "x"}


@patient
@given(features)
def test_features_packed_and_unpacked_are_the_same(known: dict[str, object]) -> None:
    assert unpack_features(pack_features(known)) == known
    with pytest.raises(StateError):
        unpack_features(msgpack.encode([known]))


def test_times_of_changes_that_are_none_are_refused() -> None:
    for times in ({"age": "x"}, {"": None}, {"age": [1]}, {"age": True}):
        with pytest.raises(StateError, match=r"(ad|user) '[au]'"):
            unpack_user("u", msgpack.encode([2, "u", {}, [], [], times]))
        with pytest.raises(StateError, match=r"(ad|user) '[au]'"):
            unpack_ad("a", msgpack.encode([2, False, {}, times]))


def test_what_is_nested_without_end_is_refused() -> None:
    for value in (b"\x91" * 100_000, b"\x81\xa1x" * 100_000):
        with pytest.raises(StateError):
            unpack_user("u", value)
