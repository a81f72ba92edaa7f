"""Large tables: which rows a step changes, by how much, and that nothing else of a training is another for it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
import torch
from torch.nn import functional as F

from training.datasets.encoded import Rows, encode_split
from training.datasets.prepared import Prepared
from training.fit import batch_loss, fit_network
from training.networks.ftrl import FTRL
from training.networks.lookup import EmbeddingTable, look_up, sum_up
from training.simulation import make_world, write_log
from training.sparse import LazyAdam, SparseTables, lazily
from training.train_settings import TrainSettings
from training.unknown import parts_of
from training.updates import Updates

RATE, L2 = 0.02, 0.3
STILL: dict[str, Any] = {"learning_rate": RATE, "embedding_l2": L2, "unknown_rate": 0.0, "clip": 1e9, "threads": 1}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[Rows, Rows]:
    data = small.data_set(tmp_path_factory.mktemp("small"))
    return encode_split(data, "train", small.encoder()), encode_split(data, "valid", small.encoder())


def lookups(table: EmbeddingTable, ids: torch.Tensor) -> torch.Tensor:
    return (table(ids) * torch.arange(1.0, 1 + ids.numel()).view(*ids.shape, 1)).square().sum()


def test_a_lookup_is_torch_s_own_and_so_is_its_gradient() -> None:
    torch.manual_seed(1)
    table, ids = EmbeddingTable(9, 3), torch.tensor([[4, 4, 0], [8, 1, 4]])
    lookups(table, ids).backward()
    plain = torch.nn.Embedding(9, 3, padding_idx=0)
    plain.load_state_dict(table.state_dict())
    lookups(plain, ids).backward()
    assert torch.equal(table(ids), plain(ids))
    assert torch.equal(table.weight.grad, plain.weight.grad)
    values = torch.randn(5, 2, requires_grad=True)
    ours, theirs = (f(values).square().sum() for f in (lambda v: look_up(v, ids.clamp(max=4)), lambda v: F.embedding(ids.clamp(max=4), v)))
    assert all(torch.equal(*each) for each in zip(*(torch.autograd.grad(loss, values) for loss in (ours, theirs)), strict=True))
    ours, theirs = sum_up(values, ids.clamp(max=4)).square().sum(), values[ids.clamp(max=4)].sum(1).square().sum()
    assert all(torch.allclose(*each) for each in zip(*(torch.autograd.grad(loss, values) for loss in (ours, theirs)), strict=True))


def test_a_gathered_gradient_has_each_row_once_and_none_of_padding() -> None:
    torch.manual_seed(1)
    dense, large = EmbeddingTable(9, 3), EmbeddingTable(9, 3)
    large.load_state_dict(dense.state_dict())
    tables = SparseTables([large])
    for table in (dense, large):
        (lookups(table, torch.tensor([7, 2, 7, 0])) + lookups(table, torch.tensor([[2, 5]]))).backward()
    tables.gather()
    gradient = large.weight.grad
    assert gradient is not None
    assert sorted(gradient.indices()[0].tolist()) == [0, 2, 5, 7]
    assert torch.allclose(gradient.to_dense(), dense.weight.grad)
    tables.gather()
    assert large.weight.grad is None  # nothing was looked up since


def test_lazy_adam_is_adam_of_the_rows_that_a_step_has_by_hand() -> None:
    weight = torch.nn.Parameter(torch.ones(4, 1))
    adam = LazyAdam([{"params": [weight], "lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8}])
    moments = dict.fromkeys(range(4), (0.0, 0.0))
    expected = [1.0] * 4
    for step, given in enumerate(({1: 2.0, 3: -1.0}, {1: 1.0}, {0: 1.0, 3: 4.0}), 1):
        weight.grad = torch.sparse_coo_tensor(
            [list(given)], [[g] for g in given.values()], (4, 1), is_coalesced=True, check_invariants=True
        )
        adam.step()
        for row, g in given.items():
            mean, square = 0.9 * moments[row][0] + 0.1 * g, 0.99 * moments[row][1] + 0.01 * g * g
            moments[row] = mean, square
            expected[row] -= 0.1 * mean / (1 - 0.9**step) / ((square / (1 - 0.99**step)) ** 0.5 + 1e-8)
    assert weight.flatten().tolist() == pytest.approx(expected, abs=1e-6)
    assert weight[2].item() == 1.0


@pytest.mark.parametrize("kind", [lambda w: FTRL(w, lr=0.5, l1=0.1, l2=0.1), lambda w: torch.optim.Adagrad(w, lr=0.5)])
def test_ftrl_and_adagrad_are_the_same_with_a_sparse_gradient(kind: Callable[..., torch.optim.Optimizer]) -> None:
    found = []
    for above in (0, 1):
        torch.manual_seed(3)
        table = EmbeddingTable(9, 2)
        tables = SparseTables.among([table], above)
        optimisers = lazily([kind(table.parameters())], tables)
        for ids in ([7, 2, 7], [2, 5, 1]):
            table.weight.grad = None
            lookups(table, torch.tensor(ids)).backward()
            tables.gather()
            for optimiser in optimisers:
                optimiser.step()
        found.append(table.weight.detach().clone())
    assert torch.allclose(*found, atol=1e-6)


@pytest.mark.parametrize(("family", "regularise"), [("deepfm", "table"), ("din", "table"), ("din", "batch")])
def test_a_step_changes_the_rows_of_its_batch_alone_as_adam_would(rows: tuple[Rows, Rows], family: str, regularise: str) -> None:
    train, chosen = rows[0], np.arange(6)
    stepped, before, touched = [], {}, {}
    for above in (0, 1):
        network = small.network(family)
        settings = TrainSettings(**STILL, sparse_above=above, regularise=regularise, first_l2=L2, batch=6, epochs=1)
        updates, batch = Updates(network, train, settings), train.batch(chosen)
        blocks = {name: block for name, block in network.named_modules() if hasattr(block, "table_rows")}
        before = {name: block.table.weight.detach().clone() for name, block in blocks.items()}
        touched = {
            name: np.unique(np.concatenate([b.table_rows(n, p.ids).flatten() for n, p in parts_of(batch, b)])) for name, b in blocks.items()
        }
        updates.step(batch_loss(network, batch, train.labels_of(chosen), 0), batch)
        stepped.append({name: block.table.weight.detach().clone() for name, block in blocks.items()})
    dense, sparse = stepped
    for name, rows_of in touched.items():
        others = np.setdiff1d(np.arange(len(before[name])), rows_of)
        assert torch.equal(sparse[name][others], before[name][others])
        assert len(others) > 10
        assert torch.allclose(sparse[name], dense[name], atol=1e-7) == (regularise == "batch")  # a first step: nothing is remembered yet
        assert torch.allclose(sparse[name][rows_of], dense[name][rows_of], atol=1e-7)
        assert (sparse[name][rows_of[1:]] != before[name][rows_of[1:]]).any(1).float().mean() > 0.9


def test_clipping_counts_the_rows_of_sparse_gradients(rows: tuple[Rows, Rows]) -> None:
    train, chosen, norms = rows[0], np.arange(6), []
    for above in (0, 1):
        network = small.network("deepfm")
        settings = TrainSettings(**{**STILL, "embedding_l2": 0.0, "clip": 1e-3}, sparse_above=above, batch=6, epochs=1, first_l2=1e-30)
        updates, batch = Updates(network, train, settings), train.batch(chosen)
        updates.step(batch_loss(network, batch, train.labels_of(chosen), 0), batch)
        gradients = [weight.grad for weight in network.parameters() if weight.grad is not None]
        norms.append(sum(float(each.to_dense().square().sum()) for each in gradients) ** 0.5)
    assert norms == pytest.approx([1e-3, 1e-3], rel=1e-3)


def test_what_is_updated_sparsely_learns_as_well(tmp_path: Path) -> None:
    write_log(make_world(users=60, ads=40, seed=1), tmp_path / "world", impressions=8_000, seed=1)
    world = Prepared(tmp_path / "world", small.schema((tmp_path / "world" / "schema.toml").read_text()))
    given: dict[str, Any] = {"epochs": 2, "batch": 256, "learning_rate": 0.01}
    dense, sparse = (small.quick(world, "deepfm", **given, sparse_above=above).metrics["test"].auc for above in (0, 1))
    assert sparse == pytest.approx(dense, abs=0.02)
    assert dense > 0.55


def test_a_sparse_training_repeats_to_the_last_bit_and_settles_the_unknown(rows: tuple[Rows, Rows]) -> None:
    states = []
    for _ in range(2):
        network = small.network("lr")
        settings = TrainSettings(epochs=1, batch=64, threads=1, sparse_above=1, flat_below=0)
        fit_network(network, *rows, settings, small.quiet())
        states.append(network.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
