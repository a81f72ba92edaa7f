"""Settings that follow the rows."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small
import torch
from rich.console import Console
from rich.progress import Progress

from features.bundle import load_bundle
from features.encode import Encoder
from training.datasets.encoded import encode_split
from training.datasets.vocabularies import learn_vocabularies
from training.fit import fit_network
from training.networks.layers import Tower
from training.retrain.publish import train_and_publish
from training.train import Start, train
from training.train_settings import TrainError, TrainSettings
from training.updates import EmbeddingDecay
from training.weights import settings_of

pytestmark = pytest.mark.usefixtures("traced_export")


@pytest.mark.parametrize(
    ("rows", "batch", "rate", "epochs"),
    [
        (1, 32, 3e-3, 4000),
        (1_600, 32, 3e-3, 80),
        (6_470, 128, 3e-3, 80),
        (25_600, 512, 1e-3, 80),
        (64_000, 1024, 1e-3, 66),
        (640_000, 2048, 1e-3, 30),
    ],
)
def test_what_is_left_open_follows_the_rows(rows: int, batch: int, rate: float, epochs: int) -> None:
    settled = TrainSettings().for_rows(rows)
    assert (settled.batch, settled.learning_rate, settled.epochs) == (batch, rate, epochs)
    assert settled.for_rows(rows) == settled
    assert (settled.first_l2, settled.open) == ((1 / rows, []) if rows < 100_000 else (0.0, ["first_l2"]))


def test_what_is_given_stays_and_the_rate_follows_the_batch() -> None:
    settled = TrainSettings(batch=4096, epochs=7).for_rows(500)
    assert (settled.batch, settled.learning_rate, settled.epochs) == (4096, 1e-3, 7)
    assert TrainSettings(learning_rate=0.5).for_rows(500).learning_rate == 0.5


@pytest.mark.parametrize(("rows", "batch", "rate"), [(6_470, 128, 3e-3), (202_027, 4096, 2**0.5 * 1e-3), (640_000, 8192, 2e-3)])
def test_a_batch_of_several_workers_grows_where_there_are_rows_for_it(rows: int, batch: int, rate: float) -> None:
    settled = TrainSettings(workers=4).for_rows(rows)
    assert (settled.batch, settled.learning_rate) == (batch, pytest.approx(rate))
    assert TrainSettings(workers=4, batch=4096).for_rows(rows).learning_rate == 1e-3


@pytest.mark.parametrize(
    "given",
    [
        {"least_steps": -1},
        {"flat_below": -1},
        {"first_l2": -1},
        {"unknown_rate": 1.0},
        {"unknown_rate": -0.1},
        {"epochs": -1},
        {"batch": 1},
    ],
)
def test_impossible_settings_are_refused(given: dict[str, float]) -> None:
    with pytest.raises(TrainError, match=next(iter(given))):
        TrainSettings(**given)


def test_settings_are_told_and_recorded_and_chosen_anew(tmp_path: Path) -> None:
    data, said = small.data_set(tmp_path), io.StringIO()
    given = {"epochs": "1", "embedding": "4", "hidden": "8", "threads": "1"}
    path, _ = train_and_publish(
        data, "deepfm", tmp_path / "models", "m", given, Progress(console=Console(file=said, width=300), disable=True)
    )
    line = "batch 32 (for 300 rows), learning rate 0.003, at most 1 epochs, patience 2 after 1,000 steps, unknown rate 0.01"
    assert f"{line}, first order first below 100,000 rows, its decay 0.0033" in said.getvalue()
    recorded = json.loads((path / "manifest.json").read_text())["settings"]
    assert (recorded["batch"], recorded["learning_rate"], recorded["epochs"]) == (32, 3e-3, 1)
    assert recorded["by_data"] == ["batch", "learning_rate", "first_l2"]
    assert (recorded["flat_below"], recorded["first_l2"]) == (100_000, 1 / 300)
    loop = settings_of(load_bundle(path))[1]
    assert (loop.batch, loop.learning_rate, loop.first_l2, loop.epochs) == (0, 0.0, 0.0, 1)


def test_patience_counts_after_the_least_steps(tmp_path: Path) -> None:
    trained = small.quick(small.data_set(tmp_path), epochs=30, patience=1, learning_rate=0.2, least_steps=60, flat_below=0)
    assert len(trained.epochs) * 5 >= 60  # 300 rows in batches of 64
    assert {epoch.learning_rate for epoch in trained.epochs[:12]} == {0.2}


@pytest.mark.parametrize(
    ("family", "flat_below", "warm", "flat"),
    [
        ("deepfm", 301, False, True),
        ("deepfm", 300, False, False),
        ("deepfm", 0, False, False),
        ("deepfm", 301, True, False),
        ("din", 301, False, False),
    ],
)
def test_a_deepfm_of_few_rows_begins_with_a_flat_tower(tmp_path: Path, family: str, flat_below: int, warm: bool, flat: bool) -> None:
    data = small.data_set(tmp_path)
    encoder = Encoder(data.schema, learn_vocabularies(data))
    train, valid = (encode_split(data, split, encoder) for split in ("train", "valid"))
    network, still = small.network(family), {"epochs": 1, "learning_rate": 1e-12, "embedding_l2": 0.0, "threads": 1, "unknown_rate": 0}
    fit_network(network, train, valid, TrainSettings(**still, flat_below=flat_below), small.quiet(), warm=warm)
    (tower,) = (module for module in network.modules() if isinstance(module, Tower))
    seen: list[torch.Tensor] = []
    tower.register_forward_hook(lambda _module, _inputs, out: seen.append(out))
    small.click(network, *train.batch(np.arange(10)))
    assert bool(seen[0].std() < 1e-6) == flat


def test_the_first_order_learns_alone_at_first_and_then_all(tmp_path: Path) -> None:
    data = small.data_set(tmp_path)
    encoder = Encoder(data.schema, learn_vocabularies(data))
    train, valid = (encode_split(data, split, encoder) for split in ("train", "valid"))
    network = small.network("deepfm")
    before = {name: weight.clone() for name, weight in network.named_parameters()}
    after: list[dict[str, torch.Tensor]] = []
    network.after_step = lambda _steps: after.append({n: w.detach().clone() for n, w in network.named_parameters()})
    settings = TrainSettings(epochs=4, batch=100, learning_rate=0.02, threads=1, least_steps=14)
    epochs = fit_network(small.network("deepfm"), train, valid, settings, small.quiet())
    assert [epoch.learning_rate for epoch in epochs] == pytest.approx(
        [0.02] * 4
    )  # half of 12 steps are too few to tell when it has learned
    epochs = fit_network(network, train, valid, replace(settings, least_steps=12), small.quiet())
    assert [epoch.learning_rate for epoch in epochs] == pytest.approx([0.01, 0.01, 0.02, 0.02])
    first = {name for name in before if name.startswith("first.") or name == "bias"}
    before["tower.rest." + str(len(network.tower.rest) - 1) + ".weight"].zero_()
    moved = {name for name, weight in after[2].items() if not torch.equal(weight, before[name])}  # what is unseen is filled after it
    assert {"first.table.weight", "bias"} <= moved <= first
    moved = {name for name, weight in after[-1].items() if not torch.equal(weight, before[name])}
    assert {"second.table.weight", "tower.first.weight"} <= moved
    assert all(weight.requires_grad for weight in network.parameters())


def test_a_din_of_few_rows_has_a_first_order_and_goes_on_with_what_it_had(tmp_path: Path) -> None:
    data, few = small.data_set(tmp_path), TrainSettings(epochs=2, threads=1, unknown_rate=0)
    many = replace(few, epochs=1, flat_below=300)
    chosen = {rows: train(data, "din", small.NETWORK_SETTINGS["din"], rows, small.quiet()) for rows in (few, many)}
    assert [each.settings["first_order"] for each in chosen.values()] == [1, 0]
    assert [bool(each.network.first_weights()) for each in chosen.values()] == [True, False]
    for before in chosen.values():  # such as a bundle of before, whose manifest does not tell it
        start = Start(before.network, before.encoder.vocabularies)
        after = train(data, "din", small.NETWORK_SETTINGS["din"], few, small.quiet(), start)
        assert after.settings["first_order"] == before.settings["first_order"]
    given = replace(small.NETWORK_SETTINGS["din"], first_order=0)
    assert train(data, "din", given, few, small.quiet()).settings["first_order"] == 0


def test_the_first_order_decays_as_little_as_a_regression(tmp_path: Path) -> None:
    data = small.data_set(tmp_path)
    rows = encode_split(data, "train", Encoder(data.schema, learn_vocabularies(data)))
    network = small.network("deepfm")
    for embeddings, l2 in ((network.first, 1 / 300), (network.second, 0.5)):
        embeddings.table.weight.grad = torch.zeros_like(embeddings.table.weight)
        decay = EmbeddingDecay(network, rows, TrainSettings(embedding_l2=0.5).for_rows(len(rows)))
        decay.add_gradient(rows.batch(np.arange(2)))
        used = embeddings.table.weight.grad.abs().sum(1) > 0
        assert used.sum() > 5
        np.testing.assert_allclose(embeddings.table.weight.grad[used], l2 * embeddings.table.weight.detach()[used], rtol=1e-6)
