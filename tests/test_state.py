import contextlib
import math

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.state import HISTORY_LIMIT, Ad, StateError, UserState, pack_ad, pack_user, unpack_ad, unpack_user
from tests.test_datasets import patient

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
whole = st.integers(-(2**63), 2**64 - 1)
features = st.dictionaries(texts, st.none() | texts | whole | st.floats(allow_nan=False) | st.lists(texts, max_size=3), max_size=4)
histories = st.lists(st.tuples(texts, whole), max_size=20)
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
        [True, "u", {}, [], []],
        [1, "u", {}, [], [], []],
        [1, 3, {}, [], []],
        [1, "u", [], [], []],
        [1, "u", {}, {}, []],
        [1, "u", {}, ["a"], []],
        [1, "u", {}, [3], [3]],
    ],
)
def test_what_is_no_state_is_refused(document: object) -> None:
    with pytest.raises(StateError, match="user 'u'"):
        unpack_user("u", msgpack.packb(document))


@pytest.mark.parametrize("document", [None, [], [1, 1, {}], [1, True], [2, True, {}], [1, True, []], {"a": 1}])
def test_what_is_no_ad_is_refused(document: object) -> None:
    with pytest.raises(StateError, match="ad 'a1'"):
        unpack_ad("a1", msgpack.packb(document))


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


def test_a_number_keeps_its_last_bit() -> None:
    assert unpack_ad("a", pack_ad(Ad("a", {"price": math.pi}))).features["price"] == math.pi
