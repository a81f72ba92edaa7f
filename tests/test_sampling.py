"""How rows were sampled is a fact of a data set: it shifts what a model says of that data set, and nothing after it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import logs
import numpy as np
import polars as pl
import pytest
import small
from test_csv_table import SCHEMA, prepare_csv

from features.bundle import current_path, load_bundle
from features.policy import parse_policy
from features.served import ServedRecord
from features.state import pack_features
from service.ranking.scorer import Scorer
from training import train as training
from training.calibrate import as_sampled, fit
from training.datasets.encoded import encode_split
from training.datasets.log import open_log
from training.datasets.prepared import DataError, Prepared, open_prepared
from training.export.export import evaluate_bundle
from training.fit import predict
from training.join.log import open_log as open_joined
from training.networks import NETWORKS
from training.networks.contract import Fields
from training.networks.warm_start import warm_start
from training.offpolicy.replay import replay
from training.retrain import pipeline as retraining
from training.retrain.drift import make_reference
from training.retrain.pipeline import RetrainRequest, retrain
from training.retrain.publish import train_and_publish

pytestmark = pytest.mark.usefixtures("traced_export")
KEPT = 0.1
START = 1_763_769_600
QUICK = {"epochs": "2", "batch": "128", "learning_rate": "0.02", "embedding_l2": "0.0001", "threads": "1", "unknown_rate": "0"}
LENIENT = {**QUICK, "gate": "not-worse", "log_loss_tolerance": "0.1"}
NETWORK = {"embedding": "4", "hidden": "8", "dropout": "0.0"}
PACKED = {f"a{i}": pack_features(small.ad_features(i)) for i in range(small.ADS)}


def impressions(random: np.random.Generator, count: int) -> pl.DataFrame:
    """Rows of `small`, of which about one in six is clicked."""
    frame = small.rows_of(random, count)
    user, ad = (frame[name].str.slice(1).cast(pl.Int64).to_numpy() for name in ("user_id", "ad_id"))
    p = 1 / (1 + np.exp(-(1.5 * np.sin(ad) + 2.0 * ((user % 3) == (ad % 3)) - 3.2)))
    return frame.with_columns(label=pl.Series((random.random(count) < p).astype(np.int8)))


def sampled_set(folder: Path, counts: tuple[int, int, int] = (8_000, 6_000, 6_000)) -> Prepared:
    """A data set that kept all clicks and a tenth of the rest."""
    random = np.random.default_rng(3)
    folder.mkdir()
    small.data_set(folder, rows=(9, 9, 9))
    for split, count in zip(("train", "valid", "test"), counts, strict=True):
        whole = impressions(random, count)
        kept = (whole["label"].to_numpy() == 1) | (random.random(count) < KEPT)
        whole.filter(pl.Series(kept)).write_parquet(folder / split / "0.parquet")
    (folder / "data.toml").write_text(f"negative_sampling = {KEPT}\n")
    return open_prepared(folder)


def served(path: Path, count: int, seed: int) -> tuple[list[ServedRecord], set[tuple[str, str]]]:
    """Rankings of one ad each by the live version's graph, and which of them were clicked."""
    live, frame = load_bundle(path), impressions(np.random.default_rng(seed), count)
    scorer = Scorer(path / "model.onnx", "cpu", 1)
    rankings, clicks = [], set()
    for i, row in enumerate(frame.iter_rows(named=True)):
        ads = {ad_id: PACKED[ad_id] for ad_id in (row["ad_id"], *row["history"]) if ad_id in PACKED}
        user = {name: row[f"user.{name}"] for name in ("age", "interests", "income") if row[f"user.{name}"] is not None}
        one = ServedRecord(
            f"r{i}", START + i * 20.0, "shop", live.version, row["user_id"], user, {"slot": row["context.slot"]}, row["history"][-4:],
            [row["ad_id"]], [0.0], [1.0], ads=ads,
        )  # fmt: skip
        rankings.append(replace(one, p_click=[float(p) for p in scorer.score(one.feeds(live.encoder))[0]]))
        if row["label"]:
            clicks.add((f"r{i}", row["ad_id"]))
    return rankings, clicks


