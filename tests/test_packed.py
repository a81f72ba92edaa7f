"""The catalogue's packed features against a dict, while what is in the buffer changes its place again and again."""

import bundles
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.state import Ad, pack_features
from service.catalogue import packed
from service.catalogue.ads import Ads, View
from service.catalogue.catalogue import put_ads

AD_IDS = [f"a{i}" for i in range(12)]

ads_of_a_change = st.lists(
    st.builds(Ad, st.sampled_from(AD_IDS), st.one_of(st.just({}), st.fixed_dictionaries({"genre": st.text(max_size=9)})), st.booleans()),
    max_size=6,
    unique_by=lambda ad: ad.ad_id,
)


@given(st.lists(ads_of_a_change, max_size=15))
def test_features_are_those_of_a_dict_now_and_at_each_moment_that_somebody_looks_at(changes):
    ads, now, moments = Ads({}), dict[str, bytes](), list[tuple[View, dict[str, bytes]]]()
    ads.add("f", bundles.encoder())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "SMALL", 0)
        patch.setattr(packed, "AT_ONCE", 3)
        for change in changes:
            moments.append((View(ads, "f"), dict(now)))
            ads.change(change, put_ads)
            now |= {ad.ad_id: pack_features(ad.features) for ad in change if ad.active or ad.features}
            assert ads.features(AD_IDS) == {ad_id: now.get(ad_id) for ad_id in AD_IDS}
            for view, then in moments:
                assert view.features(AD_IDS) == then


def test_the_buffer_does_not_grow_with_the_changes(monkeypatch):
    monkeypatch.setattr(packed, "SMALL", 100)
    ads = Ads({})
    ads.add("f", bundles.encoder())
    for price in range(1_000):
        ads.change([Ad(f"a{i}", {"price": price}) for i in range(price % 7)], put_ads)
    assert len(ads.packed._buffer._bytes) < 300, "six ads have 60 bytes"
    assert ads.features(["a0", "a5"]) == {"a0": pack_features({"price": 999}), "a5": pack_features({"price": 993})}
