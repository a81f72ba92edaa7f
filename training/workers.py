"""A training on several workers of a Ray cluster, or of a local Ray that is started and ended for it.

Ray starts the processes, joins them, and starts them anew when one is lost; then they go on from the checkpoint. What they do is
`fit_network`, each with its `Process`. Nothing else of a training is here: calibration, export and publishing are the driver's.
"""

import hashlib
import io
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from features.errors import AdrankError

from .checkpoint import Checkpoint, digest_of
from .datasets.encoded import Rows
from .device import device_of
from .distributed import Process
from .fit import Epoch, check_steps, deterministic, fit_network
from .networks.contract import Network
from .ray_cluster import LOCAL, check_cluster, cluster
from .shards import map_tables, write_rows
from .train_settings import TrainError, TrainSettings

LOST = 3
"""How often workers may be lost before a training is given up."""
SOURCES = Path(__file__).parent.parent
Weights = dict[str, np.ndarray[Any, Any]]
ADDRESS = "RAY_ADDRESS"
"""Ray's own variable for the cluster of a program; without it one is started on this machine."""


def fit_by_workers(  # noqa: PLR0913, PLR0917  # what `fit_network` takes, and where its rows are from
    encoded: Callable[[], tuple[Rows, Rows]],
    network: Network,
    rows: Rows,
    valid: Rows,
    settings: TrainSettings,
    progress: Progress,
    warm: bool,
    checkpoint: Checkpoint | None,
) -> list[Epoch]:
    """`fit_network` on `settings.workers` processes, which all see the folder of the checkpoint.

    Rows in memory are sent, once a machine; of those on disk each machine asks `encoded`, which finds them there or encodes its own data.

    Raises:
        ClusterError: there is no such cluster.
        TrainError: its machines have another version of adrank, or workers are lost again and again.
    """
    if checkpoint is None:
        raise TrainError("several workers go on from a checkpoint when one is lost; say where it goes, or train with workers=1")
    settings = settings.for_rows(len(rows))
    check_steps(network, len(rows), settings, settings.workers)
    if not checkpoint.resume:
        checkpoint.remove()  # what is there is of another training; what will be there is of this one
    where = (checkpoint.path.parent.absolute(), checkpoint.seconds / 60, checkpoint.training)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with cluster(*_where(), settings.workers * (settings.threads or 1)) as ray, _lines(progress) as queue:
        splits = encoded if rows.mapped or valid.mapped else (rows, valid)
        given = {"network": network, "splits": splits, "settings": settings, "warm": warm, "checkpoint": where}
        config = {"given": [ray.put(given)], "lines": queue, "code": code()}
        weights, epochs = _run(config, settings, where[0])
    map_tables(network, checkpoint.path)
    network.load_state_dict({name: torch.tensor(values) for name, values in weights.items()}, strict=False)  # without what is mapped
    network.eval()
    return epochs


def _run(config: Mapping[str, Any], settings: TrainSettings, folder: Path) -> tuple[Weights, list[Epoch]]:
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError  # noqa: PLC0415  # an extra
    from ray.train.torch import TorchTrainer  # noqa: PLC0415

    gpu = device_of(settings.device).type == "cuda"
    each = {"CPU": settings.threads or 1, "GPU": int(gpu)}
    scaling = ScalingConfig(num_workers=settings.workers, use_gpu=gpu, resources_per_worker=each)
    run = RunConfig(name="ray", storage_path=str(folder), failure_config=FailureConfig(max_failures=LOST))
    try:
        found = TorchTrainer(_work, train_loop_config=dict(config), scaling_config=scaling, run_config=run).fit()
    except TrainingFailedError as error:
        raise _why(error, settings.workers) from error
    finally:
        shutil.rmtree(folder / "ray", ignore_errors=True)
    if isinstance(found.return_value, str):
        raise TrainError(found.return_value)
    weights, epochs = found.return_value
    return weights, epochs


def _why(error: BaseException, workers: int) -> AdrankError:
    """What a worker said, or that it was lost."""
    said = getattr(error, "worker_failures", {})
    for failure in (*said.values(), error):
        cause = getattr(failure, "cause", failure)
        if isinstance(cause, AdrankError):
            return cause
    line = str(next(iter(said.values()), error)).strip().splitlines()[-1]
    return TrainError(f"{workers} workers were lost {LOST + 1} times: {line}; go on with --resume")


def _work(config: Mapping[str, Any]) -> str | tuple[Weights, list[Epoch]]:
    """What a worker does, from what the driver gives it: the weights, or why there are none."""
    import ray  # noqa: PLC0415

    context, given = ray.train.get_context(), ray.get(config["given"][0])
    network, settings, (folder, minutes, training) = given["network"], given["settings"], given["checkpoint"]
    rows, valid = splits = given["splits"]() if callable(given["splits"]) else given["splits"]
    process = Process(context.get_world_rank(), context.get_world_size())
    differs = {"another version of adrank or of torch": config["code"] != code(), "other data": digest_of(splits) != training["data"]}
    for mistakes in process.told([f"{socket.gethostname()} has {what}" for what, wrong in differs.items() if wrong]):
        if mistakes:
            return mistakes[0] + " than where the training began; make them the same"
    checkpoint = Checkpoint(folder, minutes)
    checkpoint.training, checkpoint.resume = training, checkpoint.path.exists()
    out = Console(file=_Sent(config["lines"]), width=1000) if not process.rank else Console(quiet=True)
    with deterministic(settings), Progress(console=out, disable=True) as progress:
        if not settings.threads:
            torch.set_num_threads(1)
        epochs = fit_network(network, rows, valid, settings, progress, given["warm"], checkpoint=checkpoint, process=process)
    apart = {id(table.weight) for table in write_rows(network, checkpoint.path)}
    state = network.cpu().state_dict(keep_vars=True)
    weights = {name: values.detach().numpy() for name, values in state.items() if id(values) not in apart}  # Ray returns no tensors
    return weights, epochs


def code() -> str:
    """The digest of the code that trains: ours, and torch's version."""
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sorted(path for package in ("features", "training") for path in (SOURCES / package).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def check_workers() -> None:
    """That there is a cluster for them, before anything is encoded.

    Raises:
        ClusterError: there is not.
    """
    check_cluster(*_where())


def _where() -> tuple[str, str]:
    return os.environ.get(ADDRESS) or LOCAL, "leave out --ray"


@contextmanager
def _lines(progress: Progress) -> Iterator[Any]:
    """A queue, whose texts are printed."""
    from ray.util.queue import Queue  # noqa: PLC0415

    queue = Queue(actor_options={"num_cpus": 0})

    def show() -> None:
        while (text := queue.get()) is not None:
            progress.console.print(text, end="", soft_wrap=True, highlight=False)

    reader = threading.Thread(target=show, daemon=True)
    reader.start()
    try:
        yield queue
    finally:
        queue.put(None)
        reader.join(10.0)


class _Sent(io.StringIO):
    """A file whose texts go into a queue."""

    def __init__(self, queue: Any) -> None:
        super().__init__()
        self.queue = queue

    def write(self, text: str) -> int:
        """Send it."""
        self.queue.put(text)
        return len(text)