def over_clicks(rankings: list[ServedRecord], clicks: set[tuple[str, str]]) -> float:
    return sum(p for each in rankings for p in each.p_click) / len(clicks)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return sampled_set(tmp_path_factory.mktemp("sampled") / "data")


@pytest.fixture(scope="module")
def first(data: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with a model that was trained on the sampled log."""
    models = tmp_path_factory.mktemp("first")
    train_and_publish(data, "deepfm", models, "shop", {**QUICK, **NETWORK}, small.quiet())
    return models


@pytest.fixture(scope="module")
def log(first: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[ServedRecord], set[tuple[str, str]]]:
    """What it served, joined, in a log whose schema the joiner took from it."""
    folder = tmp_path_factory.mktemp("log") / "log"
    schema = open_joined(folder, first, "shop").schema
    rankings, clicks = served(current_path(first, "shop"), 5_000, seed=5)
    return logs.write_log(folder, rankings, schema, clicks), rankings, clicks


def test_what_is_served_before_and_after_a_retraining_is_the_click_rate(
    first: Path, log: tuple[Path, list[ServedRecord], set[tuple[str, str]]], tmp_path: Path
) -> None:
    folder, rankings, clicks = log
    assert len(clicks) / len(rankings) < 0.25
    assert over_clicks(rankings, clicks) == pytest.approx(1, rel=0.05)
    models = shutil.copytree(first, tmp_path / "models")
    report = retrain(RetrainRequest(folder, models, "shop", holdout=0.2, valid=0.4, settings=LENIENT), small.quiet())
    assert report.published, report.reasons
    assert report.comparison
    assert report.comparison["click"].champion
    assert report.past.click_rate == pytest.approx(len(clicks) / len(rankings), rel=0.1)
    for metrics in (report.comparison["click"].champion, report.comparison["click"].challenger):
        assert metrics.calibration_ratio == pytest.approx(1, rel=0.15)  # of 1,000 rows
    assert over_clicks(*served(current_path(models, "shop"), 5_000, seed=6)) == pytest.approx(1, rel=0.05)


def test_the_gate_sees_a_challenger_that_is_off_by_the_sampling(
    first: Path, log: tuple[Path, list[ServedRecord], set[tuple[str, str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = shutil.copytree(first, tmp_path / "models")
    monkeypatch.setattr(training, "fit", lambda logits, labels, _sampling, _maturity: fit(logits, labels, KEPT))
    order = RetrainRequest(log[0], models, "shop", holdout=0.2, valid=0.4, settings=LENIENT)
    report = retrain(order, small.quiet())
    assert report.published is None
    assert "calibration is worse" in report.reasons[0]
    assert report.comparison
    assert report.comparison["click"].challenger.calibration_ratio < 0.3


def test_a_bundle_is_measured_by_how_the_rows_were_sampled_not_by_how_it_was_trained(
    data: Prepared, first: Path, log: tuple[Path, list[ServedRecord], set[tuple[str, str]]]
) -> None:
    live = load_bundle(current_path(first, "shop"))
    for rows in (data, open_log(log[0])):
        assert evaluate_bundle(live, rows, "test", small.quiet()).calibration_ratio == pytest.approx(1, rel=0.12)
    assert evaluate_bundle(live, replace(data, negative_sampling=1.0), "test", small.quiet()).calibration_ratio < 0.5


def test_what_a_graph_serves_is_put_on_the_scale_of_the_rows() -> None:
    served_as = np.array([0.0, 0.01, 0.5, 1.0])
    assert as_sampled(served_as, 1.0) == pytest.approx(served_as)
    assert as_sampled(np.array([0.02]), 0.1) == pytest.approx([0.2 / (0.98 + 0.2)])


def test_a_warm_start_on_rows_sampled_otherwise_begins_at_their_scale(data: Prepared, first: Path) -> None:
    live = load_bundle(current_path(first, "shop"))
    rows, shift = encode_split(data, "test", live.encoder), float(np.log(KEPT))
    start = training.Start(retraining.start_of(live).network, live.vocabularies, KEPT)
    assert retraining.start_of(live).negative_sampling == KEPT
    for family in ("deepfm", "din"):
        old, new = (NETWORKS[family](Fields.of(data.schema, live.vocabularies), small.NETWORK_SETTINGS[family]).eval() for _ in range(2))
        warm_start(old, new, shift)
        assert np.abs(predict(new, rows) - predict(old, rows) - shift).max() < 1e-5
    still = training.TrainSettings(epochs=1, learning_rate=1e-12, embedding_l2=0.0, unknown_rate=0.0, threads=1)
    again = training.train(
        replace(data, negative_sampling=1.0), "deepfm", small.NETWORK_SETTINGS["deepfm"], still, small.quiet(), start
    ).network
    assert abs(np.median(predict(again, rows) - predict(start.network, rows)) - shift) < 0.5  # statistics of batches move


def test_prepare_moves_the_share_from_the_schema_file_to_the_data_set(tmp_path: Path) -> None:
    table = "label,user_id,age,ad_id,price,topics\n" + "1,u,25,a,1,\n0,u,25,b,2,\n" * 10
    out = prepare_csv(tmp_path, table, SCHEMA + "\n[table]\nnegative_sampling = 0.25\n")
    assert (out / "data.toml").read_text() == "negative_sampling = 0.25\n"
    assert "negative_sampling" not in (out / "schema.toml").read_text()
    assert open_prepared(out).negative_sampling == 0.25
    (tmp_path / "plain").mkdir()
    assert open_prepared(prepare_csv(tmp_path / "plain", table)).negative_sampling == 1.0


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("negative_sampling = 0.5\n" + SCHEMA, r"unknown entries \['negative_sampling'\]"),
        (SCHEMA + "\n[table]\nnegative_sampling = 0\n", "negative_sampling is 0; it is the share of non-clicks"),
        (SCHEMA + '\n[table]\nnegative_sampling = "a tenth"\n', "negative_sampling is 'a tenth'"),
    ],
)
def test_a_share_that_is_none_is_refused(tmp_path: Path, schema: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepare_csv(tmp_path, "label,user_id,age,ad_id,price,topics\n" + "1,u,25,a,1,\n" * 10, schema)


def test_a_data_set_says_it_in_a_file_of_its_own(tmp_path: Path) -> None:
    small.data_set(tmp_path, rows=(9, 9, 9))
    (tmp_path / "data.toml").write_text("negative_sampling = 0.2\n")
    assert open_prepared(tmp_path).negative_sampling == 0.2
    for wrong in ("negative_sampling = 2", "sampling = 0.1", "negative_sampling"):
        (tmp_path / "data.toml").write_text(wrong)
        with pytest.raises(DataError, match=r"data\.toml(: | is no TOML: )"):
            open_prepared(tmp_path)


def test_the_training_reference_is_like_what_is_served(data: Prepared) -> None:
    """Clicks are six in ten of the sampled rows: a field that tells them apart would be taken to have drifted."""
    whole = impressions(np.random.default_rng(9), 20_000)
    truth = whole["ad_id"].value_counts(normalize=True)
    shares = dict(zip(truth["ad_id"], truth["proportion"], strict=True))

    def furthest(reference: bytes) -> float:
        found = json.loads(reference)["fields"]["ad.ad_id"]
        return max(abs(count / sum(found["counts"]) - shares[ad]) for ad, count in zip(found["values"], found["counts"], strict=False))

    vocabularies = training.learn_vocabularies(data)
    assert (
        furthest(make_reference(data, vocabularies)) < 0.03 < furthest(make_reference(replace(data, negative_sampling=1.0), vocabularies))
    )


def test_a_click_rate_is_not_estimated_from_rows_that_were_sampled_by_it(data: Prepared, first: Path) -> None:
    with pytest.raises(DataError, match=r"kept 0\.1 of its non-clicks \(negative_sampling\), so no click rate can be estimated from it"):
        replay(data, load_bundle(current_path(first, "shop")), parse_policy("greedy"))
