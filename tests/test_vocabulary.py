import json
from collections.abc import Callable

import numpy as np
import pytest
import small
from hypothesis import given
from hypothesis import strategies as st

from features import vocabulary
from features.schema import parse_schema
from features.values import plain
from features.vocabulary import HashBuckets, Moments, Vocabularies, Vocabulary, fingerprint, parse_vocabularies
from tests.test_datasets import patient

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)


def test_ids_are_padding_unknown_and_then_the_values_in_order() -> None:
    ids = Vocabulary(["b", "a", ""]).encode(["a", None, "b", "c", ""])
    assert ids.tolist() == [3, 0, 2, 1, 4]
    assert ids.dtype == np.int64
    assert Vocabulary(["b", "a", ""]).size == 5
    assert Vocabulary([]).encode([None, "x"]).tolist() == [0, 1]
    assert Vocabulary(["a"]).encode([]).shape == (0,)


def test_ids_of_different_texts_that_look_alike_differ() -> None:
    values = ["\u00e9", "e\u0301", "A", "a", "1", "01"]  # é as one code point, and as two
    assert Vocabulary(values).encode([*values, "1 "]).tolist() == [2, 3, 4, 5, 6, 7, 1]


def test_a_vocabulary_that_names_a_value_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="twice"):
        Vocabulary(["a", "b", "a"])


def test_hash_buckets_give_the_same_ids_on_every_machine_and_for_ever() -> None:
    # CRC-32 of the UTF-8 text; ids 0 and 1 stay free. These numbers stand in bundles: to change them, raise ENCODING.
    assert HashBuckets(1000).encode(["a1", "u1", "", "é", "日本", None, "a" * 1000]).tolist() == [397, 424, 2, 328, 758, 0, 93]
    assert HashBuckets(1).encode(["a1", None, "u1"]).tolist() == [2, 0, 2]
    assert HashBuckets(1000).size == 1002


@patient
@given(st.lists(st.none() | texts), st.integers(1, 2**31))
def test_hash_buckets_stay_between_2_and_their_size(values: list[str | None], buckets: int) -> None:
    ids = HashBuckets(buckets).encode(values)
    for value, id_ in zip(values, ids.tolist(), strict=True):
        assert id_ == 0 if value is None else 2 <= id_ < buckets + 2


@patient
@given(st.lists(texts, unique=True), st.lists(texts))
def test_a_vocabulary_encodes_many_values_as_it_does_one(known: list[str], values: list[str]) -> None:
    table = Vocabulary(known)
    expected = [known.index(value) + 2 if value in known else 1 for value in values]
    assert table.encode(values).tolist() == expected
    assert [int(table.encode([value])[0]) for value in values] == expected


def test_vocabularies_written_and_read_are_the_same() -> None:
    schema, ours = small.schema(), small.vocabularies()
    again = parse_vocabularies(ours.to_json(), schema)
    assert again.to_json() == ours.to_json()
    assert again.moments == {"user.income": Moments(20.0, 5.0)}
    assert {name: v.values for name, v in again.categories.items() if isinstance(v, Vocabulary)}["genre"] == small.GENRES
    buckets = again.categories["user_id"]
    assert buckets.buckets == 50


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d["categories"].pop("genre"),
        lambda d: d["categories"].update(genre=3),
        lambda d: d["categories"].update(genre=["a", "a"]),
        lambda d: d["moments"].pop("user.income"),
        lambda d: d["moments"].update({"user.income": [1]}),
        lambda d: d["moments"].update({"user.income": ["x", "y"]}),
        lambda d: d.pop("categories"),
    ],
)
def test_damaged_vocabularies_are_a_value_error(damage) -> None:
    document = json.loads(small.vocabularies().to_json())
    damage(document)
    with pytest.raises(ValueError, match=r".") as caught:
        parse_vocabularies(json.dumps(document), small.schema())
    assert type(caught.value) is ValueError
    for text in ("", "[]", "3", "{"):
        with pytest.raises(ValueError, match=r"."):
            parse_vocabularies(text, small.schema())


