import math
from typing import Any

import numpy as np
import pytest
import small
from hypothesis import given
from hypothesis import strategies as st

from features.encode import AdTable, Block, Encoder, FieldError, Request, clean, encode_request
from tests.test_datasets import patient

FEW = 'name = "few"\nhistory = { length = 2, fields = ["ad_id", "price", "tags"] }\n' + small.USER + small.AD
UNKNOWN_PRICE = -math.log(2)  # missing = -1, then sign(x) log(1 + |x|)


def catalogue(encoder: Encoder, ads: int = small.ADS) -> AdTable:
    table = AdTable(encoder)
    for i in range(ads):
        table.put([f"a{i}"], encoder.encode_one("ad", small.ad_features(i), f"a{i}"))
    return table


def request(**changed: Any) -> Request:
    given = {"user_id": "u1", "user": {}, "context": {}, "history": [], "candidates": ["a1"]}
    return Request(**{**given, **changed})


def test_the_table_of_encodings() -> None:
    """What values become, pinned. If this test must change, raise ENCODING in features/vocabulary.py: old bundles no longer fit.
    (It was not raised when floats, true and empty text came to be read as the preparation of a log had always read them, nor when the
    user "", whom no request can name, came to be nobody.)

    Vocabularies: age 25 35 45, genre drama comedy news, slot feed side, tags x y z, ad_id a0 to a11; 50 buckets for user_id;
    income has mean 20 and deviation 5.
    """
    encoder = small.encoder()
    probes = [
        ("user", {}, "u1", [24, 1, 0, 0, 0], [-2.0]),
        ("user", {"age": None, "interests": None, "income": None}, "u1", [24, 1, 0, 0, 0], [-2.0]),
        ("user", {"age": "25", "interests": ["news", "drama"], "income": 30}, "", [0, 2, 4, 2, 0], [2.0]),
        ("user", {"age": 45, "interests": ["opera", "news", "news", "drama"], "income": 20.5}, "日本", [8, 4, 1, 4, 4], [0.1]),
        ("user", {"age": "025", "interests": []}, "u1", [24, 1, 0, 0, 0], [-2.0]),
        ("context", {}, None, [0], []),
        ("context", {"slot": "side"}, None, [3], []),
        ("context", {"slot": "Side"}, None, [1], []),
        ("ad", {}, "a0", [2, 0, 1, 0], [-0.6931472]),
        ("ad", {"genre": "news", "tags": ["z"], "price": 0}, "a11", [13, 4, 4, 0], [0.0]),
        ("ad", {"genre": "", "tags": ["x", "", "y", "z"], "price": 9.0}, "a12", [1, 0, 2, 3], [2.3025851]),
        ("ad", {"genre": "other", "tags": ["", None], "price": True}, "a12", [1, 1, 1, 0], [0.6931472]),
        ("user", {"age": 25.0, "interests": ["news"], "income": 30}, "", [0, 2, 4, 0, 0], [2.0]),
        ("user", {"age": "25.0", "interests": ["25"], "income": 30}, "", [0, 2, 1, 0, 0], [2.0]),
        ("ad", {"tags": [], "price": -9.0}, "A1", [1, 0, 1, 0], [-2.3025851]),
    ]
    for side, features, identity, ids, numbers in probes:
        block = encoder.encode_one(side, features, identity)
        assert block.ids.dtype == np.int64
        assert block.numbers.dtype == np.float32
        assert block.ids.tolist() == [ids], (side, features)
        assert block.numbers.tolist() == [pytest.approx(numbers, abs=1e-7)], (side, features)


def test_what_has_no_one_text_is_no_category() -> None:
    for value in (2.0**53, b"25", ["25"], {"a": 1}):
        with pytest.raises(FieldError, match=r"^user\.age: expected (a text, a whole number|text or whole numbers; this float)"):
            small.encoder().encode_one("user", {"age": value}, "u1")


@pytest.mark.parametrize("value", ["3", float("nan"), float("inf"), -float("inf"), 1e39, 10**400, [1.0]])
def test_what_is_no_finite_number_is_refused(value: Any) -> None:
    with pytest.raises(FieldError, match=r"^user\.income: expected a finite number"):
        small.encoder().encode_one("user", {"income": value}, "u1")


@pytest.mark.parametrize("value", ["news", 3, [2.0**53], ["a", {}], {"a": 1}, b"ab"])
def test_what_is_no_list_of_texts_is_refused(value: Any) -> None:
    with pytest.raises(FieldError, match=r"^user\.interests: "):
        small.encoder().encode_one("user", {"interests": value}, "u1")


