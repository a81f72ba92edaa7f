"""A table that took its rows over from another is the table that was encoded from values, whatever the vocabularies and the ads."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.encode import Encoder
from features.id_remap import IdRemap
from features.schema import parse_schema
from features.state import Ad, pack_features
from features.vocabulary import HashBuckets, Moments, Vocabularies, Vocabulary
from service.catalogue.ads import Ads
from service.catalogue.catalogue import put_ads

SCHEMA = """
name = "test"
[ad.ad_id]
kind = "category"
[ad.genre]
kind = "category"
missing = "unknown"
[ad.tags]
kind = "list"
length = 2
vocabulary = "genre"
[ad.site]
kind = "category"
buckets = 7
missing = "unknown"
[ad.price]
kind = "number"
transform = "standard"
"""
VALUES = ["drama", "comedy", "news", "sports", "games"]
AD_IDS = [f"a{i}" for i in range(8)]
vocabularies = st.lists(st.sampled_from(VALUES), unique=True)
ad_lists = st.lists(
    st.builds(
        lambda ad_id, features, active: Ad(ad_id, {name: value for name, value in features.items() if value is not None}, active),
        st.sampled_from(AD_IDS),
        st.fixed_dictionaries(
            {
                "genre": st.sampled_from([*VALUES, None, 1.5]),  # 1.5: does not fit
                "tags": st.lists(st.sampled_from(VALUES), max_size=3) | st.none(),
                "site": st.sampled_from(["x", "y", None]),
                "price": st.sampled_from([1.0, 2.5, None]),
            }
        ),
        st.booleans(),
    ),
    max_size=12,
)


def encoder(genres, ad_ids=AD_IDS, mean=1.0, schema=SCHEMA):
    categories = {"ad_id": Vocabulary(ad_ids), "genre": Vocabulary(genres), "site": HashBuckets(7)}
    return Encoder(parse_schema(schema), Vocabularies(categories, {"ad.price": Moments(mean, 2.0)}))


def everything(table, ad_ids):
    rows = table.rows(ad_ids)
    block = table.take(rows)
    return (rows > 0).tolist(), block.ids.tolist(), block.numbers.tolist(), table.active(rows).tolist(), len(table)


@given(
    vocabularies,
    vocabularies,
    st.permutations(AD_IDS),
    st.integers(0, 8),
    ad_lists,
    st.lists(st.tuples(st.integers(0, 20), ad_lists), max_size=2),
)
def test_a_table_that_took_rows_over_is_the_one_that_encoded_them(old, new, ad_ids, known, ads, later):
    first = Ads({})
    first.add("old", encoder(old))
    for ad in ads:
        first.change([ad], put_ads)
    first.add("new", encoder(new, ad_ids[:known]))
    taken, changes = [], dict(later)
    for step, _ in enumerate(first.fill("new", 2, lambda table, some: taken.extend(some) or put_ads(table, some))):
        if step in changes:
            for ad in changes.pop(step):
                first.change([ad], put_ads)
    alone = Ads({}, dict(first.gone))
    alone.packed.put(alone.ids.add(first.ids.texts[1 : len(first.ids) + 1].tolist()), first.packed.get(np.arange(1, len(first.ids) + 1)))
    alone.add("new", encoder(new, ad_ids[:known]))
    for _ in alone.fill("new", 3, put_ads):
        pass
    fits = [ad_id for ad_id in AD_IDS if ad_id not in first.misfits_of("new")]  # the row of one that fitted once is of then
    assert everything(first.tables["new"], fits)[:4] == everything(alone.tables["new"], fits)[:4]
    assert first.misfits_of("new").keys() == alone.misfits_of("new").keys()


def test_only_what_the_old_vocabulary_lacked_is_encoded_again():
    ads = Ads({})
    ads.add("old", encoder(["drama"]))
    ads.change(
        [Ad("a0", {"genre": "drama"}), Ad("a1", {"genre": "news"}), Ad("a2", {"genre": "drama", "tags": ["drama", "news"]})], put_ads
    )
    ads.add("new", encoder(["news", "drama"]))
    encoded = []
    for _ in ads.fill("new", 50, lambda table, some: encoded.extend(ad.ad_id for ad in some) or put_ads(table, some)):
        pass
    assert encoded == ["a1", "a2"]
    assert ads.features(["a1", "a9"]) == {"a1": pack_features({"genre": "news"}), "a9": None}


@pytest.mark.parametrize(
    "other",
    [
        encoder(VALUES, mean=3.0),
        encoder(VALUES, schema=SCHEMA.replace("length = 2", "length = 3")),
        encoder(VALUES, schema=SCHEMA.replace('missing = "unknown"\n[ad.tags', "[ad.tags")),
    ],
)
def test_rows_that_depend_on_more_than_values_are_encoded_again(other):
    assert IdRemap(encoder(VALUES), encoder(VALUES[:2])).possible
    assert not IdRemap(encoder(VALUES), other).possible


def test_an_ad_of_which_the_other_table_has_no_row_is_encoded_and_rows_are_the_same():
    ads = Ads({})
    ads.add("old", encoder(VALUES))
    ads.change([Ad("a0", {"price": "dear"}), Ad("a1", {"genre": "drama"}), Ad("a2", {"price": "dear"})], put_ads)
    assert ads.tables["old"].rows(["a0", "a1", "a2"]).tolist() == [0, 2, 0]
    ads.misfits_of("old").clear()
    ads.packed.put(ads.ids.rows(["a0", "a2"]), [pack_features({"genre": "news"})] * 2)
    ads.add("new", encoder(VALUES[::-1]))
    assert ads.tables["new"].rows(["a1"]).tolist() == [0]  # not yet
    steps = sum(1 for _ in ads.fill("new", 50, put_ads))
    assert steps > 2
    assert ads.tables["new"].rows(["a0", "a1", "a2"]).tolist() == [1, 2, 3]
    assert ads.tables["old"].rows(["a0", "a1", "a2"]).tolist() == [0, 2, 0]
    assert (len(ads.tables["new"]), len(ads.tables["old"])) == (3, 1)
