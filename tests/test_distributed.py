"""Two processes that train one network, as Ray's workers do, joined by gloo: of the same batches the same network."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import small
import torch
from torch import Tensor, distributed, multiprocessing

from tests.test_checkpoint import USUAL
from training import unknown
from training.checkpoint import Checkpoint
from training.datasets.encoded import Rows, encode_split
from training.datasets.prepared import Prepared, open_prepared
from training.distributed import Process
from training.fit import deterministic, fit_network, predict
from training.networks import build
from training.networks.contract import Fields
from training.shards import BLOCK, Shard, map_tables, split, write_rows
from training.train import train
from training.train_settings import TrainError, TrainSettings

PLAIN = {"flat_below": 0, "epochs": 3, "clip": 1e9}
SPLIT = {"workers": 2, "shard_rows": 10, "sparse_above": 10}
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "dense": ("fm", 300, PLAIN),
    "sparse": ("fm", 300, PLAIN | {"sparse_above": 10}),  # lazy Adam of all that both touched
    "split": ("fm", 300, PLAIN | SPLIT | {"clip": 0.02}),
    "split and hidden": ("deepfm", 299, SPLIT | {"epochs": 4, "unknown_rate": 0.1}),
    "ftrl": ("wide_deep", 300, PLAIN),
    "alone first": ("deepfm", 300, {"epochs": 4}),
    "second task": ("din", 299, PLAIN | {"unknown_rate": 0.1, "cooccurrence": 0.5, "batch": 33}),
    "one row more": ("deepfm", 257, PLAIN | {"unknown_rate": 0.1}),  # beyond 4 batches
}
SAME = ("dense", "sparse", "split")
"""Those without statistics of a batch, which each process has its own of."""
TABLE = torch.arange(10.0).view(5, 2)
ROWS = sum(size - 1 for size in small.fields_of("fm").sizes.values()) + 1
"""Of each table."""


class AtSixth(Checkpoint):
    """A checkpoint of the sixth step, in the second epoch."""

    training = {"network": "fm", "settings": {}, "schema": "", "data": ""}  # noqa: RUF012  # as its base has it
    steps = 0

    def due(self) -> bool:
        self.steps += 1
        return self.steps == 6 and not self.resume


def fitted(data: Prepared, case: str, process: Process, checkpoint: Checkpoint | None = None) -> dict[str, Any]:
    family, count, given = CASES[case]
    settings = TrainSettings(**USUAL | given)
    with deterministic(settings):
        network = build(family, fields_of(case), small.NETWORK_SETTINGS[family])
        for table in split(network, process, settings.seed) if process.of == 1 else ():
            table.shard = None  # whole, from where the parts of two begin
        train, valid = splits(data, count)
        epochs = fit_network(network, train, valid, settings, small.quiet(), checkpoint=checkpoint, process=process)
    write_rows(network, data.folder.parent / case)
    weights = {name: whole(values, process) if "table" in name else values for name, values in network.state_dict().items()}
    return {"weights": weights, "aucs": [each.valid.auc for each in epochs], "logits": predict(network, valid)}


def fields_of(case: str) -> Fields:
    family, _, given = CASES[case]
    return small.fields_of(family)._replace(shard_rows=given.get("shard_rows", 0))


def whole(rows: Tensor, process: Process) -> Tensor:
    """A table of which each process has all, or its part."""
    parts = process.told(rows)
    return torch.cat(parts) if sum(map(len, parts)) == ROWS else rows


def splits(data: Prepared, count: int) -> tuple[Rows, Rows]:
    rows = encode_split(data, "train", small.encoder())
    return rows.take(torch.arange(count).numpy()), encode_split(data, "valid", small.encoder())


def work(rank: int, folder: Path) -> None:
    """What a process does; it leaves what came of each case."""
    torch.set_num_threads(1)
    unknown.SETTLING_STEPS = 20  # `test_unknown` shows where they end
    distributed.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    data, process = open_prepared(folder / "data"), Process(rank, 2)
    found = {case: fitted(data, case, process) for case in CASES}
    for case in ("dense", "split"):
        found[f"{case}, whole"] = fitted(data, case, process, AtSixth(folder / "checkpoint" / case))
        distributed.barrier()
        found[f"{case}, resumed"] = fitted(data, case, process, AtSixth(folder / "checkpoint" / case, resume=True))
    shard, asked = Shard(len(TABLE), process), torch.tensor([[0, 1, 4], []][rank], dtype=torch.int64)
    fetched = shard.fetched(TABLE[shard.first :][: shard.count], asked)
    rows, sums = shard.sent(torch.tensor([[4, 1, 4], [0] * 3][rank]), torch.ones(3, 2))
    nothing = shard.sent(asked[:0], torch.ones(0, 2))
    torch.save({**found, "fetched": fetched, "sent": (rows + shard.first, sums), "nothing": nothing}, folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("two")
    (folder / "data").mkdir()
    return small.data_set(folder / "data")


@pytest.fixture(scope="module")
def both(data: Prepared) -> list[dict[str, Any]]:
    """What each process ended with."""
    folder = data.folder.parent
    processes = multiprocessing.spawn(work, (folder,), 2, join=False)
    assert processes.join(timeout=300) or processes.join(timeout=300)  # true when all have ended
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_all_processes_have_the_same_network_and_it_has_learned(both: list[dict[str, Any]], case: str) -> None:
    first, second = (each[case] for each in both)
    assert first["aucs"] == second["aucs"]
    assert max(first["aucs"]) > 0.55
    if "unknown_rate" not in CASES[case][2]:  # only the first settles what is unknown, at its end
        assert all(torch.equal(values, second["weights"][name]) for name, values in first["weights"].items())


@pytest.mark.parametrize("case", SAME)
def test_two_processes_end_with_the_network_of_one(data: Prepared, both: list[dict[str, Any]], case: str) -> None:
    one = fitted(data, case, Process())
    assert both[0][case]["aucs"] == pytest.approx(one["aucs"], abs=1e-3)
    assert both[0][case]["logits"] == pytest.approx(one["logits"], abs=1e-3)  # sums in another order


@pytest.mark.parametrize("case", ["dense", "split"])
def test_all_go_on_from_what_was_written(both: list[dict[str, Any]], case: str) -> None:
    for each in both:
        before = each[f"{case}, whole"]["weights"]
        assert all(torch.equal(values, before[name]) for name, values in each[f"{case}, resumed"]["weights"].items())


def test_rows_come_from_their_owners_and_gradients_go_there_though_one_asks_for_none(both: list[dict[str, Any]]) -> None:
    assert torch.equal(both[0]["fetched"], TABLE[[0, 1, 4]])
    assert both[1]["fetched"].shape == (0, 2)
    assert [each["sent"][0].tolist() for each in both] == [[1, 0, 0, 0], [4, 4]]
    assert all((each["sent"][1] == 0.5).all() and len(each["nothing"][0]) == 0 for each in both)  # means over two


@pytest.mark.parametrize("case", ["split", "split and hidden"])
def test_parts_of_a_table_make_a_file_that_is_mapped(data: Prepared, both: list[dict[str, Any]], case: str) -> None:
    network = build(CASES[case][0], fields_of(case), small.NETWORK_SETTINGS[CASES[case][0]])
    map_tables(network, data.folder.parent / case)
    state = network.state_dict()
    assert all(torch.equal(state[name], both[0][case]["weights"][name]) for name in ("first.table.weight", "second.table.weight"))
    assert not list(data.folder.parent.glob(f"{case}.*"))


def test_a_table_begins_alike_however_many_share_it() -> None:
    rows, alone = 2 * BLOCK + 5, Shard(2 * BLOCK + 5, Process()).drawn(1, 0.1, (1, 0))
    assert torch.equal(torch.cat([Shard(rows, Process(rank, 3)).drawn(1, 0.1, (1, 0)) for rank in range(3)]), alone)
    assert float(alone.std()) == pytest.approx(0.1, rel=0.02)
    assert not alone[0].any()
    assert [Shard(5, Process(rank, 4)).count for rank in range(4)] == [2, 2, 1, 0]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "shard_rows is 5; it must be 0 where workers is 1: there is nobody to share tables with"),
        ({"workers": 2, "device": "cuda"}, "it must be 0 where device is cuda"),
        ({"workers": 2, "cooccurrence": 0.5}, "it must be 0 where there is cooccurrence"),
    ],
)
def test_tables_that_cannot_be_split_are_a_sentence(given: dict[str, Any], said: str) -> None:
    with pytest.raises(TrainError, match=said):
        TrainSettings(shard_rows=5, **given)


@pytest.mark.parametrize("family", ["wide_deep", "deeplight", "dien"])
def test_a_network_that_needs_whole_tables_is_a_sentence(data: Prepared, family: str) -> None:
    with (
        mock.patch("training.train.check_workers"),
        pytest.raises(TrainError, match=f"shard_rows is for networks of which .* {family} is none: leave it out, or train deepfm"),
    ):
        train(data, family, small.NETWORK_SETTINGS[family], TrainSettings(workers=2, shard_rows=5), small.quiet())


def test_a_batch_too_small_for_its_workers_is_a_sentence(data: Prepared) -> None:
    family, (train, valid) = "fm", splits(data, 300)
    network = build(family, small.fields_of(family), small.NETWORK_SETTINGS[family])
    with pytest.raises(TrainError, match="20 workers need a batch of at least 40 rows, 2 each; it has 32"):
        fit_network(network, train, valid, TrainSettings(batch=32), small.quiet(), process=Process(0, 20))
    with pytest.raises(TrainError, match="workers is 2; it must be 1 where regularise is batch"):
        TrainSettings(workers=2, regularise="batch")
