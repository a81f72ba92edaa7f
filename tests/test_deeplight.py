"""DeepLight: the sum of its paper, what is pruned when, and that what is pruned is not served."""

import re
from itertools import combinations
from pathlib import Path

import pytest
import small
import torch
from torch import nn

from tests.test_deepfm import vectors
from tests.test_networks import CLOSE, SCHEMAS
from training.datasets.encoded import encode_split
from training.fit import fit_network
from training.networks.deeplight import DeepLight, DistinctRows, largest
from training.networks.fuse import fused
from training.networks.interactions import FusedProducts, WeightedProducts
from training.networks.layers import FusedTower
from training.train_settings import TrainError, TrainSettings


def pruned(text: str = small.SCHEMA, **shares: float) -> DeepLight:
    """A network of random weights at the end of its schedule."""
    usual = {"prune_pairs": 0.9, "prune_units": 0.75, "prune_values": 0.5}
    network = small.network("deeplight", text, hidden=(12, 8), **{**usual, **shares})
    network.after_step(network.settles_after)
    return network


@pytest.mark.parametrize("text", SCHEMAS)
def test_logits_are_field_linear_weighted_pairs_and_tower(text: str) -> None:
    network, parts = small.network("deeplight", text), small.parts(text)
    request = network.fields.request
    with torch.no_grad():
        logits = small.click(network, *parts)
        for row in range(3):
            for candidate in range(5):
                v = vectors(network.second, parts, row, candidate)
                linear = sum(float(a @ b) for a, b in zip(v, network.linear.weight, strict=True))
                pairs = zip(network.pairs.weight, combinations(range(len(v)), 2), strict=True)
                products = sum(float(r * (v[i] @ v[j])) for r, (i, j) in pairs)
                sides = [torch.cat([*side, torch.zeros(0)]) for side in (v[:request], v[request:])]
                deep = float(network.tower(sides[0][None], sides[1][None, None]))
                expected = linear + products + deep + float(network.bias)
                assert float(logits[row, candidate]) == pytest.approx(expected, abs=1e-4, rel=1e-4)


def test_the_smallest_go() -> None:
    assert largest(torch.tensor([3.0, 1.0, 4.0, 1.5, 9.0]), 0.4).tolist() == [1, 0, 1, 0, 1]
    assert largest(torch.tensor([3.0, 1.0]), 0.99).tolist() == [1, 0]
    assert largest(torch.zeros(0), 0.9).tolist() == []


def test_the_shares_rise_steeply_to_what_is_asked_for_and_stay() -> None:
    network = small.network("deeplight", hidden=(12, 8), prune_from=20, prune_steps=100, prune_pairs=0.9)
    count, zeros = network.pairs.weight.numel(), []
    for step in range(1, 151):
        with torch.no_grad():
            network.pairs.weight.add_(0.01)  # as an optimiser does, which knows nothing of what is pruned
        network.after_step(step)
        zeros.append(int((network.pairs.weight == 0).sum()))
    assert zeros[:29] == [0] * 29
    # 0.9 (1 - exp(-5 k)) / (1 - exp(-5)) of 78 pairs at a tenth, a half and the whole of the way.
    assert count == 78
    assert [zeros[29], zeros[69], zeros[119], zeros[149]] == [28, 65, 70, 70]
    assert zeros == sorted(zeros)


def test_units_and_values_go_by_what_they_say_and_the_unknown_stays() -> None:
    network = small.network("deeplight", hidden=(12, 8), prune_units=0.75, prune_values=0.5)
    listeners = [module for module in network.tower.rest if isinstance(module, nn.Linear)]
    gains = [network.tower.rest[0].weight, network.tower.rest[3].weight]
    heard = [(gain.abs() * listener.weight.norm(dim=0)).detach() for gain, listener in zip(gains, listeners, strict=True)]
    norms = network.second.table.weight.norm(dim=1).detach()
    network.after_step(network.settles_after)
    for scores, listener, kept in zip(heard, listeners, (3, 2), strict=True):
        audible = listener.weight.abs().sum(0) > 0
        assert int(audible.sum()) == kept
        assert scores[audible].min() > scores[~audible].max()
    table = network.second.table.weight
    unknown = [network.second.rows_of(vocabulary).start for vocabulary in network.second.sizes]
    assert table[unknown].abs().sum(1).all()
    gone = (table == 0).all(1)
    assert int(gone[1:].sum()) == 40  # of 79
    known = [i for i in range(1, len(table)) if i not in unknown]
    assert norms[[i for i in known if gone[i]]].max() < norms[[i for i in known if not gone[i]]].min()


