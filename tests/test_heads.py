"""Networks with a conversion beside the click: labels that may be unknown, weights of rows, and probabilities of what was sampled."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import polars as pl
import pytest
import small
import torch

from features.bundle import load_bundle
from training.calibrate import Calibration
from training.datasets.encoded import encode_split
from training.datasets.prepared import DataError, Prepared, open_prepared
from training.export import export
from training.export.export import ServedNetwork, all_scores, random_feeds
from training.networks import build
from training.networks.contract import CLICK, Labels, cross_entropy
from training.networks.esmm import both
from training.train import Trained, heads_of, train
from training.train_settings import TrainError, TrainSettings
from training.weights import start_of

HEADS = (CLICK, "conversion")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Conversions of clicks, a fifth of them not known; rows of one user weigh nothing."""
    folder = tmp_path_factory.mktemp("heads")
    small.data_set(folder, (400, 200, 200))
    random = np.random.default_rng(7)
    for path in folder.glob("*/*.parquet"):
        frame = pl.read_parquet(path)
        converted = frame["label"].to_numpy() * (random.random(len(frame)) < 0.5)
        known = pl.Series(random.random(len(frame)) > 0.2)
        frame.with_columns(
            conversion=pl.when(known).then(pl.Series(converted.astype(np.int8))).otherwise(None),
            weight=pl.when(pl.col("user_id") == "u3").then(0.0).otherwise(1.0),
        ).write_parquet(path)
    return open_prepared(folder)


def trained(data: Prepared, family: str, **settings: object) -> Trained:
    usual = {"epochs": 2, "batch": 64, "threads": 1, "learning_rate": 0.02, "unknown_rate": 0.0, **settings}
    return train(data, family, small.NETWORK_SETTINGS[family], TrainSettings(**usual), small.quiet())


def test_labels_that_are_not_known_and_rows_without_weight_do_not_count() -> None:
    logits, labels = torch.tensor([0.0, 2.0, -1.0]), torch.tensor([1.0, float("nan"), 0.0])
    losses = np.log1p(np.exp([-0.0, 0.0, -1.0]))
    assert cross_entropy(logits, labels).item() == pytest.approx((losses[0] + losses[2]) / 2, rel=1e-6)
    assert cross_entropy(logits, labels, torch.tensor([3.0, 9.0, 1.0])).item() == pytest.approx((3 * losses[0] + losses[2]) / 4, rel=1e-6)
    assert cross_entropy(logits, torch.full((3,), float("nan"))).item() == 0.0


def test_the_labels_of_rows_are_those_of_their_column(data: Prepared) -> None:
    rows, frame = encode_split(data, "valid", small.encoder(), HEADS), next(data.frames("valid"))
    labels = [float("nan") if value is None else value for value in frame["conversion"]]
    assert np.array_equal(rows.outcomes["conversion"], np.array(labels, np.float32), equal_nan=True)
    some = rows.labels_of(np.array([5, 2]))
    assert np.array_equal(some.heads["conversion"].numpy(), np.array([labels[5], labels[2]], np.float32), equal_nan=True)
    assert some.weight.tolist() == [frame["weight"][5], frame["weight"][2]]
    assert encode_split(data, "valid", small.encoder()).outcomes == {}


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (None, "has no column conversion: the head conversion needs a label for each row, 0, 1 or null"),
        (pl.Series("conversion", [2] * 30), "must be of whole numbers, 0, 1 or null"),
        (pl.Series("conversion", [0.5] * 30), "must be of whole numbers, 0, 1 or null"),
        (pl.Series("weight", [-1.0] * 30), "column weight, what a row weighs in training, holds something that is no number of at least 0"),
    ],
)
def test_a_column_of_labels_that_is_not_there_or_wrong_is_a_sentence(column: pl.Series | None, message: str, tmp_path: Path) -> None:
    data = small.data_set(tmp_path, (30, 30, 30))
    path = tmp_path / "train" / "0.parquet"
    if column is not None:
        pl.read_parquet(path).with_columns(column).write_parquet(path)
    with pytest.raises(DataError, match=message):
        encode_split(data, "train", small.encoder(), HEADS)


@pytest.mark.parametrize("asked", ["conversion", "click-click", "click-label", "click-Buy", "-", "click-"])
def test_heads_are_the_click_and_names_of_columns(asked: str) -> None:
    with pytest.raises(TrainError, match="expected a value such as click-conversion"):
        heads_of("deepfm", asked)


def test_heads_are_the_networks_own_where_none_are_asked_for() -> None:
    assert heads_of("deepfm") == (CLICK,)
    assert heads_of("esmm") == HEADS
    assert heads_of("deepfm", "click-conversion-like") == (CLICK, "conversion", "like")


def test_esmm_of_another_head_is_refused() -> None:
    fields = small.fields_of("esmm")._replace(heads=(CLICK, "like"))
    with pytest.raises(ValueError, match="esmm predicts a click and a conversion, and heads is click-like"):
        build("esmm", fields, small.NETWORK_SETTINGS["esmm"])


def test_the_logit_of_a_product_of_probabilities() -> None:
    a, b = torch.tensor([0.3, -2.0, 60.0, -60.0, 40.0]), torch.tensor([1.1, 0.5, -3.0, 2.0, 45.0])
    p = (torch.sigmoid(a.double()) * torch.sigmoid(b.double())).numpy()
    rest = torch.sigmoid(-a.double()) + torch.sigmoid(a.double()) * torch.sigmoid(-b.double())  # 1 - p without cancellation
    assert np.allclose(both(a.double(), b.double()).numpy(), np.log(p) - np.log(rest.numpy()), rtol=1e-9)
    assert torch.isfinite(both(torch.tensor(200.0), torch.tensor(-200.0)))


