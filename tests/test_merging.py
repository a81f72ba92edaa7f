"""The laws of putting a data set together with what events told, without a store."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from features.merging import ForgetAd, MergeAd, MergeUser, RetireAd, left_before, merged_ad, merged_user
from features.packing import StateError
from features.state import ACTIVE, HISTORY_LIMIT, Ad, UserState, pack_ad, pack_user, unpack_ad, unpack_user
from tests.test_datasets import patient

UNTIL = 1_000_000
ids = st.sampled_from("abcd")
whole_times = st.integers(UNTIL - 20_000, UNTIL)
event_times = st.floats(UNTIL - 20_000, UNTIL + 20_000)
loaded_histories = st.lists(st.tuples(ids, whole_times), max_size=12).map(lambda pairs: sorted(pairs, key=lambda pair: pair[1]))
untimed = st.builds(lambda ad_ids, at: [(ad_id, at) for ad_id in ad_ids], st.lists(ids, max_size=8), st.sampled_from([0, UNTIL - 5_000]))
clicks = st.lists(st.tuples(ids, event_times), max_size=12)
values = st.dictionaries(st.sampled_from("xyz"), st.sampled_from([1.0, 2.0, 3.0]), max_size=3)
news = st.lists(st.tuples(st.dictionaries(st.sampled_from("xyz"), st.sampled_from([None, 7.0, 8.0]), max_size=2), event_times), max_size=5)


def state(history: list[tuple[str, Any]], features: dict[str, Any] | None = None) -> UserState:
    return UserState(features or {}, [ad_id for ad_id, _ in history], [ts for _, ts in history])


def history(of: UserState) -> list[tuple[str, float]]:
    return list(zip(of.ad_ids, of.ts, strict=True))


def clicked(before: UserState, behaviours: list[tuple[str, float]]) -> UserState:
    for ad_id, ts in behaviours:
        before = before.clicked(ad_id, ts)
    return before


def after(before: UserState, words: list[tuple[dict[str, Any], float]]) -> UserState:
    for features, ts in words:
        before = before.updated(features, ts)
    return before


def test_a_click_since_the_data_set_stays_and_one_that_it_has_is_there_once() -> None:
    stored = clicked(state([("a", 100), ("b", 200)]), [("c", 300.5), ("new", UNTIL + 9.0)])
    merged, kept = merged_user(stored, state([("a", 100), ("b", 200), ("c", 295), ("d", 400)]), UNTIL)
    assert history(merged) == [("a", 100), ("b", 200), ("c", 300.5), ("d", 400), ("new", UNTIL + 9.0)]
    assert (kept.behaviours, kept.features) == (1, 0)


def test_an_older_data_set_s_behaviours_give_way_to_a_newer_one_s() -> None:
    merged, _ = merged_user(state([("a", 100), ("b", 200)]), state([("b", 200), ("c", 300)]), UNTIL)
    assert history(merged) == [("b", 200), ("c", 300)]
    again, kept = merged_user(state([("b", 200), ("c", 300)]), state([("a", 100), ("b", 200)]), 250)
    assert history(again) == [("a", 100), ("b", 200), ("c", 300)], "loaded again, an older one loses nothing that is newer than it"
    assert kept.behaviours == 1


def test_a_history_without_times_of_its_own_keeps_its_order() -> None:
    stored = clicked(UserState(), [("c", 300.0), ("e", UNTIL + 5_000.0)])
    for at in (0, 1_000):
        merged, kept = merged_user(stored, state([("a", at), ("b", at), ("c", at), ("d", at)]), UNTIL)
        assert "".join(merged.ad_ids) == ("abdce" if at == 0 else "abcde")
        assert kept.behaviours == 1
        assert list(merged.ts) == sorted(merged.ts)


def test_of_each_feature_the_newer_word_stays() -> None:
    stored = after(UserState({"x": 1.0, "y": 1.0, "old": 1.0}), [({"x": 5.0, "w": 5.0}, UNTIL + 1.0), ({"y": 6.0, "v": 6.0}, UNTIL - 1.0)])
    stored = after(stored, [({"z": None}, UNTIL + 2.0)])
    merged, kept = merged_user(stored, UserState({"x": 2.0, "y": 2.0, "z": 2.0, "n": 2.0}), UNTIL)
    assert merged.features == {"x": 5.0, "w": 5.0, "y": 2.0, "v": 6.0, "n": 2.0}
    assert kept.features == 4  # x, w, v, and that z was taken away
    assert merged.updated({"y": 9.0}, UNTIL - 0.5).features["y"] == 2.0, "a late event does not undo what the data set knows from after it"
    assert merged.updated({"y": 9.0}, UNTIL + 0.5).features["y"] == 9.0


def test_what_the_data_set_does_not_speak_of_stays() -> None:
    stored = state([("a", 100), ("b", 200)], {"x": 1.0, "of another schema": 1.0})
    merged, kept = merged_user(stored, UserState({}), UNTIL, {"x"})
    assert (merged.features, history(merged), bool(kept)) == ({"of another schema": 1.0}, history(stored), False)
    ad, _ = merged_ad(Ad("a", {"x": 1.0, "y": 1.0}), Ad("a", {"x": 2.0}), UNTIL, False, {"x"})
    assert ad.features == {"x": 2.0, "y": 1.0}


def test_without_times_what_events_told_stays() -> None:
    stored = clicked(after(UserState({"x": 1.0}), [({"x": 5.0}, 10.0)]), [("b", 20.0)])
    merged, _ = merged_user(stored, state([("a", 0), ("b", 0)], {"x": 2.0, "y": 2.0}), None)
    assert (merged.features, history(merged)) == ({"x": 5.0, "y": 2.0}, [("a", 0), ("b", 20.0)])


@patient
@given(loaded_histories | untimed, loaded_histories | untimed, clicks, values, values, news, st.sampled_from([None, UNTIL, UNTIL - 10_000]))
def test_no_event_s_behaviour_is_lost_and_loading_again_changes_nothing(
    before: list[tuple[str, int]],
    loaded: list[tuple[str, int]],
    behaviours: list[tuple[str, float]],
    known: dict[str, float],
    fresh: dict[str, float],
    words: list[tuple[dict[str, Any], float]],
    until: float | None,
) -> None:
    stored = pack_user("u", after(clicked(state(before, known), behaviours), words))
    merge = MergeUser("u", state(loaded, fresh), until)
    once = merge.of(stored)
    merged = unpack_user("u", once)
    assert list(merged.ts) == sorted(merged.ts)
    rest = history(merged)
    for behaviour in behaviours:
        rest.remove(behaviour)
    counts = {ad_id: sum(each == ad_id for each, _ in loaded) for ad_id in "abcd"}
    assert all(sum(each == ad_id for each in merged.ad_ids) >= count for ad_id, count in counts.items()), "nor one of the data set's"
    newest: dict[str, tuple[float, Any]] = {}
    for features, ts in sorted(words, key=lambda word: word[1]):
        newest |= {name: (ts, value) for name, value in features.items()}
    for name, (ts, _) in newest.items():
        if until is None or ts > until:
            assert merged.features.get(name) == unpack_user("u", stored).features.get(name)
        elif name in fresh:
            assert merged.features[name] == fresh[name]
    assert merge.of(once) == once
    assert MergeUser("u", state(loaded, fresh), until).of(once) == once


@patient
@given(values, values, news, st.booleans(), st.booleans(), st.sampled_from([None, UNTIL]))
def test_ads_are_merged_alike(
    known: dict[str, float],
    fresh: dict[str, float],
    words: list[tuple[dict[str, Any], float]],
    left: bool,
    whole: bool,
    until: float | None,
) -> None:
    ad = Ad("a", known)
    for features, ts in words:
        ad = ad.updated(features, False if left else None, ts)
    merge = MergeAd(Ad("a", fresh), until, whole)
    once = merge.of(pack_ad(ad))
    merged = unpack_ad("a", once)
    assert merge.of(once) == once
    newer = any(until is None or ts > until for _, ts in words)
    assert merged.active == (not (left and words) or (whole and not newer))


def test_what_is_damaged_gives_way() -> None:
    assert unpack_user("u", MergeUser("u", state([("a", 1)]), 5).of(b"nonsense")) == UserState({}, ["a"], [1])
    assert unpack_ad("a", MergeAd(Ad("a", {"x": 1.0}), 5).of(b"nonsense")) == Ad("a", {"x": 1.0})


def test_times_that_are_none_give_way() -> None:
    stored = pack_user("u", UserState({}, ["a", "b"], ["x", 1]))
    for loaded in (UserState(), state([("c", 1)])):
        assert unpack_user("u", MergeUser("u", loaded, 5).of(stored)).ad_ids == list(loaded.ad_ids)


def test_an_ad_that_a_whole_catalogue_lacks_leaves_and_comes_back_with_the_next() -> None:
    retired = unpack_ad("a", RetireAd("a", 5, 9).of(pack_ad(Ad("a", {"x": 1.0}))) or b"")
    assert (retired.active, retired.features) == (False, {"x": 1.0})
    assert merged_ad(retired, Ad("a", {"x": 2.0}), 5, False)[0] == Ad("a", {"x": 2.0})
    assert RetireAd("a", 5, 9).of(pack_ad(retired)) is None
    newer = RetireAd("a", 5, 9)
    assert newer.of(pack_ad(Ad("a", {}).updated({"x": 1.0}, None, 6))) is None
    assert newer.stays
    assert RetireAd("a", 6, 9).of(pack_ad(Ad("a", {}).updated({"x": 1.0}, None, 6))) is not None


def test_that_an_event_took_an_ad_away_stands_against_a_log_that_has_it() -> None:
    gone = Ad("a", {}).updated({}, False, 4)
    assert not merged_ad(gone, Ad("a", {"x": 1.0}), 5, False)[0].active
    assert merged_ad(gone, Ad("a", {"x": 1.0}), 5, True)[0].active
    assert not merged_ad(gone, Ad("a", {"x": 1.0}), 3, True)[0].active


def test_an_ad_that_left_long_ago_is_forgotten() -> None:
    gone = Ad("a", {}, active=False, changed={ACTIVE: 4})
    assert left_before(gone, 5)
    assert not left_before(gone, 4)
    assert not left_before(Ad("a", {}, active=False), 5), "it is not known when"
    assert not left_before(Ad("a", {}), 5)
    assert (ForgetAd("a", 5).of(pack_ad(gone)), ForgetAd("a", 3).of(pack_ad(gone)), ForgetAd("a", 5).of(b"")) == (b"", None, None)


def test_histories_are_bounded_and_states_too_large_to_be_read_are_refused() -> None:
    stored = clicked(UserState(), [("a", UNTIL + float(i)) for i in range(HISTORY_LIMIT)])
    merged, _ = merged_user(stored, state([("b", i) for i in range(500)]), UNTIL)
    assert (len(merged.ts), set(merged.ad_ids)) == (HISTORY_LIMIT, {"a"})
    for huge in (UserState({"x": "y" * 2**21}), UserState({"x": ["y" * 1_000] * 1_200}), state([("y" * 3_000, i) for i in range(1_000)])):
        try:
            MergeUser("u", huge, UNTIL).of(b"")
        except StateError as error:
            assert "'u' would take" in str(error)  # noqa: PT017
        else:
            raise AssertionError("it was not refused")
