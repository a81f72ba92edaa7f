"""The training reference of a bundle and the population stability index against it."""

import json
from collections import Counter

import bundles
import numpy as np
import polars as pl
import pytest
import small

from features.bundle import load_bundle
from features.vocabulary import Vocabulary
from training.datasets import vocabularies
from training.retrain import drift
from training.retrain.drift import LONGEST_VALUE, VALUES, Reference, UnfitReferenceError, make_reference, read_reference, stability


def test_the_index_is_that_worked_out_by_hand():
    # Halves are added to each bin: shares 0.25, 0.75 against 0.75, 0.25.
    assert stability(np.array([0.5, 2.5]), np.array([2.5, 0.5])) == pytest.approx(2 * 0.5 * np.log(3))
    assert stability(np.array([10.0, 20, 30]), np.array([10.0, 20, 30])) == 0.0
    assert stability(np.array([10.0, 0, 30]), np.array([10.0, 0, 30])) == 0.0


def test_an_empty_bin_gives_a_number_and_a_bin_empty_on_both_sides_gives_nothing():
    now, then = np.array([100.0, 0, 0]), np.array([0.0, 100, 0])
    assert stability(now, then) == stability(now[:2], then[:2])
    assert 5 < stability(now, then) < 20


def test_samples_of_one_population_come_to_what_chance_does():
    random = np.random.default_rng(1)
    shares = random.dirichlet(np.ones(20))
    found = [stability(random.multinomial(2_000, shares) + 0.0, random.multinomial(50_000, shares) + 0.0) for _ in range(200)]
    assert np.mean(found) == pytest.approx(19 * (1 / 2_000 + 1 / 50_000), rel=0.15)


def test_values_are_counted_by_the_bins_of_the_reference():
    reference = Reference("category", [0] * 5, values=["a", "b"])
    column = pl.Series(["a", "b", "a", None, "seen", "new"])
    assert reference.count(column, Vocabulary(["a", "b", "seen"])).tolist() == [2, 1, 1, 1, 1]
    assert reference.count(column, None).tolist() == [2, 1, 2, 1, 0]


def test_elements_of_lists_are_counted_and_an_empty_list_is_missing():
    reference = Reference("list", [0] * 5, values=["a", "b"])
    assert reference.count(pl.Series([["a", "b"], [], None, ["a"]]), None).tolist() == [2, 1, 0, 2, 0]


def test_numbers_are_counted_between_edges_and_lengths_by_how_many():
    assert Reference("number", [0] * 4, edges=[1.0, 2.0]).count(pl.Series([0.0, 1.0, 1.5, 9.0, None, float("nan")]), None).tolist() == [
        2,
        1,
        1,
        2,
    ]
    lengths = Reference("length", [0] * 4, edges=[0.0, 1.0])
    assert lengths.count(pl.Series([[], ["a"], ["a", "b"], None], dtype=pl.List(pl.String)), None).tolist() == [1, 1, 1, 1]


def test_the_reference_of_a_data_set_counts_its_train_split(tmp_path):
    data = small.data_set(tmp_path)
    made = json.loads(make_reference(data, small.vocabularies()))["fields"]
    assert set(made) == {
        "user.age",
        "user.interests",
        "user.income",
        "context.slot",
        "ad.ad_id",
        "ad.genre",
        "ad.tags",
        "ad.price",
        "history",
    }
    train = next(data.frames("train"))
    age = dict(zip([*made["user.age"]["values"], "other", "missing", "unseen"], made["user.age"]["counts"], strict=True))
    assert age == dict(train["user.age"].drop_nulls().value_counts().iter_rows()) | {
        "other": 0,
        "missing": train["user.age"].null_count(),
        "unseen": 0,
    }
    assert sum(made["ad.genre"]["counts"]) == sum(made["ad.price"]["counts"]) == sum(made["history"]["counts"]) == len(train)
    assert made["ad.genre"]["counts"][-2] == train["ad_id"].is_in(["a0"]).sum()  # the ad that lacks its features, from the table
    assert made["history"]["edges"] == [0, 1, 2]  # of at most 4 behaviours
    shares = np.array(made["user.income"]["counts"][:-1]) / sum(made["user.income"]["counts"][:-1])
    assert shares.max() < 0.2


