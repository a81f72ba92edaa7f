from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small
import torch

from training.cooccurrence import WINDOW, Cooccurrence, counted
from training.datasets.encoded import Rows, encode_split
from training.fit import fit_network
from training.train_settings import TrainError, TrainSettings


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    return encode_split(small.data_set(tmp_path_factory.mktemp("data")), "train", small.encoder())


def test_pairs_are_clicks_and_the_behaviours_before_them(rows: Rows) -> None:
    expected: Counter[tuple[int, int]] = Counter()
    for i in np.flatnonzero(rows.labels > 0):
        past = [int(rows.behaviours.ids[row, 0]) for row in rows.history[i] if row]
        ad = int(rows.ad.ids[i, 0])
        expected.update((ad, behaviour) for behaviour in past[-WINDOW:] if ad > 1 and behaviour > 1 and behaviour != ad)
    pairs, times = counted(rows)
    assert {(int(a), int(b)): int(n) for (a, b), n in zip(pairs, times, strict=True)} == dict(expected)
    assert sum(expected.values()) > 100


def test_only_the_last_behaviours_count(rows: Rows) -> None:
    known = np.flatnonzero(rows.behaviours.ids[:, 0] > 1)
    long = np.zeros((1, WINDOW + 3), np.int32)
    long[0, : WINDOW + 2] = [known[0], known[1], *[known[2]] * WINDOW]
    own = int(np.flatnonzero(rows.ad.ids[:, 0] == rows.behaviours.ids[known[3], 0])[0])
    one = replace(rows, labels=np.ones(1, np.float32), history=long, ad=rows.ad.take(np.array([own])))
    pairs, times = counted(one)
    assert pairs.tolist() == [[int(rows.behaviours.ids[known[3], 0]), int(rows.behaviours.ids[known[2], 0])]]
    assert times.tolist() == [WINDOW]


def test_the_loss_is_the_weighted_square_of_what_is_missing_to_the_log(rows: Rows) -> None:
    network = small.network("deepfm")
    task = Cooccurrence(network, rows, 0.1, 1)
    task.bias.weight.data.normal_()
    pairs, times = counted(rows)
    vectors = network.second.table.weight.detach().numpy()
    first = network.second.rows_of("ad_id").start - 1
    biases, losses = task.bias.weight.detach().numpy()[:, 0], []
    for (a, b), n in zip(pairs + first, times, strict=True):
        gap = float(vectors[a] @ vectors[b]) + biases[a] + biases[b] - np.log(n)
        losses.append(min((n / 100) ** 0.75, 1.0) * gap**2)
    assert task.loss_of(torch.arange(len(pairs))).item() == pytest.approx(np.mean(losses), rel=1e-4)


def test_a_training_with_it_learns_what_is_clicked_together(rows: Rows) -> None:
    settings = TrainSettings(epochs=15, batch=64, learning_rate=0.03, unknown_rate=0.0, embedding_l2=0.0, threads=1, patience=99)
    after = {}
    for weight in (0.0, 5.0):
        torch.manual_seed(0)
        network = small.build("fm", small.fields_of("fm"), small.NETWORK_SETTINGS["fm"])
        fit_network(network, rows, rows, replace(settings, cooccurrence=weight), small.quiet())
        task = Cooccurrence(network, rows, 1.0, 1)
        vectors = network.second.table.weight.detach()
        a, b = task.pairs.unbind(1)
        inner = (vectors[a] * vectors[b]).sum(1).numpy()
        after[weight] = float(np.corrcoef(inner, task.times.log().numpy())[0, 1])
    assert after[5.0] > after[0.0] + 0.05


@pytest.mark.parametrize(
    ("family", "text", "message"),
    [
        ("lr", small.SCHEMA, "this network has weights alone"),
        ("fm", small.SCHEMA.replace(small.HISTORY, ""), "the schema needs ad_id as a field of the ad, and"),
    ],
)
def test_what_has_no_vectors_of_ads_is_refused(rows: Rows, family: str, text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=message):
        fit_network(small.network(family, text), rows, rows, TrainSettings(cooccurrence=0.1), small.quiet())
    with pytest.raises(TrainError, match=r"cooccurrence is -1\.0; it must be at least 0"):
        TrainSettings(cooccurrence=-1.0)
