"""Counters from an event to the log: events change them once, a ranking reads them, and training reads what was served."""

import math
import time
from collections import Counter
from itertools import permutations

import bundles
import pytest
from test_counters import COUNTERS
from test_served_log import World

from features.counters import KEYS_KEPT, VALUES_KEPT, CountedPart, with_event
from features.events import Event
from features.policy import EpsilonGreedy
from features.served import pack_served
from features.state import Ad, UserState, pack_ad, pack_user, unpack_ad, unpack_user
from features.streams import Entry
from service.api.wire import OmittedAnswer
from service.errors import InvalidError
from service.feedback.ingest import Ages, Intake
from service.ranking.rules import Rules
from training.join.raw import LogColumns, impressions_of

pytestmark = pytest.mark.anyio
NOW = float(round(time.time()))


class Counted(World):
    """A world whose model has counters, at `NOW`, and what takes its events."""

    def __init__(self, repository):
        super().__init__(repository)
        self.ranker._clock = lambda: NOW
        self.intake = Intake(self.store, self.metrics, lambda: [self.encoder], Ages(1e6, 1e6), lambda: NOW)
        self.intake.features = self.catalogue.features

    async def tell(self, *events):
        """Events that are (type, seconds ago, user, ad), brought twice."""
        made = [Event(kind, f"{kind}-{i}", NOW - ago, user, "r", ad) for i, (kind, ago, user, ad) in enumerate(events)]
        for status in ("accepted", "duplicate"):
            assert {outcome.status for outcome in await self.intake.take(made)} == {status}
        self.cursor = await self.catalogue._step(self.cursor)


@pytest.fixture(params=["hashed", "listed"])
async def counted(request, tmp_path, monkeypatch):
    """With ids of ads that are hashed, or that the vocabulary lists, whose texts the catalogue then shares."""
    schema = bundles.SCHEMA if request.param == "hashed" else bundles.SCHEMA.replace("buckets = 5000\n", "")
    monkeypatch.setattr(bundles, "SCHEMA", schema + COUNTERS.replace("topic", "genre"))
    bundles.publish(tmp_path)
    return await Counted(tmp_path).load()


def after(window, *ages):
    return pytest.approx(sum(math.exp(-age / window) for age in ages))


async def test_a_ranking_is_made_of_what_events_counted_and_the_log_has_the_very_numbers(counted):
    await counted.tell(
        ("impression", 7_300, "u1", "a1"),
        ("click", 7_200, "u1", "a1"),
        ("impression", 60, "u1", "a1"),
        ("click", 600, "u1", "a4"),
        ("click", 30, "u2", "a1"),
        ("impression", 100, "u1", "no ad"),
        ("click", 90, "u1", "no ad"),
    )
    made = await counted.rank(ad_ids=["a1", "a4", "a2", "no ad"], sent={2: {"rate": 0.5}}, top_k=4)
    record = counted.check(made)
    assert record.user["shown"] == after(600, 7_300, 60, 100)
    ads = record.sent
    assert [ads[ad]["clicks"] for ad in ("a1", "a4", "a2", "no ad")] == [after(3_600, 7_200, 30), after(3_600, 600), 0, 0]
    day = 86_400
    shown, clicked = math.exp(-7_300 / day) + math.exp(-60 / day), math.exp(-7_200 / day) + math.exp(-30 / day)
    assert ads["a1"]["rate"] == pytest.approx((2 + clicked) / (10 + shown))
    assert ads["a2"]["rate"] == 0.5, "what was sent goes before"
    comedies = after(604_800, 7_200, 600)
    assert [ads[ad]["liked"] for ad in ("a1", "a4", "a2", "no ad")] == [comedies, comedies, 0, 0]
    assert [ads[ad]["seen"] for ad in ("a1", "a4", "a2", "no ad")] == [after(day, 7_300, 60), 0, 0, after(day, 100)]
    layout = counted.encoder.layouts["ad"].numbers
    columns = {slot.field.name: made.encoded.feeds["ad_numbers"][0, :, slot.start] for slot in layout}
    assert columns["liked"] == pytest.approx([math.log1p(ads[ad]["liked"]) for ad in made.encoded.request.candidates])
    entry = Entry(f"{int(NOW * 1000)}-0", pack_served(record))
    (rows,) = impressions_of([entry], "served", LogColumns(counted.encoder.schema)).frames.values()
    assert rows["user.shown"].to_list() == [record.user["shown"]]
    for name in ("clicks", "rate", "liked", "seen"):
        assert rows[f"ad.{name}"].to_list() == [[ads[ad][name] for ad in record.ad_ids]], name