def test_the_fingerprint_changes_with_whatever_changes_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(text: str = small.SCHEMA, **changed: object) -> str:
        ours = small.vocabularies(text)
        return fingerprint(small.schema(text), Vocabularies(**{"categories": ours.categories, "moments": ours.moments, **changed}))

    categories = dict(small.vocabularies().categories)
    prints = [
        of(),
        of(small.SCHEMA.replace("length = 4", "length = 5")),
        of(small.SCHEMA.replace("buckets = 50", "buckets = 51")),
        of(small.SCHEMA.replace("missing = 10", "missing = 11")),
        of(small.SCHEMA.replace('transform = "log"', 'transform = "none"')),
        of(small.SCHEMA.replace('missing = "unknown"', 'missing = "padding"', 1)),
        of(categories={**categories, "genre": Vocabulary(["comedy", "drama", "news"])}),
        of(categories={**categories, "genre": Vocabulary([*small.GENRES, "new"])}),
        of(moments={"user.income": Moments(20.0, 5.1)}),
    ]
    assert of() == prints[0]
    assert len(prints[0]) == 16
    monkeypatch.setattr(vocabulary, "ENCODING", vocabulary.ENCODING + 1)
    prints.append(of())
    assert len(set(prints)) == len(prints)


AWKWARD = ('"', "\\", '","', "]", "}", "[", "\u2028", "\x00\n")
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=6) | st.sampled_from(AWKWARD)


@patient
@given(st.dictionaries(TEXTS, st.lists(TEXTS, unique=True, max_size=8), max_size=4), st.floats(allow_nan=False, allow_infinity=False))
def test_what_is_written_piece_by_piece_is_json_and_is_read_as_such(listed: dict[str, list[str]], mean: float) -> None:
    written = Vocabularies({name: Vocabulary(values) for name, values in listed.items()}, {"user.income": Moments(mean, 1.0)})
    text = written.to_json()
    document = {"categories": listed, "moments": {"user.income": [mean, 1.0]}}
    assert text == json.dumps(document, ensure_ascii=False, separators=(",", ":"))  # as fingerprints have always taken it
    assert vocabulary._read(text, ()) == document
    assert vocabulary._read(text, [written]) == document


def test_many_values_are_written_and_read_in_pieces() -> None:
    values = [f"value {i}" for i in range(2 * vocabulary.AT_ONCE + 1)]
    written = Vocabularies({"genre": Vocabulary(values)}, {})
    assert json.loads(written.to_json())["categories"]["genre"] == values
    assert vocabulary._read(written.to_json(), ())["categories"]["genre"] == values


def test_what_others_have_in_memory_is_not_kept_twice() -> None:
    mine, theirs = Vocabulary(["drama", "comedy"]), Vocabulary(["news", "comedy", "drama"])
    text = Vocabularies({"genre": mine}, {}).to_json()
    read = vocabulary._read(text, [Vocabularies({"genre": theirs}, {})])["categories"]["genre"]
    assert read == ["drama", "comedy"]
    assert read[0] is theirs.values[2]
    assert read[1] is theirs.values[1]


@pytest.mark.parametrize("spaced", [json.dumps, lambda document: json.dumps(document, indent=1)])
def test_what_someone_else_wrote_is_read_too(spaced: Callable[[object], str]) -> None:
    schema = parse_schema('name = "s"\n[ad.genre]\nkind = "category"\n')
    text = spaced({"moments": {}, "categories": {"genre": ["drama", "com\\u00e9die"]}})
    assert parse_vocabularies(text, schema).categories["genre"].id("drama") == 2


@pytest.mark.parametrize("cut", [20, 25, 30, 33, 40, 44])
def test_what_was_cut_short_is_an_error(cut: int) -> None:
    schema = parse_schema('name = "s"\n[ad.genre]\nkind = "category"\n')
    text = Vocabularies({"genre": Vocabulary(["drama", "comedy"])}, {}).to_json()
    with pytest.raises(ValueError, match=r"."):
        parse_vocabularies(text[:cut], schema)


@given(st.lists(st.text(alphabet="ab.01T", max_size=4), unique=True), st.lists(st.none() | st.text(alphabet="ab.01T", max_size=4)))
def test_many_values_are_found_as_few_are(values, asked):
    few, many = Vocabulary(values), Vocabulary(values, many=0)
    asked = [*asked, *values, *map(plain, values), None]
    assert (
        many.encode(asked).tolist() == few.encode(asked).tolist() == [many.id(each) for each in asked] == [few.id(each) for each in asked]
    )
    texts = ["".join(each) for each in values]
    assert many.own([*texts, "elsewhere"]) == [*values, "elsewhere"]
    assert all(mine is own for mine, own in zip(many.own(texts), values, strict=True))


def test_many_values_are_named_once_too():
    with pytest.raises(ValueError, match="twice"):
        Vocabulary(["a", "b", "a"], many=0)