@pytest.mark.parametrize("text", SCHEMAS)
def test_a_pruned_network_is_served_without_what_is_pruned(text: str) -> None:
    network, parts = pruned(text), small.parts(text)
    served = fused(network)
    with torch.no_grad():
        assert torch.allclose(small.click(served, *parts), small.click(network, *parts), **CLOSE)
    tower = served.tower
    assert isinstance(tower, FusedTower)
    assert [len(layer.weight) for layer in (tower.request, *tower.rest)] == [3, 2, 1]
    if text == small.SCHEMA:
        assert isinstance(served.pairs, FusedProducts)
        assert served.pairs.few
        table = served.second.table
        assert isinstance(table, DistinctRows)
        assert len(table.rows.weight) == int((network.second.table.weight != 0).any(1).sum()) + 1  # and one of zeros


def test_products_without_any_weight_are_nothing() -> None:
    u, a = torch.randn(2, 2, 3), torch.randn(2, 4, 2, 3)
    for kept in ([], [(0, 1)], [(2, 3)], [(0, 3)], [(0, 1), (1, 2)]):
        block = WeightedProducts(2, 2)
        with torch.no_grad():
            numbers = [kept.index(pair) + 1.0 if pair in kept else 0.0 for pair in combinations(range(4), 2)]
            block.weight.copy_(torch.tensor(numbers))
            assert torch.allclose(block.fused(None)(u, a).expand(2, 4), block(u, a), atol=1e-5)


def test_many_products_are_served_as_they_are() -> None:
    block, u, a = WeightedProducts(2, 6), torch.randn(2, 2, 3), torch.randn(2, 4, 6, 3)
    with torch.no_grad():
        block.weight.normal_()
        served = FusedProducts(block)
        assert not served.few
        assert torch.allclose(served(u, a), block(u, a), atol=1e-4)


def test_an_epoch_before_the_last_pruning_is_not_chosen(tmp_path: Path) -> None:
    data = small.data_set(tmp_path)
    network = small.network("deeplight", prune_from=2, prune_steps=10, prune_pairs=0.5)
    train, valid = (encode_split(data, split, small.encoder()) for split in ("train", "valid"))
    settings = TrainSettings(
        epochs=4, batch=64, threads=1, learning_rate=0.02, embedding_l2=1e-4, unknown_rate=0, least_steps=0, patience=1
    )
    epochs = fit_network(network, train, valid, settings, small.quiet())  # 5 steps an epoch: pruned in the third
    assert len(epochs) >= 3
    assert int((network.pairs.weight == 0).sum()) == 39


def test_a_training_too_short_to_prune_in_is_refused(tmp_path: Path) -> None:
    data = small.data_set(tmp_path)
    rows = [encode_split(data, split, small.encoder()) for split in ("train", "valid")]
    message = (
        "this network is being pruned until step 800, and 3 epochs of 300 rows are 15 steps; "
        "let it have more epochs, or set prune_from and prune_steps lower"
    )
    with pytest.raises(TrainError, match=f"^{re.escape(message)}$"):
        fit_network(small.network("deeplight"), *rows, TrainSettings(epochs=3, batch=64), small.quiet())


def bytes_of(network: nn.Module) -> int:
    return sum(each.numel() * each.element_size() for each in (*network.parameters(), *network.buffers()))


def test_what_is_served_of_a_pruned_network_is_smaller() -> None:
    whole = small.network("deeplight", hidden=(64, 64), embedding=16)
    before = bytes_of(fused(whole))
    whole.after_step(whole.settles_after)
    assert bytes_of(fused(whole)) < 0.5 * before
