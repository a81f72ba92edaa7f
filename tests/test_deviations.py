import io
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from features.encode import Encoder
from features.schema import parse_schema
from features.vocabulary import Vocabularies, Vocabulary
from training.datasets.encoded import encode_split
from training.datasets.prepared import Prepared, open_prepared, write_split, write_tables, writing
from training.deviations import LEAST, ad_deviations, deviations, npy

SCHEMA = parse_schema('name = "d"\n[user.user_id]\nkind = "category"\n[ad.ad_id]\nkind = "category"\n')


def test_worked_out_by_hand() -> None:
    """Two ads of 100 impressions, 10 and 30 clicks, and one that nobody saw."""
    rate = 40.5 / 201
    weight = 100 * rate * (1 - rate)
    off = np.array([10 - 100 * rate, 30 - 100 * rate]) / weight
    prior = (weight * (off**2).sum() - 1) / (2 * weight - weight)
    pseudo = 1 / (prior * rate * (1 - rate))
    p = (np.array([10, 30]) + pseudo * rate) / (100 + pseudo)
    expected = [*(1 / np.sqrt(1 / prior + 100 * p * (1 - p))), np.sqrt(prior)]
    assert deviations(np.array([100.0, 100, 0]), np.array([10.0, 30, 0])) == pytest.approx(expected, rel=1e-6)


def test_how_much_ads_differ_is_found_in_what_was_drawn() -> None:
    random = np.random.default_rng(0)
    effect = random.normal(0, 0.5, 5_000)
    shown = random.integers(50, 500, 5_000).astype(np.float64)
    clicks = random.binomial(shown.astype(int), 1 / (1 + np.exp(2 - effect))).astype(np.float64)
    found = deviations(np.append(shown, 0.0), np.append(clicks, 0.0))
    assert found[-1] == pytest.approx(0.5, rel=0.12)
    assert np.corrcoef(found[:-1], shown)[0, 1] < -0.8


@pytest.mark.parametrize(("shown", "clicks"), [([0.0, 0], [0.0, 0]), ([5.0], [0.0]), ([5.0], [5.0]), ([9.0, 9], [3.0, 3])])
def test_little_or_nothing_leaves_the_least_prior(shown: list[float], clicks: list[float]) -> None:
    found = deviations(np.array(shown), np.array(clicks))
    assert np.isfinite(found).all()
    assert (found <= np.float32(LEAST)).all()
    assert (found > 0).all()


def test_ads_are_told_by_their_ids_and_those_without_one_are_new(tmp_path: Path) -> None:
    rows = pl.DataFrame({"label": [1, 0, 0, 1, 1], "user_id": ["u"] * 5, "ad_id": ["a", "a", "b", "rare", ""], "ts": range(5)})
    with writing(tmp_path / "d") as folder:
        write_tables(folder, SCHEMA, pl.DataFrame({"ad_id": ["a", "b"]}), None)
        for split in ("train", "valid"):
            write_split(folder, split, [rows.cast({"label": pl.Int8})])
    data: Prepared = open_prepared(tmp_path / "d")
    vocabulary = Vocabulary(["a", "b"])
    encoder = Encoder(SCHEMA, Vocabularies({"user_id": Vocabulary(["u"]), "ad_id": vocabulary}, {}))
    found = ad_deviations(train := encode_split(data, "train", encoder), encoder)
    assert np.load(io.BytesIO(npy(found))) == pytest.approx(deviations(np.array([0.0, 0, 2, 1]), np.array([0.0, 0, 1, 0])))
    without = parse_schema('name = "d"\n[ad.genre]\nkind = "category"\n')
    assert ad_deviations(train, Encoder(without, Vocabularies({"genre": Vocabulary([])}, {}))) is None