def test_the_reference_is_bounded(tmp_path):
    data = small.data_set(tmp_path)
    frame = next(data.frames("train"))
    many = [f"v{i % 200}" for i in range(len(frame) - 1)] + ["x" * (LONGEST_VALUE + 1)]
    frame.with_columns(pl.Series("context.slot", many)).write_parquet(data.files("train")[0])
    slot = json.loads(make_reference(data, small.vocabularies()))["fields"]["context.slot"]
    assert len(slot["values"]) == VALUES
    assert max(map(len, slot["values"])) < 10
    assert sum(slot["counts"]) == len(frame)
    assert slot["counts"][-3:] == [0, 0, len(frame) - sum(slot["counts"][:VALUES])]  # the vocabulary has none of these


def published(models, text: str | None):
    files = {} if text is None else {"reference.json": text.encode()}
    return load_bundle(bundles.publish(models, "din", files=files))


def test_a_reference_is_read_from_a_bundle_that_has_one(tmp_path):
    field = {"kind": "category", "counts": [3, 1, 0, 2, 0], "values": ["feed", "side"], "edges": []}
    found = read_reference(published(tmp_path, json.dumps({"fields": {"context.slot": field}})))
    assert found is not None
    assert found["context.slot"] == Reference("category", [3, 1, 0, 2, 0], ["feed", "side"], [])
    assert read_reference(published(tmp_path / "other", None)) is None


@pytest.mark.parametrize(
    "text",
    [
        "no json",
        "[]",
        '{"fields": {"a": 1}}',
        '{"fields": {"a": {"kind": "category", "counts": [1], "values": []}}}',
        '{"fields": {"a": {"kind": "odd", "counts": [1, 1, 1]}}}',
        '{"fields": {"a": {"kind": "number", "counts": [1, NaN]}}}',
        '{"fields": {"a": {"kind": "number", "counts": ["1", "2"]}}}',
        '{"fields": {"a": {"kind": "number", "counts": [1, 2], "more": 1}}}',
        '{"fields": {"a": {"kind": "number", "counts": [1, 2, 3], "edges": ["x"]}}}',
        '{"fields": {"a": {"kind": "category", "counts": [1, 2, 3, 4], "values": [[]]}}}',
        " " * 5 * 2**20,
    ],
)
def test_what_is_no_reference_is_refused(tmp_path, text):
    with pytest.raises(UnfitReferenceError):
        read_reference(published(tmp_path, text))


def test_a_number_in_32_bits_is_no_drift_from_the_same_in_64(tmp_path):
    data = small.data_set(tmp_path)
    path = tmp_path / "train" / "0.parquet"
    frame = pl.read_parquet(path)
    prices = np.random.default_rng(0).choice([19.99, 4.35, 0.1, 1e6 + 0.3, 7.0], len(frame))
    frame.with_columns(pl.Series("user.income", prices)).write_parquet(path)
    encoder = small.encoder()
    (tmp_path / "reference.json").write_bytes(make_reference(data, encoder.vocabularies))
    found = Reference(**json.loads((tmp_path / "reference.json").read_text())["fields"]["user.income"])
    for served in (prices, prices.astype(np.float32).astype(np.float64)):
        assert stability(found.count(pl.Series(served), None), np.array(found.counts)) == 0.0


def test_deciles_of_more_numbers_than_are_kept_are_those_of_some_at_random(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(drift, "SAMPLE", 4_000)
    monkeypatch.setattr(vocabularies, "HELD", 50)
    schema, random = small.schema(), np.random.default_rng(5)
    tallies = {field.path: drift._Tally(field, 0) for field in schema.fields}
    price, genre, counts = tallies["ad.price"], tallies["ad.genre"], Counter[str]()
    for part in range(20):  # the numbers grow with the rows: those that came first count as much as the last
        price.add(pl.Series(part * 50 + 50 * random.random(1_000)))
        values = [f"v{value}" for value in range(part, part + 80) for _ in range(value)]
        genre.add(pl.Series(values))
        counts.update(values)
    assert np.abs(np.array(price.bins().edges) - np.arange(100, 1000, 100)).max() < 40  # five standard deviations of the middle one
    assert genre.bins().values == sorted(counts, key=lambda value: (-counts[value], value))[:VALUES]