def test_esmm_gives_a_conversion_at_most_the_probability_of_its_click() -> None:
    request = small.RequestTensors(*small.parts())
    with torch.no_grad():
        outputs = small.network("esmm")(request)
    assert (outputs["conversion"] < outputs[CLICK]).all()


def test_mmoe_mixes_its_experts_by_a_gate_of_each_head() -> None:
    network, request = small.network("mmoe", experts=3, expert=5), small.RequestTensors(*small.parts())
    with torch.no_grad():
        outputs, u = network(request), network.embed.of_request(request).flatten(1)
        ads = network.embed("ad", request.ad).flatten(2)
        for head in HEADS:
            for row, candidate in ((0, 0), (2, 4)):
                x = torch.cat([u[row], ads[row, candidate]])
                norm, first = network.experts.rest[0], network.experts.first
                units = (first.weight @ x + first.bias - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
                gate = (network.gates[head].weight @ x + network.gates[head].bias).exp()
                mixed = sum(gate[e] / gate.sum() * units[5 * e : 5 * e + 5].clamp(min=0) for e in range(3))
                logit = network.last[head](network.towers[head](mixed[None]))
                assert outputs[head][row, candidate].item() == pytest.approx(logit.item(), abs=1e-4)


def test_any_network_has_a_head_more_on_the_same_embeddings() -> None:
    fields = small.fields_of("deepfm")._replace(heads=HEADS)
    network = build("deepfm", fields, small.NETWORK_SETTINGS["deepfm"])
    assert network.of(CLICK).second is network.of("conversion").second
    assert network.of(CLICK).tower is not network.of("conversion").tower
    request = small.RequestTensors(*small.parts(candidates=1))
    labels = Labels({CLICK: torch.tensor([1.0, 0.0, 1.0]), "conversion": torch.tensor([1.0, 0.0, float("nan")])})
    outputs = network.eval()(request)
    expected = sum(cross_entropy(outputs[head].squeeze(1), labels.heads[head]) for head in HEADS)
    assert torch.allclose(network.loss(outputs, request, labels), torch.as_tensor(expected))


@pytest.mark.parametrize(("family", "heads"), [("deepfm", "click-conversion"), ("esmm", "")])
def test_a_bundle_serves_each_head_calibrated(data: Prepared, traced_export: None, family: str, heads: str, tmp_path: Path) -> None:
    model = trained(data, family, heads=heads)
    rows = encode_split(data, "test", model.encoder, HEADS)
    labels, known = rows.known("conversion")
    assert model.head_metrics["conversion"]["test"].clicks == labels[known].sum()
    bundle = load_bundle(export.export(data, model, tmp_path, "m", small.quiet()))
    session = onnxruntime.InferenceSession(bundle.path / "model.onnx", providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_outputs()] == ["p_click", "p_conversion"]
    valid = encode_split(data, "valid", model.encoder, HEADS)
    feeds = [export.feeds_of(data.schema, valid, np.array([i])) for i in range(len(valid))]
    p = np.array([[out[0, 0] for out in session.run(None, each)] for each in feeds])
    converted, there = valid.known("conversion")
    assert p[there, 1].mean() == pytest.approx(converted[there].mean(), rel=1e-3)
    assert p[:, 0].mean() == pytest.approx(valid.labels.mean(), rel=1e-3)
    metrics = json.loads((bundle.path / "metrics.json").read_text())
    assert metrics["heads"]["conversion"]["test"]["clicks"] == labels[known].sum()
    again = start_of(bundle).network  # a warm start has the heads too
    assert again.heads == HEADS


def test_a_conversion_is_corrected_as_its_click_is_when_non_clicks_were_dropped() -> None:
    """Of 1,000 impressions 100 are clicks and 40 of them convert; a tenth of the non-clicks is kept: 190 rows."""
    network = small.network("esmm")
    served = ServedNetwork(network, Calibration(1.0, 0.0, float(np.log(0.1))), small.schema(), {"conversion": Calibration()}).eval()
    feeds = random_feeds(small.schema(), {}, 2, 3, 4)
    plain = ServedNetwork(network, Calibration(), small.schema(), {"conversion": Calibration()}).eval()
    (sampled_click, sampled), (click, conversion) = (all_scores(each, feeds) for each in (plain, served))
    kept = sampled_click / (sampled_click + (1 - sampled_click) / 0.1)
    assert np.allclose(click, kept, rtol=1e-4)
    assert np.allclose(conversion / click, sampled / sampled_click, rtol=1e-4)
    # with the numbers above: 100 of 190 rows click, 40 convert
    q_click, q = 100 / 190, 40 / 190
    assert q * (0.1 / q_click) == pytest.approx(0.04)


def test_each_head_is_trained_by_its_network_s_own_optimisers_and_what_they_share_once() -> None:
    network = build("wide_deep", small.fields_of("wide_deep")._replace(heads=HEADS), small.NETWORK_SETTINGS["wide_deep"])
    optimisers = network.optimisers(0.01)
    assert [type(each).__name__ for each in optimisers] == ["Adagrad", "FTRL", "Adagrad"]
    trained = [id(weight) for each in optimisers for group in each.param_groups for weight in group["params"]]
    assert sorted(trained) == sorted(map(id, network.parameters()))
    assert build("fm", small.fields_of("fm")._replace(heads=HEADS), small.NETWORK_SETTINGS["fm"]).embedding_l2 == 1e-5
