"""The training loop, in plain sight: a network and encoded rows in, the weights of its best epoch out.

Where it stands can be written between two steps, and gone on from: see `checkpoint.py`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor, nn

from .calibrate import Calibration
from .checkpoint import Checkpoint, CheckpointError, changing, put_back
from .cooccurrence import Cooccurrence
from .datasets.encoded import Rows
from .device import delivered, device_of, generators, home, moved
from .distributed import ONLY, Logits, Numbers, Process
from .evaluate import Measures, measure, unmeasured
from .first_order import SHARE, FirstOrder, times
from .networks.contract import CLICK, Labels, Network, RequestTensors
from .order import RowOrder
from .shards import split
from .train_settings import TrainError, TrainSettings
from .unknown import Hiding, Unseen
from .updates import Updates

EVALUATION_ROWS = 4096
LOSS_ROWS = 500
"""Of valid, from where on its log loss tells something of few rows of train: of 200 it is the luck of their click rate."""


@dataclass(frozen=True)
class Epoch:
    """What an epoch came to."""

    number: int
    learning_rate: float
    train_loss: float
    valid: Measures
    first_loss: float = 0.0
    """Of its first step."""
    score: float = 0.0
    """That of the best epoch is the highest: see `score_of`."""

    def line(self) -> str:
        """The epoch in a line, for people who wait."""
        valid = f"valid AUC {self.valid.auc:.5f}, log loss {self.valid.log_loss:.5f}"
        return f"epoch {self.number:2}: learning rate {self.learning_rate:.0e}, train loss {self.train_loss:.5f}, {valid}"


@dataclass
class LoopState:
    """Where the loop stands between two steps, beside the weights and what draws."""

    best: dict[str, Tensor]
    patient: int
    """Steps from where on `patience` counts."""
    alone: bool
    """Whether the first order learns alone."""
    best_score: float = -math.inf
    stale: int = 0
    """Epochs without gain."""
    steps: int = 0
    losses: list[float | Tensor] = field(default_factory=list)
    """Of the steps of the epoch that is under way."""
    epochs: list[Epoch] = field(default_factory=list)

    @classmethod
    def of(cls, values: dict[str, Any], best: dict[str, Tensor]) -> "LoopState":
        """From `values`, as JSON gives them back."""
        epochs = [Epoch(**{**each, "valid": Measures(**each["valid"])}) for each in values["epochs"]]
        return cls(**{**values, "best": best, "epochs": epochs})

    @property
    def values(self) -> dict[str, Any]:
        """All but the weights, for JSON."""
        return {**vars(self), "best": None, "losses": list(map(float, self.losses)), "epochs": [asdict(each) for each in self.epochs]}


def fit_network(  # noqa: C901, PLR0913, PLR0915, PLR0917  # the loop in plain sight
    network: Network,
    rows: Rows,
    valid: Rows,
    settings: TrainSettings,
    progress: Progress,
    warm: bool = False,
    each: Callable[[Epoch], None] = lambda _: None,
    checkpoint: Checkpoint | None = None,
    process: Process = ONLY,
) -> list[Epoch]:
    """Train in place until valid stops gaining; the network ends with the weights of its best epoch, in evaluation mode.

    A training whose logits are no numbers any more ends there, with an epoch whose measures are none: `gate.diverged` tells.

    `warm`: it was trained before, and keeps what it knows of values that these rows do not have. `each` is called after each epoch.
    `checkpoint`: where to write how far it is, and perhaps to go on from. `process`: one of several that train the same network, from the
    same weights and of the same rows; each takes its share of every batch, and rank 0 writes, and ends with the network.

    Raises:
        CheckpointError: see `Checkpoint`.
        TrainError: a batch, or a process's share of one, would have less than two rows.
    """
    settings, device = settings.for_rows(len(rows)), device_of(settings.device)
    check_steps(network, len(rows), settings, process.of)
    shards = split(network, process, settings.seed)
    together = process if shards else ONLY
    network.to(device).begin(moved(rows.ads, device))
    more = _second_task(network, rows, settings, device)
    updates = Updates(network, rows, settings, more, process)
    loss_of = process.parallel(StepLoss(network, more), [table.weight for table in updates.tables.tables])
    for line in updates.summary():
        progress.console.print(line, soft_wrap=True)
    few = len(rows) < settings.flat_below and not warm
    alone = _first_order(network, len(rows), updates.optimisers, settings) if few else None
    pool, share = settings.shuffle_rows if rows.mapped else 0, (process.rank, process.of)
    order = RowOrder(rows, settings.batch // process.of, settings.seed, pool // process.of, share)
    hiding = Hiding(rows, settings.unknown_rate, settings.seed)
    unseen = Unseen(network, rows, warm)
    patient = max(network.settles_after, settings.least_steps // (SHARE if alone else 1))
    state = LoopState(_weights(network), patient, alone is not None)
    if checkpoint and checkpoint.resume:
        state = _go_on(checkpoint, updates, hiding, alone, together)
        at = f"epoch {len(state.epochs) + 1}, step {len(state.losses):,} of it"
        progress.console.print(f"going on from {at} (step {state.steps:,} of all), by {checkpoint.path}", soft_wrap=True)
    _draw_apart(process.rank, updates, hiding, (settings.seed, process.rank, state.steps))
    for _ in state.epochs:
        order.epoch()  # drawn, as it was before
    for number in range(len(state.epochs) + 1, settings.epochs + 1):
        network.train()
        done = len(state.losses)
        made = delivered(hiding.batches(order.epoch(done)), device)
        for batch, labels, twins, drawn in progress.track(made, total=order.steps, completed=done, description=f"epoch {number}"):
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.amp and device.type == "cuda"):
                loss = loss_of(batch, labels, twins, state.alone)
            updates.step(loss, batch)
            state.steps += 1
            network.after_step(state.steps)
            state.losses.append(loss.item() if loss.is_cpu else loss.detach())  # another device would have to be waited for
            if checkpoint and (shards or not process.rank) and together.decides(checkpoint.due()):
                _write(checkpoint, state, updates, drawn, together)
        unseen.fill()
        process.share_buffers(network)
        valid_logits = process.together(lambda part: predict(network, valid, part), len(valid))
        whole = bool(np.isfinite(valid_logits).all())
        at_place = network.position_bias.at(valid_logits, valid.places) if network.position_bias else valid_logits
        metrics = measure(valid.labels, Calibration().on_log(at_place), valid.users) if whole else unmeasured(valid.labels)
        rate, losses, state.losses = updates.optimisers[0].param_groups[0]["lr"], list(map(float, state.losses)), []
        score = score_of(metrics, few and len(valid) >= LOSS_ROWS) if state.steps >= network.settles_after else -np.inf
        state.epochs.append(Epoch(number, rate, float(np.mean(losses)), metrics, losses[0], score))
        progress.console.print(state.epochs[-1].line(), soft_wrap=True)
        each(state.epochs[-1])
        if not whole:
            break
        if score > state.best_score:
            state.best, state.best_score, state.stale = _weights(network), score, 0
        elif state.steps >= state.patient:
            state.stale += 1
            times(updates.optimisers, 1 if state.alone else settings.drop)
        if alone and state.alone and (state.stale >= settings.patience or number >= settings.epochs // SHARE):
            progress.console.print("the first order has learned; now all of the network")
            network.load_state_dict(state.best)
            alone.release()
            state.alone, state.stale, state.patient = False, 0, state.steps + settings.least_steps
        elif state.stale >= settings.patience:
            break
    network.load_state_dict(state.best)
    hiding.random.bit_generator.state = together.told(hiding.random.bit_generator.state)[0]  # all move the unknown as one would
    _end(network, unseen, hiding if state.best_score > -np.inf and (shards or not process.rank) else None)
    return state.epochs


def _write(checkpoint: Checkpoint, state: LoopState, updates: Updates, hidden: dict[str, Any], together: Process) -> None:
    """Write all that the loop changes, `hidden` being where `Hiding` was after the last step's batch; the order of rows follows from the
    seed and the number of epochs. What other ranks write counts once rank 0, the last, has written; until then that of before does.
    """
    random = [
        [each.get_state() for each in generators(home(updates.network))],
        *(each.random.get_state() for each in updates.modules if isinstance(each, Cooccurrence)),
    ]
    optimisers = [each.state_dict() for each in updates.optimisers]
    values = {"loop": state.values, "hiding": hidden}
    tensors = [changing(updates.modules), optimisers, state.best, random]
    other = checkpoint.of_rank(together.rank, state.steps)
    if together.rank:
        other.write(values, tensors)
    together.told(None)
    if not together.rank:
        checkpoint.write(values, tensors)
    together.told(None)
    if together.rank:
        other.only()


def _go_on(checkpoint: Checkpoint, updates: Updates, hiding: Hiding, alone: FirstOrder | None, together: Process) -> LoopState:
    """Put all back as it was when the checkpoint was written; `alone` is let go of if the first order had learned by then."""
    first = None if together.rank else checkpoint.read()
    steps = together.told(first[0]["loop"]["steps"] if first else 0)[0]
    values, (modules, optimisers, best, random) = first or checkpoint.of_rank(together.rank, steps).read()
    try:
        state = LoopState.of(values["loop"], best)
        if alone and not state.alone:
            alone.release()  # before the optimisers are put back, whose rates are those of after it
        updates.network.after_step(state.steps)  # what it keeps elsewhere than in tensors follows from that
        put_back(updates.modules, modules)
        for optimiser, saved in zip(updates.optimisers, optimisers, strict=True):
            optimiser.load_state_dict(saved)
        hiding.random.bit_generator.state = values["hiding"]
        for generator, drawn in zip(generators(home(updates.network)), random[0], strict=True):
            generator.set_state(drawn)
        for more, drawn in zip(updates.modules[1:], random[1:], strict=True):
            assert isinstance(more, Cooccurrence)  # noqa: S101  # the only second task
            more.random.set_state(drawn)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{checkpoint.path} was written by another version of adrank; train without --resume") from error
    return state


def _draw_apart(rank: int, updates: Updates, hiding: Hiding, seed: tuple[int, ...]) -> None:
    """Let a process that is not the first draw what no other does."""
    if not rank:
        return
    hiding.random = np.random.default_rng(seed)
    for generator in [torch.default_generator, *(each.random for each in updates.modules if isinstance(each, Cooccurrence))]:
        generator.manual_seed(int(hiding.random.integers(2**63)))


def score_of(metrics: Measures, by_loss: bool = False) -> float:
    """What chooses the epoch: AUC, because Platt scaling repairs the rest; a split with one class only has none.

    Of few rows, from scratch, log loss: learning the users of train by heart adds to the AUC of a valid in which they come back, long
    after it has begun to cost that of others.
    """
    return metrics.auc if np.isfinite(metrics.auc) and not by_loss else -metrics.log_loss


def check_steps(network: Network, rows: int, settings: TrainSettings, processes: int = 1) -> None:
    """That a training has the rows and the steps that it needs.

    Raises:
        TrainError: it has not.
    """
    if rows < 2:
        raise TrainError(f"a batch needs at least 2 rows to normalise over, the train split has {rows}")
    if min(settings.batch, rows) < 2 * processes:
        raise TrainError(f"{processes} workers need a batch of at least {2 * processes} rows, 2 each; it has {min(settings.batch, rows)}")
    steps = settings.epochs * max(1, len(range(settings.batch, rows - 1, settings.batch)) + 1)
    if steps < network.settles_after:
        raise TrainError(
            f"this network is being pruned until step {network.settles_after:,}, and {settings.epochs:,} epochs of {rows:,} rows are "
            f"{steps:,} steps; let it have more epochs, or set prune_from and prune_steps lower"
        )


def _second_task(network: Network, rows: Rows, settings: TrainSettings, device: torch.device) -> Cooccurrence | None:
    try:
        return Cooccurrence(network, rows, settings.cooccurrence, settings.seed).to(device) if settings.cooccurrence else None
    except ValueError as error:
        raise TrainError(str(error)) from error


def batch_loss(network: Network, batch: RequestTensors, labels: Labels, twins: int) -> Tensor:
    """That of a batch whose last rows are so many twins with an unknown ad, and as many with any ad: see `Hiding.batch`."""
    outputs, count = network(batch), len(batch.user.ids) - 2 * twins
    shown = {name: values[:count] for name, values in outputs.items()}
    if network.position_bias is not None and labels.place is not None:
        shown[CLICK] = network.position_bias(shown[CLICK].squeeze(1), labels.place).unsqueeze(1)
    loss: Tensor = network.loss(shown, batch.first(count), labels)
    if not twins:
        return loss
    unknown, known = outputs[CLICK][count:].squeeze(1).chunk(2)
    gap: Tensor = (unknown - known.detach()).abs().sum() / count  # least absolute deviations: the median
    return loss + gap


class StepLoss(nn.Module):
    """What a step lessens: `batch_loss`, and that of a second task unless the first order learns alone."""

    def __init__(self, network: Network, more: Cooccurrence | None) -> None:
        super().__init__()
        self.network, self.more = network, more

    def forward(self, batch: RequestTensors, labels: Labels, twins: int, alone: bool) -> Tensor:
        """The loss of a batch with its twins."""
        return batch_loss(self.network, batch, labels, twins) + (self.more.loss() if self.more and not alone else 0.0)


def _first_order(network: Network, rows: int, optimisers: Sequence[torch.optim.Optimizer], settings: TrainSettings) -> FirstOrder | None:
    """The first order, about to learn alone; None: there is none, or its part of the epochs ends before valid could tell it to."""
    network.flatten()
    epochs = settings.epochs // SHARE
    enough = epochs and epochs * max(1, rows // settings.batch) >= settings.least_steps // SHARE
    return FirstOrder(network, optimisers) if network.first_weights() and enough else None


def _end(network: Network, unseen: Unseen, hiding: Hiding | None) -> None:
    """Place the unknown; None: the training diverged at once, and there is nothing to place it in."""
    if hiding is not None:
        hiding.settle(network)
    unseen.fill()
    network.eval()


def predict(network: Network, rows: Rows, numbers: Numbers | None = None) -> Logits:
    """Logits `(N,)` of a click for a split, or for those of its rows that have these numbers, in evaluation mode."""
    return predict_heads(network, rows, numbers)[CLICK]


def predict_heads(network: Network, rows: Rows, numbers: Numbers | None = None) -> dict[str, Logits]:
    """Logits `(N,)` by head for a split, or for some of its rows, in evaluation mode."""
    wanted = np.arange(len(rows)) if numbers is None else numbers
    network.eval()
    with torch.no_grad():
        chunks = np.array_split(wanted, range(EVALUATION_ROWS, len(wanted), EVALUATION_ROWS))
        found = [network(moved(rows.batch(chunk), home(network))) for chunk in chunks]
        return {head: np.concatenate([outputs[head].squeeze(1).cpu().numpy() for outputs in found]) for head in network.heads}


def _weights(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


@contextmanager
def deterministic(settings: TrainSettings) -> Iterator[None]:
    """As long as it lasts a seed gives the same network to the last bit, on the device and the threads that the settings ask for; on CUDA
    as far as torch has algorithms that do.

    Raises:
        TrainError: there is no such device here.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    torch.manual_seed(settings.seed)
    # An error where there is no such algorithm, as CUDA has none for some, would end a training; a warning does not.
    torch.use_deterministic_algorithms(True, warn_only=device_of(settings.device).type != "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a tenth of the time, for memory that is written anyway
    if settings.threads:
        torch.set_num_threads(settings.threads)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.set_num_threads(before[1])
