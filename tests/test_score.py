"""`adrank score` against torch and numpy, `adrank compare` against scikit-learn and a bootstrap of its own."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import small
from scipy.special import expit
from sklearn import metrics as sklearn

from features.bundle import Bundle, load_bundle
from tests.test_cli import refused, run
from training.datasets.encoded import encode_split
from training.datasets.prepared import DataError, Prepared, open_prepared
from training.export.export import export
from training.fit import predict_heads
from training.scoring import compare_bundles, score_rows
from training.segments import segments
from training.train import Trained

HOSTILE = "<b>[red]$x$"


@pytest.fixture(scope="module")
def made(traced_export: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Prepared, list[Trained], list[Bundle]]:
    """A log that kept half of its non-clicks, of which some conversions are unknown, and two bundles of it."""
    folder = tmp_path_factory.mktemp("scoring")
    small.data_set(folder, (200, 100, 300))
    random = np.random.default_rng(3)
    for path in folder.glob("*/*.parquet"):
        frame = pl.read_parquet(path)
        converted = pl.Series((frame["label"].to_numpy() * (random.random(len(frame)) < 0.5)).astype(np.int8))
        slot = pl.when(pl.col("context.slot") == "side").then(pl.lit(HOSTILE)).otherwise(pl.col("context.slot"))
        known = pl.Series(random.random(len(frame)) > 0.2)
        frame = frame.with_columns(slot.alias("context.slot"), conversion=pl.when(known).then(converted).otherwise(None))
        frame.with_columns(ts=pl.int_range(len(frame))).write_parquet(path)
    (folder / "data.toml").write_text("negative_sampling = 0.5\n")
    data = open_prepared(folder)
    trained = [small.quick(data, "deepfm", heads="click-conversion", batch=32, epochs=epochs) for epochs in (1, 6)]
    paths = [export(data, each, folder / "models", "m", small.quiet()) for each in trained]
    return data, trained, [load_bundle(path) for path in paths]


def test_a_rows_scores_are_what_torch_and_numpy_make_of_its_logits(made: Any, tmp_path: Path) -> None:
    data, trained, bundles = made
    out = tmp_path / "scores.parquet"
    out.write_text("of before")
    code, said, complaint = run("score", "--bundle", bundles[1].path, "--data", data.folder, "--out", out)
    assert code in (0, None), complaint
    assert said == f"{out}: 300 rows of test, columns ts, user_id, ad_id, label, conversion, p_click, p_conversion\n"
    assert [path.name for path in tmp_path.iterdir()] == ["scores.parquet"]
    scored, raw = pl.read_parquet(out), pl.read_parquet(data.folder / "test" / "0.parquet")
    assert scored.select("ts", "user_id", "ad_id", "label", "conversion").equals(
        raw.select("ts", "user_id", "ad_id", "label", "conversion")
    )
    logits = predict_heads(trained[1].network, encode_split(data, "test", trained[1].encoder))
    click, conversion = (trained[1].calibrations[head] for head in ("click", "conversion"))
    on_log = expit(click.scale * logits["click"].astype(np.float64) + click.shift)
    served = expit(click.scale * logits["click"].astype(np.float64) + click.shift + np.log(0.5))
    assert scored["p_click"].to_numpy() == pytest.approx(served, abs=1e-6)
    converted = expit(conversion.scale * logits["conversion"].astype(np.float64) + conversion.shift)
    assert scored["p_conversion"].to_numpy() == pytest.approx(converted * served / on_log, abs=1e-6)
    assert served.std() > 0.02


def test_a_comparison_is_scikit_learns_by_head_and_segment(made: Any) -> None:
    data, _, (first, second) = made
    parts = compare_bundles(first, second, data, "test", "context.slot", small.quiet())
    assert [(part.head, part.segment) for part in parts] == [
        (head, value) for head in ("click", "conversion") for value in (None, *(name for name, _ in segments(data, "test", "context.slot")))
    ]
    raw = pl.read_parquet(data.folder / "test" / "0.parquet")
    tables = [score_rows(bundle, data, "test", small.quiet()) for bundle in (first, second)]
    for part in parts:
        rows = raw["context.slot"].to_numpy() == part.segment if part.segment else np.ones(300, np.bool_)
        label = "label" if part.head == "click" else "conversion"
        rows = rows & raw[label].is_not_null().to_numpy()
        labels = raw[label].to_numpy()[rows]
        found = []
        for table, measures in zip(tables, (part.found.champion, part.found.challenger), strict=True):
            odds = table["p_click"].to_numpy().astype(np.float64) / (1 - table["p_click"].to_numpy().astype(np.float64)) / 0.5
            p = odds / (1 + odds)
            if part.head == "conversion":
                p *= table["p_conversion"].to_numpy() / table["p_click"].to_numpy()
            p = p[rows]
            assert measures.auc == pytest.approx(sklearn.roc_auc_score(labels, p))
            assert measures.log_loss == pytest.approx(sklearn.log_loss(labels, p), rel=1e-6)
            assert measures.calibration_ratio == pytest.approx(p.sum() / labels.sum())
            found.append(-np.where(labels > 0, np.log(p), np.log1p(-p)))
        of_users = [np.flatnonzero(raw["user_id"].to_numpy()[rows] == user) for user in sorted(set(raw["user_id"].to_numpy()[rows]))]
        random, drawn = np.random.default_rng(9), []
        for _ in range(1000):  # users with all of their rows
            taken = np.concatenate([of_users[i] for i in random.integers(0, len(of_users), len(of_users))])
            drawn.append((found[1] - found[0])[taken].mean())
        low, high = np.percentile(drawn, [2.5, 97.5])
        ours = part.found.differences["log_loss"]
        assert ours.value == pytest.approx((found[1] - found[0]).mean(), abs=1e-6)
        assert (ours.low, ours.high) == pytest.approx((low, high), abs=0.15 * (high - low))


def test_it_is_printed_as_tables_and_as_json(made: Any) -> None:
    data, _, (first, second) = made
    words = ("compare", first.path, second.path, "--data", data.folder, "--segment", "context.slot")
    code, shown, complaint = run(*words)
    assert code in (0, None), complaint
    for text in (HOSTILE, "p(click)", "p(conversion)", f"m {second.version}", "second less first"):
        assert text in shown
    document = json.loads(run(*words[:-2], "--json")[1])
    assert (document["split"], document["field"], len(document["parts"])) == ("test", None, 2)
    assert document["parts"][0]["differences"]["auc"]["value"] > 0


def test_segments_are_values_by_how_many_rows_they_have_or_quarters(made: Any) -> None:
    data = made[0]
    raw = pl.read_parquet(data.folder / "test" / "0.parquet")
    ages = raw["user.age"].value_counts().drop_nulls().sort("count", "user.age", descending=[True, False])["user.age"].to_list()
    found = segments(data, "test", "user.age")
    assert [name for name, _ in found] == [*ages, "no value"]
    assert [int(rows.sum()) for _, rows in found] == [*((raw["user.age"] == age).sum() for age in ages), raw["user.age"].null_count()]
    ads = segments(data, "test", "ad.ad_id")
    assert [len(ads), ads[-1][0]] == [9, "4 other values"]
    assert sum(int(rows.sum()) for _, rows in ads) == 300
    incomes = np.array([np.nan if user == "u1" else float(user[1:]) for user in raw["user_id"]])
    edges = np.nanquantile(incomes, [0, 0.25, 0.5, 0.75, 1])
    quarters = dict(segments(data, "test", "user.income"))
    assert list(quarters) == [
        f"up to {edges[1]:g}",
        *(f"{edges[i]:g} to {edges[i + 1]:g}" for i in (1, 2)),
        f"above {edges[3]:g}",
        "no value",
    ]
    assert (quarters[f"{edges[1]:g} to {edges[2]:g}"] == ((incomes > edges[1]) & (incomes <= edges[2]))).all()
    assert (quarters["no value"] == np.isnan(incomes)).all()
    assert (segments(data, "test", "ad.price")[-1][1] == (raw["ad_id"] == "a0").to_numpy()).all()  # of the table of ads


def test_what_cannot_be_scored_or_compared_is_a_sentence(made: Any, tmp_path: Path) -> None:
    data, _, (first, second) = made
    for path in ("user.interests", "ad.none"):
        with pytest.raises(DataError, match=f"{path} is no field that rows can be told apart by; the data set has user.user_id, user.age,"):
            segments(data, "test", path)
    score = ("score", "--bundle", first.path, "--data", data.folder)
    refused(run(*score, "--out", tmp_path / "none" / "x.parquet"), "cannot write .*none/x.parquet: ")
    (tmp_path / "test").mkdir()
    raw = pl.read_parquet(data.folder / "test" / "0.parquet")
    raw.drop("context.slot").write_parquet(tmp_path / "test" / "0.parquet")
    for name in ("schema.toml", "ads.parquet"):
        (tmp_path / name).write_bytes((data.folder / name).read_bytes())
    lacking = "no column holds context.slot, which the schema 'small' has"
    refused(run("score", "--bundle", first.path, "--data", tmp_path, "--out", tmp_path / "x"), lacking)
    refused(run("compare", first.path, second.path, "--data", tmp_path), lacking)
    assert not (tmp_path / "x").exists()