@pytest.mark.parametrize(
    ("side", "name"), [("user", "agee"), ("user", "slot"), ("user", "user_id"), ("context", "user_id"), ("ad", "ad_id")]
)
def test_a_feature_that_the_schema_does_not_have_is_refused(side: Any, name: str) -> None:
    with pytest.raises(FieldError, match="no such") as caught:
        small.encoder().encode_one(side, {name: "x"})
    assert (caught.value.side, caught.value.name, caught.value.row) == (side, name, None)


texts = st.sampled_from(["drama", "news", "x", "y", "25", "a1", "a3", "feed", "", "other"])
values = {"category": st.none() | texts, "list": st.none() | st.lists(texts, max_size=4), "number": st.none() | st.floats(-1e6, 1e6)}


@patient
@given(st.data(), st.sampled_from(["user", "context", "ad"]), st.integers(1, 5))
def test_many_rows_encode_as_one_by_one(data: st.DataObject, side: Any, rows: int) -> None:
    encoder = small.encoder()
    fields = encoder.schema.side(side)
    drawn = {field: data.draw(st.lists(values[field.kind], min_size=rows, max_size=rows)) for field in fields}
    columns = {field.name: [clean(field, value) for value in column] for field, column in drawn.items()}
    whole = encoder.encode(side, columns, rows)
    identity = f"{side}_id"
    for row in range(rows):
        features = {name: column[row] for name, column in columns.items() if name != identity}
        # An identity may be missing in a log, never in a request.
        one = encoder.encode_one(side, features, columns.get(identity, [None])[row] if identity in columns else None)
        assert np.array_equal(whole.ids[row], one.ids[0])
        assert np.array_equal(whole.numbers[row], one.numbers[0])


@patient
@given(
    st.fixed_dictionaries({}, optional={"age": texts, "interests": st.lists(texts, max_size=4), "income": st.floats(-1e30, 1e30)}), texts
)
def test_a_request_s_user_side_is_the_user_s_beside_the_context_s(user: dict[str, Any], slot: str) -> None:
    encoder = small.encoder()
    together = encoder.encode_user(Request("u1", user, {"slot": slot}, [], []))
    apart = encoder.encode_one("user", user, "u1").beside(encoder.encode_one("context", {"slot": slot}))
    assert np.array_equal(together.ids, apart.ids)
    assert np.array_equal(together.numbers, apart.numbers)
    stored, _ = encoder.usable("user", {"age": 25, "income": 7, "interests": ["drama"]})
    above = encoder.encode_user(Request("u1", user, {"slot": slot}, [], [], stored=stored))
    merged = encoder.encode_user(Request("u1", {"age": 25, "income": 7, "interests": ["drama"], **user}, {"slot": slot}, [], []))
    assert np.array_equal(above.ids, merged.ids)
    assert np.array_equal(above.numbers, merged.numbers)


def test_numbers_that_are_not_a_number_are_missing_in_bulk() -> None:
    block = small.encoder().encode("user", {"income": [float("nan"), None, 25.0]}, 3)
    assert block.numbers.tolist() == [[-2.0], [-2.0], [1.0]]


def test_a_history_has_the_columns_that_the_schema_names_in_its_order() -> None:
    encoder = small.encoder(FEW)
    feeds, _ = encode_request(catalogue(encoder), request(history=["a1", "a2"]))
    assert feeds["history_ids"].tolist() == [[[3, 2, 0], [4, 2, 3]]]  # ad_id, then tags; genre is left out
    assert feeds["history_numbers"].tolist() == [[[pytest.approx(math.log(2))], [pytest.approx(math.log(3))]]]
    assert feeds["ad_ids"].tolist() == [[[3, 3, 2, 0]]]


def test_the_newest_behaviours_are_kept() -> None:
    feeds, _ = encode_request(catalogue(small.encoder()), request(history=["a1", "a2", "a3", "a4", "a5", "a6"]))
    assert feeds["history_ids"][0, :, 0].tolist() == [5, 6, 7, 8]


def test_an_empty_history_is_one_row_of_padding() -> None:
    feeds, _ = encode_request(catalogue(small.encoder()), request())
    assert feeds["history_ids"].tolist() == [[[0, 0, 0, 0]]]
    assert feeds["history_numbers"].tolist() == [[[0.0]]]


def test_unknown_ads_are_known_by_their_id_alone() -> None:
    feeds, known = encode_request(catalogue(small.encoder(), 3), request(history=["a1", "zz", "a9"], candidates=["zz", "a1", "a9"]))
    # a9 is in the vocabulary, though not in the catalogue. Of an unknown ad every category is unknown and every number missing.
    assert feeds["ad_ids"].tolist() == [[[1, 1, 1, 0], [3, 3, 2, 0], [11, 1, 1, 0]]]
    assert feeds["ad_numbers"][0, :, 0].tolist() == pytest.approx([UNKNOWN_PRICE, math.log(2), UNKNOWN_PRICE])
    assert known.tolist() == [False, True, False]
    assert feeds["history_ids"].tolist() == [[[3, 3, 2, 0], [1, 1, 1, 0], [11, 1, 1, 0]]]


