from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import small
import torch

from features.encode import Encoder
from training.calibrate import Calibration
from training.datasets.encoded import Rows, encode_split
from training.datasets.prepared import DataError, Prepared
from training.datasets.vocabularies import learn_vocabularies
from training.evaluate import auc
from training.fit import fit_network, predict
from training.networks.contract import Part
from training.networks.deepfm import DeepFMSettings
from training.networks.din import DINSettings
from training.networks.embeddings import Embeddings
from training.retrain.gate import diverged
from training.simulation import make_world, write_log
from training.train import Trained
from training.train_settings import TrainSettings, override
from training.updates import EmbeddingDecay

ALONE: dict[str, Any] = {"epochs": 1, "threads": 1, "unknown_rate": 0}
"""An epoch in which nothing is hidden: see `small.quick`."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return small.data_set(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def rows(data: Prepared) -> tuple[Rows, Rows]:
    # By the vocabularies of `small`, so that `small.network` fits them.
    return encode_split(data, "train", small.encoder()), encode_split(data, "valid", small.encoder())


def weights(trained: Trained) -> list[bytes]:
    return [value.numpy().tobytes() for value in trained.network.state_dict().values()]


@pytest.mark.parametrize("family", ["deepfm", "din"])
def test_a_seed_repeats_to_the_last_bit_and_another_differs(data: Prepared, family: str) -> None:
    dropout = replace(small.NETWORK_SETTINGS[family], dropout=0.2)  # what it drops is a draw too
    small.NETWORK_SETTINGS[family], before = dropout, small.NETWORK_SETTINGS[family]
    try:
        first = small.quick(data, family)
        torch.manual_seed(99)  # what was drawn before does not matter
        again, other = small.quick(data, family), small.quick(data, family, seed=2)
    finally:
        small.NETWORK_SETTINGS[family] = before
    assert weights(first) == weights(again)
    assert (first.metrics, first.epochs, first.calibration) == (again.metrics, again.epochs, again.calibration)
    assert weights(first) != weights(other)
    assert first.metrics["test"].log_loss != other.metrics["test"].log_loss


def test_what_was_trained_is_measured_calibrated_and_described(data: Prepared) -> None:
    trained = small.quick(data, epochs=3)
    assert not trained.network.training
    assert [epoch.number for epoch in trained.epochs] == [1, 2, 3]
    assert trained.epochs[-1].train_loss < trained.epochs[0].train_loss
    valid = encode_split(data, "valid", trained.encoder)
    p_click = trained.calibration.on_log(predict(trained.network, valid))
    assert trained.metrics["valid"].auc == auc(valid.labels, p_click)
    assert trained.metrics["valid"].calibration_ratio == pytest.approx(1.0, abs=1e-3)  # Platt's shift is fitted there
    assert (trained.metrics["valid"].rows, trained.metrics["test"].rows) == (100, 100)
    assert trained.settings | {"epochs": 3, "embedding": 4, "hidden": (8,), "threads": 1} == trained.settings
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(("family", "flat_below", "by_loss"), [("deepfm", 0, False), ("dcn", 1_000, True)])
def test_training_stops_drops_its_rate_and_ends_with_its_best_epoch(
    rows: tuple[Rows, Rows], monkeypatch: pytest.MonkeyPatch, family: str, flat_below: int, by_loss: bool
) -> None:
    monkeypatch.setattr("training.fit.LOSS_ROWS", 100)
    train, valid = rows
    noise = replace(train, labels=np.random.default_rng(5).integers(0, 2, len(train)).astype(np.float32))  # only to be learned by heart
    given = {"epochs": 40, "batch": 64, "learning_rate": 0.05, "drop": 0.5, "patience": 3, "embedding_l2": 0.0}
    settings = TrainSettings(**given, least_steps=0, unknown_rate=0, flat_below=flat_below)
    network = small.network(family)
    epochs = fit_network(network, noise, valid, settings, small.quiet())
    scores = [-epoch.valid.log_loss if by_loss else epoch.valid.auc for epoch in epochs]
    best = int(np.argmax(scores))
    assert len(epochs) < 40
    # The last gain on all before is `patience` epochs before the end, and it is the best.
    assert len(epochs) - 1 - best == 3
    rate = 0.05
    for i, epoch in enumerate(epochs):
        assert epoch.learning_rate == pytest.approx(rate)
        if i and scores[i] <= max(scores[:i]):
            rate *= 0.5
    assert rate < 0.05
    assert not network.training
    p_click = Calibration().on_log(predict(network, valid))
    assert (auc(valid.labels, p_click), scores[best]) == (epochs[best].valid.auc, epochs[best].score)
    assert scores[best] > scores[-1]
    assert epochs[-1].train_loss < epochs[0].train_loss


def test_every_step_decays_the_embeddings(rows: tuple[Rows, Rows]) -> None:
    norms = []
    for l2 in (0.0, 1.0):
        network = small.network("deepfm")
        settings = TrainSettings(**{**ALONE, "epochs": 2}, batch=20, learning_rate=0.02, embedding_l2=l2, flat_below=0)
        fit_network(network, rows[0], rows[1], settings, small.quiet())
        norms.append([float(embeddings.table.weight.detach().norm()) for embeddings in tables(network)])
    assert all(decayed < 0.95 * free for free, decayed in zip(*norms, strict=True))


@pytest.mark.parametrize("family", ["deepfm", "din"])
def test_a_last_row_alone_is_no_batch(rows: tuple[Rows, Rows], family: str) -> None:
    train, valid = rows
    for batch in (13, 23, 299, 300, 1000):  # 300 rows: 23 · 13 + 1, 13 · 23 + 1, one row over, even, all at once
        [epoch] = fit_network(small.network(family), train, valid, TrainSettings(**ALONE, batch=batch), small.quiet())
        assert np.isfinite(epoch.train_loss)


def test_a_batch_of_one_row_is_refused(rows: tuple[Rows, Rows]) -> None:
    with pytest.raises(ValueError, match="batch is 1; it must be at least 2 rows, to normalise over"):
        fit_network(small.network("deepfm"), rows[0], rows[1], TrainSettings(batch=1), small.quiet())


def test_a_valid_split_of_one_class_is_chosen_by_log_loss(rows: tuple[Rows, Rows]) -> None:
    train, valid = rows
    clicks = replace(valid, labels=np.zeros(len(valid), np.float32))
    epochs = fit_network(small.network("deepfm"), train, clicks, TrainSettings(**{**ALONE, "epochs": 2}, batch=64), small.quiet())
    assert len(epochs) == 2
    assert np.isnan(epochs[0].valid.auc)


def test_predictions_do_not_depend_on_how_rows_are_batched(rows: tuple[Rows, Rows]) -> None:
    network = small.network("din")
    whole = predict(network, rows[0])
    for chosen in (np.array([5]), np.array([7, 3, 250]), np.arange(100)):
        with torch.no_grad():
            assert np.allclose(small.click(network, *rows[0].batch(chosen)).squeeze(1).numpy(), whole[chosen], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["deepfm", "din"])
def test_it_learns_more_than_the_ad_s_own_click_rate(tmp_path: Path, family: str) -> None:
    write_log(make_world(users=60, ads=40, seed=1), tmp_path / "world", impressions=16_000, seed=1)
    world = Prepared(tmp_path / "world", small.schema((tmp_path / "world" / "schema.toml").read_text()))
    trained = small.quick(world, family, epochs=2, batch=256, learning_rate=0.01)
    encoder = Encoder(world.schema, learn_vocabularies(world))
    train, test = (encode_split(world, split, encoder) for split in ("train", "test"))
    ads = train.ad.ids[:, 0]
    clicks, shown = (np.bincount(ads, w, minlength=int(ads.max()) + 1) for w in (train.labels, np.ones(len(train))))
    baseline = auc(test.labels, ((clicks + 1) / (shown + 4))[test.ad.ids[:, 0]])
    assert 0.52 < baseline < 0.75  # it says something, not all
    assert trained.metrics["test"].auc > baseline + 0.03


def gradients(network: torch.nn.Module) -> list[torch.Tensor]:
    return [embeddings.table.weight.grad for embeddings in tables(network)]


def tables(network: torch.nn.Module) -> list[Embeddings]:
    return [module for module in network.modules() if isinstance(module, Embeddings)]


@pytest.mark.parametrize(("family", "count"), [("deepfm", 2), ("din", 1)])
def test_table_decay_is_the_gradient_of_half_lambda_times_the_squares(rows: tuple[Rows, Rows], family: str, count: int) -> None:
    settings, batch = TrainSettings(embedding_l2=0.3, first_l2=0.3), rows[0].batch(np.arange(10))
    network = small.network(family)
    small.click(network, *batch).sum().backward()
    EmbeddingDecay(network, rows[0], settings).add_gradient(batch)
    added = [gradient.clone() for gradient in gradients(network)]
    assert len(added) == count  # DeepFM's first-order table decays too
    network.zero_grad()
    (small.click(network, *batch).sum() + 0.3 / 2 * sum(e.table.weight.square().sum() for e in tables(network))).backward()
    for ours, autograd, embeddings in zip(added, gradients(network), tables(network), strict=True):
        trained = torch.tensor([[times > 0] for times in counted(embeddings, rows[0])])
        for vocabulary in embeddings.sizes:
            trained[embeddings.rows_of(vocabulary).start] = True  # the unknown, since values are hidden
        assert 0 < (~trained[1:]).sum() < len(trained)
        assert torch.allclose(ours, autograd * trained, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("regularise", ["table", "batch"])
def test_a_schema_of_numbers_alone_has_no_embeddings_to_decay(tmp_path: Path, regularise: str) -> None:
    schema = small.schema('name = "numbers"\n[user.income]\nkind = "number"\n[ad.price]\nkind = "number"\n')
    trained = small.quick(replace(small.data_set(tmp_path), schema=schema), regularise=regularise, epochs=1)
    assert np.isfinite(trained.epochs[0].train_loss)


@pytest.mark.parametrize("family", ["deepfm", "din"])
def test_batch_decay_is_for_the_rows_of_the_batch_by_their_share(rows: tuple[Rows, Rows], family: str) -> None:
    train = rows[0]
    network = small.network(family)
    decay = EmbeddingDecay(network, train, TrainSettings(embedding_l2=0.3, regularise="batch", unknown_rate=0))
    batch = train.batch(np.array([4, 8]))
    small.click(network, *batch).sum().backward()
    before = [gradient.clone() for gradient in gradients(network)]
    decay.add_gradient(batch)
    for embeddings, gradient, old in zip(tables(network), gradients(network), before, strict=True):
        # Eq. 6: n times in the training split, in the batch or not. Counted value by value.
        times, present = counted(embeddings, train), np.zeros(len(gradient), bool)
        present[[row for i in (4, 8) for row in used(embeddings, train, i)]] = True
        weight = embeddings.table.weight.detach().numpy()
        expected = np.where(present[:, None], 0.3 * weight / np.maximum(times, 1)[:, None], 0.0)
        assert np.allclose((gradient - old).numpy(), expected, atol=1e-6)
        assert present[1:].sum() > 5
        assert not present.all()


def counted(embeddings: Embeddings, train: Rows) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """How often the rows of a split use each row of a table."""
    return np.bincount([row for i in range(len(train)) for row in used(embeddings, train, i)], minlength=embeddings.table.num_embeddings)


def used(embeddings: Embeddings, train: Rows, i: int) -> list[int]:
    found: list[int] = []
    for name, part in zip(("user", "history", "ad"), train.batch(np.array([i]))[:3], strict=True):
        whole = part if part.rows is None else Part(part.ids[part.rows], part.numbers[part.rows])
        found += [] if name not in embeddings else [row for row in embeddings.table_rows(name, whole.ids).flatten().tolist() if row]
    return found


def test_another_way_to_regularise_is_refused(rows: tuple[Rows, Rows]) -> None:
    with pytest.raises(ValueError, match="regularise is 'l1'; it must be table or batch"):
        EmbeddingDecay(small.network("din"), rows[0], TrainSettings(regularise="l1"))


def test_settings_are_read_as_their_types_say() -> None:
    given = {"epochs": "7", "learning_rate": "1e-2", "regularise": "batch", "hidden": "400-400", "softmax": "True", "mystery": "1"}
    loop = override(TrainSettings(), given)
    assert (loop.epochs, loop.learning_rate, loop.regularise) == (7, 0.01, "batch")
    network = override(DINSettings(), given)
    assert asdict(network) == {**asdict(DINSettings()), "hidden": (400, 400), "softmax": True}
    assert given == {"mystery": "1"}
    assert override(DeepFMSettings(), {}) == DeepFMSettings()


@pytest.mark.parametrize(
    ("name", "text", "example"),
    [
        ("hidden", "400,400", "200-80"),
        ("hidden", "", "200-80"),
        ("embedding", "1.5", "16"),
        ("dropout", "x", "0.1"),
        ("softmax", "1", "False"),
    ],
)
def test_a_text_that_is_no_such_setting_is_refused(name: str, text: str, example: str) -> None:
    with pytest.raises(ValueError, match=f"^--set {name}={text}: expected a value such as {example}$"):
        override(DINSettings(), {name: text})


def test_a_training_that_diverges_is_a_sentence(rows: tuple[Rows, Rows]) -> None:
    network = small.network("deepfm")
    before = predict(network, rows[1])
    settings = TrainSettings(epochs=3, batch=64, learning_rate=1e30, threads=1, flat_below=0)
    epochs = fit_network(network, rows[0], rows[1], settings, small.quiet())
    [sentence] = diverged(epochs)
    assert sentence == "the training diverged in epoch 1, the weights are the best of those before it; try a learning_rate below 1e+30"
    assert (predict(network, rows[1]) == before).all()


def test_numbers_too_large_for_a_network_are_a_sentence(tmp_path: Path) -> None:
    schema = small.schema('name = "numbers"\n[user.income]\nkind = "number"\ntransform = "none"\n[ad.price]\nkind = "number"\n')
    data = replace(small.data_set(tmp_path), schema=schema)
    frame = pl.read_parquet(path := data.folder / "test" / "0.parquet")
    frame.with_columns(pl.lit(1e38).alias("user.income")).write_parquet(path)
    with pytest.raises(DataError, match=r"what the network gives is no number for .* of 100 rows, the first of them row"):
        small.quick(data, epochs=1)


def test_the_facts_tell_the_threads_that_trained(data: Prepared) -> None:
    before = torch.get_num_threads()
    assert small.quick(data, "deepfm", threads=before + 1).settings["threads"] == before + 1
    assert torch.get_num_threads() == before
