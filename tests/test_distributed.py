"""Two processes that train one network, as Ray's workers do, joined by gloo: of the same batches the same network."""

from pathlib import Path
from typing import Any

import pytest
import small
import torch
from torch import distributed, multiprocessing

from tests.test_checkpoint import USUAL
from training.checkpoint import Checkpoint
from training.datasets.encoded import Rows, encode_split
from training.datasets.prepared import Prepared, open_prepared
from training.distributed import Process
from training.fit import deterministic, fit_network, predict
from training.networks import build
from training.train_settings import TrainError, TrainSettings

PLAIN = {"flat_below": 0, "epochs": 3, "clip": 1e9}
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "dense": ("fm", 300, PLAIN),
    "sparse": ("fm", 300, PLAIN | {"sparse_above": 10}),  # lazy Adam of all that both touched
    "ftrl": ("wide_deep", 300, PLAIN),
    "alone first": ("deepfm", 300, {"epochs": 4}),
    "second task": ("din", 299, PLAIN | {"unknown_rate": 0.1, "cooccurrence": 0.5, "batch": 33}),
    "one row more": ("deepfm", 257, PLAIN | {"unknown_rate": 0.1}),  # beyond 4 batches
}
SAME = ("dense", "sparse")
"""Those without statistics of a batch, which each process has its own of."""


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
        network = build(family, small.fields_of(family), small.NETWORK_SETTINGS[family])
        train, valid = splits(data, count)
        epochs = fit_network(network, train, valid, settings, small.quiet(), checkpoint=checkpoint, process=process)
    return {"weights": network.state_dict(), "aucs": [each.valid.auc for each in epochs], "logits": predict(network, valid)}


def splits(data: Prepared, count: int) -> tuple[Rows, Rows]:
    rows = encode_split(data, "train", small.encoder())
    return rows.take(torch.arange(count).numpy()), encode_split(data, "valid", small.encoder())


def work(rank: int, folder: Path) -> None:
    """What a process does; it leaves what came of each case."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    data, process = open_prepared(folder / "data"), Process(rank, 2)
    found = {case: fitted(data, case, process) for case in CASES}
    whole = fitted(data, "dense", process, AtSixth(folder / "checkpoint"))
    distributed.barrier()
    resumed = fitted(data, "dense", process, AtSixth(folder / "checkpoint", resume=True))
    torch.save({**found, "whole": whole, "resumed": resumed}, folder / f"{rank}.pt")
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


def test_all_go_on_from_what_the_first_wrote(both: list[dict[str, Any]]) -> None:
    for each in both:
        assert all(torch.equal(values, each["whole"]["weights"][name]) for name, values in each["resumed"]["weights"].items())


def test_a_batch_too_small_for_its_workers_is_a_sentence(data: Prepared) -> None:
    family, (train, valid) = "fm", splits(data, 300)
    network = build(family, small.fields_of(family), small.NETWORK_SETTINGS[family])
    with pytest.raises(TrainError, match="20 workers need a batch of at least 40 rows, 2 each; it has 32"):
        fit_network(network, train, valid, TrainSettings(batch=32), small.quiet(), process=Process(0, 20))
    with pytest.raises(TrainError, match="workers is 2; it must be 1 where regularise is batch"):
        TrainSettings(workers=2, regularise="batch")
