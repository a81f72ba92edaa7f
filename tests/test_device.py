"""The device of a training, as far as a machine without one goes: on torch's `meta`, which has shapes and no numbers, and on the CPU."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.test_checkpoint import Killed, KilledAfter, state, trained
from tests.test_cli import QUICK, refused, run
from tests.test_networks import CASES, rows_of_training
from training.checkpoint import Checkpoint
from training.device import AHEAD, ahead, delivered, device_of, home, moved
from training.fit import batch_loss
from training.networks.contract import Labels, Network, Part, RequestTensors
from training.networks.din import LocalActivation
from training.networks.sampled_softmax import Frequencies

META, CPU, TWINS = torch.device("meta"), torch.device("cpu"), 4


class Nothing(TorchDispatchMode):
    """Lets nothing be made but on `meta`."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = op(*args, **(kwargs or {}))
        assert all(each.is_meta for each in tree_leaves(made) if isinstance(each, torch.Tensor)), op
        return made


def begun(family: str, settings: dict[str, Any], device: torch.device) -> tuple[Network, RequestTensors, Labels]:
    """A network in training, and a batch whose last rows are twins."""
    network, (request, labels) = small.network(family, **settings).train().to(device), rows_of_training(small.SCHEMA)
    request, heads = moved((request, {head: each[: -2 * TWINS] for head, each in labels.heads.items()}), device)
    network.begin(Part(request.ad.ids[:, 0], request.ad.numbers[:, 0]))
    return network, request, Labels(heads)


@pytest.mark.parametrize(("family", "settings"), CASES)
def test_a_step_makes_no_tensor_on_another_device(family: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """But for what depends on numbers, which `meta` has not: DIN's packed attention, and the count of distinct ads of two_tower."""
    monkeypatch.setattr(Frequencies, "update", lambda *_: None)
    network, request, labels = begun(family, settings, META)
    for module in network.modules():
        if isinstance(module, LocalActivation):
            module.training = False
    with Nothing():
        loss = batch_loss(network, request, labels, TWINS)
        loss.backward()
    assert (loss.shape, loss.device, home(network)) == ((), META, META)
    assert all(weight.grad.is_meta for weight in network.parameters() if weight.grad is not None)


def test_what_is_made_on_another_device_is_noticed() -> None:
    with pytest.raises(AssertionError, match="zeros"), Nothing():
        torch.zeros(1)


@pytest.mark.parametrize(("family", "settings"), CASES)
def test_a_step_in_bfloat16_has_the_loss_of_one_in_float32_and_whole_gradients(family: str, settings: dict[str, Any]) -> None:
    losses = []
    for amp in (False, True):
        network, request, labels = begun(family, settings, CPU)
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss = batch_loss(network, request, labels, TWINS)
        loss.backward()
        losses.append(loss.item())
        assert loss.dtype is torch.float32
        gradients = [weight.grad for weight in network.parameters() if weight.grad is not None]
        assert all(gradient.dtype is torch.float32 and gradient.isfinite().all() for gradient in gradients)
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_batches_are_made_ahead_by_a_thread_that_ends_with_them() -> None:
    far = threading.Event()

    def numbers() -> Iterator[int]:
        for number in range(5):
            if number == 1 + AHEAD:
                far.set()
            yield number

    before, batches = threading.active_count(), ahead(numbers())
    assert next(batches) == 0
    assert next(batches) == 1
    assert far.wait(60)
    assert list(batches) == [2, 3, 4]
    assert threading.active_count() == before
    stopped = ahead(iter(range(9)))
    next(stopped)
    stopped.close()  # type: ignore[attr-defined]  # it is a generator
    assert threading.active_count() == before
    with pytest.raises(ZeroDivisionError):
        list(ahead(1 // number for number in (1, 0)))


def test_a_training_whose_batches_are_made_ahead_is_the_same_one_and_so_is_one_that_goes_on(
    tmp_path: Path, settled_soon: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "data").mkdir()
    data, settings = small.data_set(tmp_path / "data"), {"unknown_rate": 0.1, "flat_below": 0, "epochs": 2}
    whole = state(trained(data, "deepfm", None, settings | {"device": "cpu"}))
    assert state(trained(data, "deepfm", None, settings)) == whole  # device is auto
    monkeypatch.setattr("training.fit.delivered", lambda batches, device: ahead(delivered(batches, device)))
    with pytest.raises(Killed):
        trained(data, "deepfm", KilledAfter(tmp_path, 3), settings)
    assert state(trained(data, "deepfm", Checkpoint(tmp_path, resume=True), settings)) == whole


def test_a_device_that_is_not_there_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of("auto") == device_of("cpu") == CPU
    data = small.data_set(tmp_path).folder
    for command, more in (("train", ("--models", tmp_path / "models")), ("tune", ("--minutes", 1, "--trials", tmp_path / "trials"))):
        words = (command, "--data", data, "--model", "deepfm", *more, "--device", "cuda")
        refused(
            run(*words, *(QUICK if command == "train" else ())), "device is cuda, and torch finds no CUDA device here; say --device cpu"
        )
