"""Position bias: examination by hand and against a known truth, and that what is served knows no place."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import small
import small_log
import torch
from scipy.special import expit

from training.datasets.encoded import Rows, encode_split
from training.datasets.log import open_log
from training.datasets.prepared import DataError, Prepared
from training.fit import batch_loss, predict
from training.networks.position_bias import PositionBias
from training.position import MOST_WEIGHT, Curve, by_exploring, by_regression, by_tower, explored, weighted
from training.train_settings import TrainError

THETA = np.array([1.0, 0.6, 0.3])


def rewritten(data: Prepared, change: Callable[[pl.DataFrame], pl.DataFrame]) -> Prepared:
    """The data set with every file changed."""
    for path in data.folder.glob("*/0.parquet"):
        change(pl.read_parquet(path)).write_parquet(path)
    return data


def at_places(rows: pl.DataFrame) -> pl.DataFrame:
    """Rows at places 1, 2 and 3 in turn, where fewer of the clicks are left; all drawn at random."""
    random, place = np.random.default_rng(1), np.arange(len(rows)) % 3
    kept = random.random(len(rows)) < THETA[place]
    return rows.with_columns(label=pl.col("label") * pl.Series(kept.astype(np.int8)), position=pl.Series(place + 1), propensity=0.5)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return rewritten(small.data_set(tmp_path_factory.mktemp("placed"), (1_200, 300, 300)), at_places)


@pytest.fixture(scope="module")
def rows(data: Prepared) -> Rows:
    return encode_split(data, "train", small.encoder())


def test_rankings_that_explored_are_weighed_down_to_where_they_are_whole(tmp_path: Path) -> None:
    shown = [  # request, place, propensity, candidates: of three ads drawn evenly weights are 1 / (3 p) and 1 / (2 p) more
        ("a", 1, 0.5, ["x", "y", "z"]),
        ("a", 2, 0.25, None),
        ("a", 3, 1.0, None),  # nothing else was left
        ("b", 1, 1.0, ["x", "y", "z"]),  # the best ad, for certain
        ("b", 2, 0.5, None),
        ("c", 1, 0.2, ["x", "y"]),
        ("c", 3, 0.5, None),  # the one above was not seen
        ("d", 1, 0.5, None),  # nobody knows of how many
    ]
    columns = pl.DataFrame(shown, schema=["request_id", "position", "propensity", "candidates"], orient="row")
    found = explored(rewritten(small.data_set(tmp_path, (8, 8, 8)), lambda frame: frame.hstack(columns)))
    told = {(r, k): w for r, k, w in found.select("request_id", "position", "weight").iter_rows()}
    assert told == {("a", 1): pytest.approx(2 / 3), ("a", 2): pytest.approx(4 / 3), ("c", 1): pytest.approx(2.5)}


def test_examination_by_exploring_is_the_ratio_of_the_rates_and_its_interval_the_delta_methods(tmp_path: Path) -> None:
    place = np.repeat([1, 2, 3], [200, 200, 50])
    label = np.concatenate([np.arange(200) < 40, np.arange(200) < 10, np.arange(50) < 5]).astype(np.int8)
    columns = {"position": pl.Series(place), "label": pl.Series(label), "propensity": 0.5}
    found = by_exploring(rewritten(small.data_set(tmp_path, (450, 450, 450)), lambda frame: frame.with_columns(**columns)), 3)
    off = 1.959964 * math.sqrt(0.8 / 40 + 0.95 / 10)
    assert found.value == pytest.approx([1, 0.25, 0.25])  # the third has too few rows of its own
    assert found.low[:2] == pytest.approx([1, 0.25 * math.exp(-off)])
    assert found.high[:2] == pytest.approx([1, 0.25 * math.exp(off)])
    assert found.rows == pytest.approx([200, 200, 50])


def test_regression_em_finds_the_examination_of_a_log_whose_best_ads_stand_above(rows: Rows) -> None:
    random = np.random.default_rng(0)
    some = rows.take(random.integers(0, len(rows), 30_000))
    relevant = expit(np.sin(some.ad.ids[:, 0] * 1.7) * 1.5 + (some.ad.ids[:, 1] == 2) - 1)
    place = np.clip(np.round(2 - 2 * relevant + random.normal(0, 0.6, len(some))), 0, 2).astype(np.uint8)
    labels = (random.random(len(some)) < relevant * THETA[place]).astype(np.float32)
    naive = np.bincount(place, labels) / np.bincount(place)
    found = by_regression(replace(some, labels=labels, place=place), 3)
    assert np.abs(found.value - THETA).max() < 0.06
    assert np.abs(naive / naive[0] - THETA).max() > 0.12
    assert (found.low[1:] < found.value[1:]).all()
    assert (found.value[1:] < found.high[1:]).all()


def test_clicks_are_weighed_by_examination_up_to_a_bound_and_people_are_told_what_is_left(rows: Rows) -> None:
    one, curve = np.ones(4), Curve.of(np.array([0.2, 0.1, 0.01]), np.zeros(3), np.ones(3))
    few = replace(rows.take(np.arange(4)), labels=np.array([1, 1, 1, 0], np.float32), place=np.array([0, 1, 2, 2], np.uint8))
    assert weighted(few, curve).weight == pytest.approx([1, 2, MOST_WEIGHT, 1])
    assert weighted(replace(few, weight=3 * one.astype(np.float32)), curve).weight == pytest.approx([3, 6, 30, 3])
    assert weighted(few, None) is few
    told = " ".join(curve.summary(weighted(few, curve)))
    assert "1.00 0.50 0.05" in told
    assert f"3 clicks weigh as much as {13**2 / 105:.0f} of one weight; weights are at most 10, where 20 were due" in told


def test_towers_are_a_sum_of_logits_and_a_product_of_probabilities() -> None:
    logits, place = torch.tensor([0.3, 0.3, -2.0]), torch.tensor([0, 1, 1])
    for product in (False, True):
        tower = PositionBias(2, product)
        tower.bias.data = torch.tensor([0.0, -1.0])
        bias = np.array([0.0, -1.0, -1.0])
        expected = expit(logits.numpy()) * expit(bias) if product else expit(logits.numpy() + bias)
        assert expit(tower(logits, place).detach().numpy()) == pytest.approx(expected, rel=1e-5)
        curve = by_tower(tower, logits.numpy(), np.array([0, 1, 1, 1]))
        means = [expit(tower.at(logits.numpy(), np.full(3, k))).mean() for k in (0, 1)]
        assert curve.value == pytest.approx([1, means[1] / means[0]])
        assert curve.rows.tolist() == [1, 3]


@pytest.mark.parametrize("kind", ["tower", "pal", "ips", "em"])
def test_what_is_served_has_no_place_and_is_calibrated_to_the_places_of_the_log(data: Prepared, kind: str) -> None:
    trained = small.quick(data, "lr" if kind == "tower" else "deepfm", epochs=8, position_bias=kind)
    assert not any("position" in name for name in trained.network.state_dict())
    assert trained.examination is not None
    assert trained.examination.value[0] == 1
    assert (trained.examination.value[1:] < [0.85, 0.6]).all()
    valid = encode_split(data, "valid", trained.encoder)
    p = trained.calibration.on_log(predict(trained.network, valid))
    assert p.mean() == pytest.approx(valid.labels.mean(), abs=1e-6)


def test_the_loss_is_that_of_the_click_at_its_place(rows: Rows) -> None:
    network = small.network("deepfm")
    network.position_bias = PositionBias(3, product=False)
    network.position_bias.bias.data = torch.tensor([0.0, -1.0, 0.5])
    some, place = np.arange(6), np.array([0, 1, 2, 0, 1, 2], np.uint8)
    few = replace(rows.take(some), place=place)
    logits = predict(network, few) + np.array([0.0, -1.0, 0.5])[place]
    expected = -np.log(np.where(few.labels > 0, expit(logits), expit(-logits))).mean()
    assert batch_loss(network, few.batch(some), few.labels_of(some), 0).item() == pytest.approx(expected, rel=1e-5)


def test_a_log_is_trained_on_by_the_places_that_it_has(tmp_path: Path) -> None:
    offered = pl.when(pl.col("position") == 1).then(pl.lit(["a0", "a1", "a2"])).alias("candidates")
    folder = small_log.rewrite(
        small_log.write(tmp_path, hours=20), lambda frame: frame.with_columns(offered, propensity=1 / (4 - pl.col("position")))
    )
    for kind in ("tower", "ips"):
        found = small.quick(open_log(folder), epochs=1, position_bias=kind).examination
        assert found is not None
        assert len(found.value) == 3
    with pytest.raises(DataError, match="makes the place a feature, and position_bias keeps it out"):
        small.quick(open_log(folder, position_as="context.slot"), position_bias="tower")


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({"position": None}, {"position_bias": "tower"}, "no column position"),
        ({"position": pl.lit(2, pl.Int64)}, {"position_bias": "pal"}, "all ads were shown at place 2"),
        ({"position": pl.col("position") - 1}, {"position_bias": "em"}, "has gaps, or places below 1"),
        ({"propensity": pl.lit(1.0)}, {"position_bias": "ips"}, "no ad of train was drawn at random"),
        ({"label": pl.lit(0, pl.Int8)}, {"position_bias": "ips"}, "with clicks are needed"),
        ({}, {"position_bias": "tower", "heads": "click-conversion"}, "heads asks for conversion too"),
    ],
)
def test_a_data_set_that_cannot_be_trained_so_is_refused(
    tmp_path: Path, change: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    gone = [name for name, value in change.items() if value is None]
    there = {name: value for name, value in change.items() if value is not None}
    wrong = rewritten(small.data_set(tmp_path, (400, 90, 90)), lambda frame: at_places(frame).drop(gone).with_columns(**there))
    with pytest.raises(DataError, match=message):
        small.quick(wrong, **settings)


def test_a_sampled_data_set_and_another_word_are_refused(data: Prepared) -> None:
    with pytest.raises(DataError, match=r"kept 0\.5 of its non-clicks.*say position_bias=tower"):
        small.quick(replace(data, negative_sampling=0.5), position_bias="ips")
    with pytest.raises(TrainError, match="position_bias is 'x'; it must be one of tower, pal, ips, em"):
        small.quick(data, position_bias="x")