def test_an_ad_that_has_left_is_unknown_as_a_candidate_and_whole_in_histories() -> None:
    table = catalogue(small.encoder())
    before, _ = encode_request(table, request(history=["a5", "a6"]))
    table.remove(["a5"])
    feeds, known = encode_request(table, request(history=["a5", "a6"], candidates=["a5", "a6"]))
    assert feeds["history_ids"].tolist() == before["history_ids"].tolist()
    assert feeds["history_numbers"].tolist() == before["history_numbers"].tolist()
    assert feeds["ad_ids"][0].tolist() == [[7, 1, 1, 0], [8, 2, 2, 3]]
    assert known.tolist() == [False, True]


def test_sent_features_lie_over_the_catalogue_s() -> None:
    table = catalogue(small.encoder())
    sent = {0: {"genre": "news"}, 2: {"tags": ["z"], "price": 0.0}, 3: {"genre": "drama", "tags": None, "price": None}}
    feeds, _ = encode_request(table, request(candidates=["a2", "a2", "a2", "zz"], sent=sent))
    assert feeds["ad_ids"][0].tolist() == [[4, 4, 2, 3], [4, 4, 2, 3], [4, 4, 4, 0], [1, 2, 1, 0]]
    assert feeds["ad_numbers"][0, :, 0].tolist() == pytest.approx([math.log(3), math.log(3), 0.0, UNKNOWN_PRICE])
    assert encode_request(table, request(candidates=["a2"]))[0]["ad_ids"].tolist() == [[[4, 4, 2, 3]]]  # the catalogue is as it was


def test_to_say_that_a_feature_is_missing_says_nothing_of_an_ad_that_nobody_knows() -> None:
    table = catalogue(small.encoder())
    said, _ = encode_request(table, request(candidates=["zz", "a2"], sent={0: {"genre": None}, 1: {"genre": None}}))
    silent, _ = encode_request(table, request(candidates=["zz", "a2"]))
    assert said["ad_ids"][0, 0].tolist() == silent["ad_ids"][0, 0].tolist()
    assert (said["ad_ids"][0, 1, 1], silent["ad_ids"][0, 1, 1]) == (0, 4)


def test_a_wrong_sent_feature_names_its_candidate() -> None:
    for features in ({"price": "dear"}, {"colour": "red"}, {"ad_id": "a1"}):
        with pytest.raises(FieldError, match=r"^ad\.") as caught:
            encode_request(catalogue(small.encoder()), request(candidates=["a1", "a2"], sent={1: features}))
        assert (caught.value.row, caught.value.name) == (1, next(iter(features)))


def test_a_schema_without_history_has_no_history_tensor() -> None:
    text = small.SCHEMA.replace(small.HISTORY, "")
    feeds, _ = encode_request(catalogue(small.encoder(text)), request(history=["a1"]))
    assert set(feeds) == {"user_ids", "user_numbers", "ad_ids", "ad_numbers"}


def test_the_table_grows_replaces_and_removes() -> None:
    encoder = small.encoder()
    table = AdTable(encoder)
    assert len(table) == 0
    assert table.rows(["a1"]).tolist() == [0]
    for i in range(70):
        table.put([f"a{i}"], encoder.encode_one("ad", {"price": float(i)}, f"a{i}"))
    assert len(table) == 70
    assert table.rows(["a69", "zz", "a0"]).tolist() == [70, 0, 1]
    assert table.block.numbers[1:, 0].tolist() == pytest.approx(np.log1p(np.arange(70)).tolist())
    assert not table.block.ids[0].any()
    assert not table.block.numbers[0].any()
    table.put(["a3", "a4"], Block(np.full((2, 4), 9), np.full((2, 1), 9, np.float32)))
    assert (len(table), len(table.block)) == (70, 71)
    assert table.block.ids[table.rows(["a3", "a4", "a5"])].tolist() == [[9] * 4, [9] * 4, [7, 0, 1, 0]]
    table.remove(["a3", "never there"])
    assert len(table) == 69
    assert table.active(table.rows(["a3", "a4"])).tolist() == [False, True]
    assert table.block.ids[table.rows(["a3"])].tolist() == [[9] * 4]
    table.put(["a3"], Block(np.full((1, 4), 8), np.full((1, 1), 8, np.float32)))
    assert len(table) == 70
    assert table.block.ids[table.rows(["a3"])].tolist() == [[8] * 4]