async def test_capped_and_clicked_ads_are_no_candidates_and_propensities_are_those_among_the_rest(counted):
    shown = [("impression", ago, "u1", ad) for ad, times in (("a1", 2), ("a2", 1), ("a5", 3)) for ago in range(1, times + 1)]
    await counted.tell(*shown, ("click", 5, "u1", "a3"))
    rules = Rules(frequency={"seen": 2}, already_clicked=True, pinned={2: "a5"})
    asked = {"ad_ids": ["a1", "a2", "a3", "a4", "a5", "a6"], "rules": rules, "policy": EpsilonGreedy(1.0)}
    orders = Counter()
    for _ in range(600):
        made = await counted.rank(**asked)
        assert set(made.omitted) == {("a1", "frequency_seen"), ("a3", "already_clicked")}
        assert [OmittedAnswer(ad_id=ad_id, reason=reason) for ad_id, reason in made.omitted]
        assert made.propensity == pytest.approx([1 / 3, 1, 1 / 2, 1])
        orders[tuple(made.ad_ids)] += 1
    every = {(first, "a5", *rest) for first, *rest in permutations(["a2", "a4", "a6"])}
    assert orders.keys() == every, "each order is as likely as the product of its propensities"
    assert all(abs(count - 100) < 50 for count in orders.values())
    with pytest.raises(InvalidError, match=r"liked is no counter of model din by = .*: seen"):
        await counted.rank(rules=Rules(frequency={"liked": 2}))


async def test_an_explored_ranking_logs_the_counters_of_all_candidates_and_a_failing_store_counts_nothing(counted):
    await counted.tell(("click", 60, "u1", "a1"), ("impression", 60, "u1", "a1"))
    counted.store.failure = True
    made = await counted.rank(ad_ids=["a1", "a2"])
    record = counted.check(made)
    assert record.user["shown"] == 0
    assert record.sent["a1"]["clicks"] == after(3_600, 60), "an ad's are in memory"
    assert record.sent["a1"]["liked"] == 0
    assert {entry.stage for entry in made.degraded} >= {"user"}


async def test_an_ad_that_is_only_counted_with_is_not_encoded_anew_and_a_new_table_knows_its_counts(counted):
    await counted.tell(("click", 0, "u1", "a1"))
    ads, encoded = counted.catalogue._ads, []
    ads.change([Ad("a1", bundles.ADS["a1"], counts={"click@3600": {"": [7.0, NOW]}})], lambda _table, ads: encoded.extend(ads) or ())
    assert encoded == []
    table = counted.catalogue.table(counted.models.loaded["din"].bundle.fingerprint)
    assert table.counters(table.rows(["a1", "a2"]), NOW)[0].tolist() == [7.0, 0.0]
    await counted.catalogue.add("another", counted.encoder)
    other = counted.catalogue.table("another")
    assert other.counters(other.rows(["a1", "a2"]), NOW + 3_600)[0] == pytest.approx([7.0 / math.e, 0.0])


def test_counts_stay_bounded_and_survive_the_store():
    counts = {}
    for i in range(VALUES_KEPT + 10):
        counts = with_event(counts, [CountedPart("click@60@x", f"v{i}", 60.0)], 1_000.0 + i)
    for i in range(KEYS_KEPT):
        counts = with_event(counts, [CountedPart(f"click@{i + 100}", "", 100.0)], 2_000.0)
    assert len(counts) == KEYS_KEPT
    assert "click@60@x" not in counts, "what was not touched for longest goes"
    counts = with_event({"k": {f"v{i}": [1.0, 1_000.0 + i] for i in range(VALUES_KEPT)}}, [CountedPart("k", "new", 60.0)], 1_100.0)
    assert "v0" not in counts["k"]
    assert len(counts["k"]) == VALUES_KEPT
    counts = {"k": {"a": (1.5, 2.0)}}
    assert unpack_user("u", pack_user("u", UserState(counts=counts))).counts == counts
    assert unpack_ad("a", pack_ad(Ad("a", {"x": 1}, counts=counts))) == Ad("a", {"x": 1}, counts=counts)
