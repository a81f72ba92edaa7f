"""The training loop, in plain sight: a prepared data set and a network in, the best epoch's network out.

Knows nothing about ONNX or bundles (`export.py`).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor, nn

from features.encode import Encoder
from features.errors import AdrankError
from features.vocabulary import Vocabularies

from .calibrate import Calibration, fit
from .checkpoint import Checkpoint, CheckpointError, changing, identity, put_back
from .cooccurrence import Cooccurrence
from .datasets.encoded import Rows, encode_split, learn_vocabularies
from .datasets.prepared import SPLITS, Prepared, wrong_head
from .evaluate import Measures, measure, unmeasured
from .first_order import SHARE, FirstOrder, settled, times
from .networks import NETWORKS, build
from .networks.contract import CLICK, Fields, Labels, Network, RequestTensors
from .networks.pretrained import copy_embeddings
from .networks.warm_start import warm_start
from .tenure import Tenure, renewed
from .unknown import Hiding, Unseen
from .updates import Updates

Logits = np.ndarray[Any, np.dtype[np.float32]]
EVALUATION_ROWS = 4096
BY_DATA = ("epochs", "batch", "learning_rate", "first_l2")
ROWS_A_BATCH = 50
"""Rows of train for one row of a batch."""
BATCHES, LARGE = (32, 2048), 512
"""The smallest and the largest batch that is chosen, and from where on one counts as large."""
RATES = (1e-3, 3e-3)
"""Learning rate of large batches and of small ones."""
EPOCHS = 30


class TrainError(AdrankError, ValueError):
    """A training cannot be as asked for; the message says why."""


@dataclass(frozen=True)
class TrainSettings:
    """How to train; the widths of a network are the network's own settings."""

    seed: int = 1
    """Of the weights, the order of rows and what is hidden: one seed makes a run repeatable to the last bit on one machine."""
    epochs: int = 0
    """Most passes over the train split; 0: by its rows, see `for_rows`."""
    batch: int = 0
    """Rows of a step; 0: by the rows of the train split."""
    learning_rate: float = 0.0
    """Of Adam; 0: by the batch."""
    drop: float = 0.1
    """Factor on the learning rate after an epoch without gain on valid."""
    patience: int = 2
    """Epochs without gain in a row that end the training."""
    least_steps: int = 1000
    """Steps before `patience` counts and the learning rate falls: a small log's epoch is a few."""
    flat_below: int = 100_000
    """On fewer rows than this a network that has a first order, and is trained from scratch, learns that alone until valid stops gaining,
    as a regression would, and then all of itself; 0: all learns at once."""
    first_l2: float = 0.0
    """λ of the decay of the first order where `regularise` is `table`; 0: below `flat_below` one over the rows of train, from there on
    that of all embeddings."""
    unknown_rate: float = 0.01
    """How likely a row's ad, its user, a behaviour or a single value is hidden from a step, so that the unknown id is trained.
    0: none is, and what is unknown ranks at random."""
    embedding_l2: float = -1.0
    """λ of the decay of embeddings; -1: the network's own, 0.01 or, of networks without an MLP, 0.00001."""
    regularise: str = "table"
    """`table`: each step decays every embedding by (λ/2)‖table‖². `batch`: only those in the mini-batch, each by its share
    λ / n of its n occurrences in the training split (DIN paper, eq. 6)."""
    sparse_above: int = 200_000
    """Tables of more rows than this are updated sparsely: a step changes the rows that its batch has, by `LazyAdam` where all others have
    Adam, and `table` decays those alone. 0: none is, and a step costs as much as the table is large."""
    clip: float = 10.0
    """Largest norm of a step's gradient."""
    threads: int = 0
    """Threads of torch; 0 is as many as the machine allows. Another number may give other last bits."""
    cooccurrence: float = 0.0
    """Weight of a second task for the vectors of ads, how often two are clicked by one user (`cooccurrence.py`); 0: none."""
    heads: str = ""
    """What is predicted, such as `click-conversion`: the click first, then columns of the data set. Default: the network's own, for
    most the click alone."""
    init_from: str = ""
    """A bundle whose embeddings the network's begin with, those of values that both know; `adrank retrain` goes on from the live version
    instead, or begins without."""
    evict_after: int = 0
    """Retrainings in a row whose rows lack a value after which the next value that is new may take its row of the embeddings, so that
    tables stop growing; 0: every value stays. Counted from version to version, where a training goes on from the one before."""
    int8: bool = False
    """Publish an int8 graph too, which processors with VNNI or AMX score 2 to 3 times faster, if its scores are as good."""

    def __post_init__(self) -> None:
        rules = (
            ("seed", 0 <= self.seed < 2**63, "at least 0, and below 2**63"),
            ("epochs", self.epochs >= 0, "at least 1, or 0: by the rows"),
            ("batch", self.batch == 0 or self.batch >= 2, "at least 2 rows, to normalise over, or 0: by the rows"),
            ("learning_rate", self.learning_rate >= 0, "above 0, or 0: by the batch"),
            ("drop", 0 < self.drop <= 1, "above 0, at most 1"),
            ("patience", self.patience >= 1, "at least 1"),
            ("least_steps", self.least_steps >= 0, "at least 0"),
            ("flat_below", self.flat_below >= 0, "at least 0"),
            ("first_l2", self.first_l2 >= 0, "above 0, or 0: by the rows"),
            ("unknown_rate", 0 <= self.unknown_rate < 1, "at least 0, below 1"),
            ("embedding_l2", self.embedding_l2 >= 0 or self.embedding_l2 == -1, "at least 0, or -1: the network's own"),
            ("regularise", self.regularise in ("table", "batch"), "table or batch"),
            ("sparse_above", self.sparse_above >= 0, "at least 0"),
            ("clip", self.clip > 0, "above 0"),
            ("threads", self.threads >= 0, "at least 0"),
            ("evict_after", self.evict_after >= 0, "at least 0"),
            ("cooccurrence", 0 <= self.cooccurrence < float("inf"), "at least 0"),
        )
        wrong = [f"{name} is {getattr(self, name)!r}; it must be {rule}" for name, fits, rule in rules if not fits]
        if wrong:
            raise TrainError(", and ".join(wrong))

    def for_rows(self, rows: int) -> "TrainSettings":
        """What is left to the data, settled for so many rows of train.

        Measured by `benchmarks/defaults.py`: a batch of a fiftieth of the rows, 32 to 2,048, and a learning rate that grows as
        the batch shrinks, so that a few thousand rows get the steps that they need. Below `flat_below` the first order decays as little
        as in logistic regression with C = 1.
        """
        batch = self.batch or min(max(2 ** round(math.log2(max(rows, 1) / ROWS_A_BATCH)), BATCHES[0]), BATCHES[1])
        rate = self.learning_rate or (RATES[0] if batch >= LARGE else RATES[1])
        steps = max(1, rows // batch)
        few = rows < self.flat_below
        epochs = (SHARE if few else 1) * max(EPOCHS, math.ceil(2 * self.least_steps / steps))
        l2 = self.first_l2 or (1 / max(rows, 1) if few else 0.0)
        return replace(self, batch=batch, learning_rate=rate, epochs=self.epochs or epochs, first_l2=l2)

    def summary(self, rows: int) -> str:
        """The settled settings in a line, for people who wait."""
        return (
            f"batch {self.batch:,} (for {rows:,} rows), learning rate {self.learning_rate:g}, at most {self.epochs:,} epochs, "
            f"patience {self.patience} after {self.least_steps:,} steps, unknown rate {self.unknown_rate:g}, "
            f"first order first below {self.flat_below:,} rows" + (f", its decay {self.first_l2:.2g}" if self.first_l2 else "")
        )

    @property
    def open(self) -> list[str]:
        """The names of the settings that are left to the data."""
        return [name for name in BY_DATA if not getattr(self, name)]


@dataclass(frozen=True)
class Epoch:
    """What an epoch came to."""

    number: int
    learning_rate: float
    train_loss: float
    valid: Measures
    first_loss: float = 0.0
    """Of its first step."""

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
    losses: list[float] = field(default_factory=list)
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
        return {**vars(self), "best": None, "epochs": [asdict(each) for each in self.epochs]}


@dataclass(frozen=True)
class Trained:
    """The network of the best epoch, in evaluation mode, and what belongs to it."""

    family: str
    network: Network
    encoder: Encoder
    calibrations: dict[str, Calibration]
    """By head."""
    epochs: list[Epoch]
    metrics: dict[str, Measures]
    """By split, of calibrated probabilities."""
    settings: dict[str, Any]
    held_out: Rows
    """The test split, encoded: what int8, the gate and the report ask about it needs no second encoding."""
    rows: dict[str, int] = field(default_factory=dict)
    clicks: dict[str, int] = field(default_factory=dict)
    """By split."""
    head_metrics: dict[str, dict[str, Measures]] = field(default_factory=dict)
    """Of the heads other than the click, by head and split."""
    tenure: Tenure = field(default_factory=Tenure)
    """Which values are idle, for the training that goes on from this one."""

    @property
    def calibration(self) -> Calibration:
        """That of the click."""
        return self.calibrations[CLICK]


@dataclass(frozen=True)
class Start:
    """A network to go on from, and the vocabularies that its embeddings are laid out by."""

    network: Network
    vocabularies: Vocabularies
    negative_sampling: float = 1.0
    """The share of non-clicks in the rows that the network was trained on: its logits are right for those."""
    embeddings_only: bool = False
    """Take the embeddings of values that both know, for a network that may be another one; all else begins fresh."""
    idle: Mapping[str, dict[str, int]] = field(default_factory=dict)
    """See `Tenure.idle`."""


def train(
    data: Prepared,
    family: str,
    network_settings: Any,
    settings: TrainSettings,
    progress: Progress,
    start: Start | None = None,
    checkpoint: Checkpoint | None = None,
) -> Trained:
    """Learn vocabularies, encode, train, calibrate on valid, and measure valid and test once. `start` is where the weights begin.

    Raises:
        CheckpointError: see `Checkpoint`.
        DataError: a split is absent or empty, or a column does not fit the schema.
        TrainError: the network cannot be built for this schema, or is not that of `start`.
    """
    for split in SPLITS:
        data.files(split)  # an absent test split would be found after hours
    heads, whole = heads_of(family, settings.heads), start if start and not start.embeddings_only else None
    tenure = Tenure(settings.evict_after, dict(whole.idle) if whole else {})
    with deterministic(settings):
        with _step(progress, "learning vocabularies"):
            encoder = Encoder(data.schema, learn_vocabularies(data, whole.vocabularies if whole else None, tenure))
        with _step(progress, "encoding"):
            rows, valid = (encode_split(data, split, encoder, heads) for split in ("train", "valid"))
        left, settings = settings.open, settings.for_rows(len(rows))
        few = bool(whole.network.first_weights()) if whole else len(rows) < settings.flat_below
        network_settings = settled(network_settings, few)
        progress.console.print(settings.summary(len(rows)), soft_wrap=True)
        try:
            network = build(family, Fields.of(data.schema, encoder.vocabularies, heads), network_settings)
            if whole:
                shift = math.log(whole.negative_sampling / data.negative_sampling)
                warm_start(whole.network, network, shift, renewed(whole.vocabularies, encoder.vocabularies))
            else:
                _begin_embeddings(network, encoder.vocabularies, start, progress)
        except ValueError as error:
            raise TrainError(str(error)) from error
        if checkpoint:
            both = {**vars(network_settings), **vars(settings)}
            checkpoint.training = identity(family, both, data.schema.to_toml(), (rows, valid))
        epochs = fit_network(network, rows, valid, settings, progress, warm=whole is not None, checkpoint=checkpoint)
        counted = {"train": (len(rows), int(rows.labels.sum()))}
        del rows
        logits = predict_heads(network, valid)
        calibrations = {head: calibrated(valid, head, logits[head], data.negative_sampling) for head in heads}
        measured = {"valid": measured_heads(valid, logits, calibrations)}
        with _step(progress, "measuring on test"):
            test = encode_split(data, "test", encoder, heads)
            measured["test"] = measured_heads(test, predict_heads(network, test), calibrations)
        metrics = {split: found[CLICK] for split, found in measured.items()}
        facts = {**vars(network_settings), **vars(settings), "threads": torch.get_num_threads(), "by_data": left}
    counted |= {split: (m.rows, m.clicks) for split, m in metrics.items()}
    by_split = ({split: counts[i] for split, counts in counted.items()} for i in range(2))
    others = {head: {split: found[head] for split, found in measured.items()} for head in heads if head != CLICK}
    rows_by_split, clicks_by_split = by_split
    return Trained(family, network, encoder, calibrations, epochs, metrics, facts, test, rows_by_split, clicks_by_split, others, tenure)


def _begin_embeddings(network: Network, vocabularies: Vocabularies, start: Start | None, progress: Progress) -> None:
    """Copy the embeddings of a network to begin with, and say so; and say it where there is none, and should be."""
    if start is not None:
        for copied in copy_embeddings(start.network, start.vocabularies, network, vocabularies):
            progress.console.print(copied.line(), soft_wrap=True)
    elif network.starts_from:
        wanted = f"--init-from a bundle of {network.starts_from} lets its embeddings begin there"
        progress.console.print(f"this network starts fresh: {wanted}", soft_wrap=True)


def fit_network(  # noqa: C901, PLR0913, PLR0915, PLR0917  # the loop in plain sight
    network: Network,
    rows: Rows,
    valid: Rows,
    settings: TrainSettings,
    progress: Progress,
    warm: bool = False,
    each: Callable[[Epoch], None] = lambda _: None,
    checkpoint: Checkpoint | None = None,
) -> list[Epoch]:
    """Train in place until valid stops gaining; the network ends with the weights of its best epoch, in evaluation mode.

    A training whose logits are no numbers any more ends there, with an epoch whose measures are none: `gate.diverged` tells.

    `warm`: it was trained before, and keeps what it knows of values that these rows do not have. `each` is called after each epoch.
    `checkpoint`: where to write how far it is, and perhaps to go on from.

    Raises:
        CheckpointError: see `Checkpoint`.
        TrainError: a batch would have less than two rows.
    """
    settings = settings.for_rows(len(rows))
    _check_steps(network, len(rows), settings)
    network.begin(rows.ads)
    more = _second_task(network, rows, settings)
    updates = Updates(network, rows, settings, more)
    for line in updates.summary():
        progress.console.print(line, soft_wrap=True)
    alone = _first_order(network, updates.optimisers, settings) if len(rows) < settings.flat_below and not warm else None
    order, hiding = np.random.default_rng(settings.seed), Hiding(rows, settings.unknown_rate, settings.seed)
    unseen = Unseen(network, rows, warm)
    patient = max(network.settles_after, settings.least_steps // (SHARE if alone else 1))
    state = LoopState(_weights(network), patient, alone is not None)
    if checkpoint and checkpoint.resume:
        state = _go_on(checkpoint, updates, hiding)
        at = f"epoch {len(state.epochs) + 1}, step {len(state.losses):,} of it"
        progress.console.print(f"going on from {at} (step {state.steps:,} of all), by {checkpoint.path}", soft_wrap=True)
    if alone and not state.alone:
        alone.release()
    for _ in state.epochs:
        order.permutation(len(rows))  # as they were drawn before
    for number in range(len(state.epochs) + 1, settings.epochs + 1):
        network.train()
        shuffled = order.permutation(len(rows))
        # A last row alone joins the batch before it: batch normalisation needs two.
        batches = np.array_split(shuffled, range(settings.batch, len(rows) - 1, settings.batch))
        done = len(state.losses)
        for chosen in progress.track(batches[done:], total=len(batches), completed=done, description=f"epoch {number}"):
            batch, twins = hiding.batch(chosen)
            loss = batch_loss(network, batch, rows.labels_of(chosen), len(twins)) + (more.loss() if more and not state.alone else 0.0)
            updates.step(loss, batch)
            state.steps += 1
            network.after_step(state.steps)
            state.losses.append(loss.item())
            if checkpoint and checkpoint.due():
                _write(checkpoint, state, updates, hiding)
        unseen.fill()
        valid_logits = predict(network, valid)
        whole = bool(np.isfinite(valid_logits).all())
        metrics = measure(valid.labels, Calibration().on_log(valid_logits), valid.users) if whole else unmeasured(valid.labels)
        rate, losses, state.losses = updates.optimisers[0].param_groups[0]["lr"], state.losses, []
        state.epochs.append(Epoch(number, rate, float(np.mean(losses)), metrics, losses[0]))
        progress.console.print(state.epochs[-1].line(), soft_wrap=True)
        each(state.epochs[-1])
        if not whole:
            break
        score = score_of(metrics) if state.steps >= network.settles_after else -np.inf
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
    _end(network, unseen, hiding if state.best_score > -np.inf else None)
    return state.epochs


def _write(checkpoint: Checkpoint, state: LoopState, updates: Updates, hiding: Hiding) -> None:
    """Write all that the loop changes; the order of rows follows from the seed and the number of epochs."""
    random = [torch.get_rng_state(), *(each.random.get_state() for each in updates.modules if isinstance(each, Cooccurrence))]
    optimisers = [each.state_dict() for each in updates.optimisers]
    values = {"loop": state.values, "hiding": hiding.random.bit_generator.state}
    checkpoint.write(values, [changing(updates.modules), optimisers, state.best, random])


def _go_on(checkpoint: Checkpoint, updates: Updates, hiding: Hiding) -> LoopState:
    """Put all back as it was when the checkpoint was written."""
    values, (modules, optimisers, best, random) = checkpoint.read()
    try:
        state = LoopState.of(values["loop"], best)
        updates.network.after_step(state.steps)  # what it keeps elsewhere than in tensors follows from that
        put_back(updates.modules, modules)
        for optimiser, saved in zip(updates.optimisers, optimisers, strict=True):
            optimiser.load_state_dict(saved)
        hiding.random.bit_generator.state = values["hiding"]
        torch.set_rng_state(random[0])
        for more, drawn in zip(updates.modules[1:], random[1:], strict=True):
            assert isinstance(more, Cooccurrence)  # noqa: S101  # the only second task
            more.random.set_state(drawn)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{checkpoint.path} was written by another version of adrank; train without --resume") from error
    return state


def score_of(metrics: Measures) -> float:
    """What chooses the epoch: AUC, because Platt scaling repairs the rest; a split with one class only has none."""
    return metrics.auc if np.isfinite(metrics.auc) else -metrics.log_loss


def _check_steps(network: Network, rows: int, settings: TrainSettings) -> None:
    if rows < 2:
        raise TrainError(f"a batch needs at least 2 rows to normalise over, the train split has {rows}")
    steps = settings.epochs * max(1, len(range(settings.batch, rows - 1, settings.batch)) + 1)
    if steps < network.settles_after:
        raise TrainError(
            f"this network is being pruned until step {network.settles_after:,}, and {settings.epochs:,} epochs of {rows:,} rows are "
            f"{steps:,} steps; let it have more epochs, or set prune_from and prune_steps lower"
        )


def _second_task(network: Network, rows: Rows, settings: TrainSettings) -> Cooccurrence | None:
    try:
        return Cooccurrence(network, rows, settings.cooccurrence, settings.seed) if settings.cooccurrence else None
    except ValueError as error:
        raise TrainError(str(error)) from error


def batch_loss(network: Network, batch: RequestTensors, labels: Labels, twins: int) -> Tensor:
    """That of a batch whose last rows are so many twins with an unknown ad, and as many with any ad: see `Hiding.batch`."""
    outputs, count = network(batch), len(batch.user.ids) - 2 * twins
    loss: Tensor = network.loss({name: values[:count] for name, values in outputs.items()}, batch.first(count), labels)
    if not twins:
        return loss
    unknown, known = outputs[CLICK][count:].squeeze(1).chunk(2)
    gap: Tensor = (unknown - known.detach()).abs().sum() / count  # least absolute deviations: the median
    return loss + gap


def _first_order(network: Network, optimisers: Sequence[torch.optim.Optimizer], settings: TrainSettings) -> FirstOrder | None:
    """The first order, about to learn alone; None: there is none, or no epoch to do so in."""
    network.flatten()
    return FirstOrder(network, optimisers) if network.first_weights() and settings.epochs >= SHARE else None


def _end(network: Network, unseen: Unseen, hiding: Hiding | None) -> None:
    """Place the unknown; None: the training diverged at once, and there is nothing to place it in."""
    if hiding is not None:
        hiding.settle(network)
    unseen.fill()
    network.eval()


def heads_of(family: str, asked: str = "") -> tuple[str, ...]:
    """The heads that a network is trained with: those asked for, such as "click-conversion", or else its own.

    Raises:
        TrainError: what is asked for is not the click and names of columns.
    """
    heads = tuple(asked.split("-")) if asked else NETWORKS[family].own_heads
    wrong = [mistake for head in heads[1:] if (mistake := wrong_head(head))]
    if heads[:1] != (CLICK,) or len(set(heads)) < len(heads) or wrong:
        mistakes = "; ".join(wrong) or "the click comes first, and each head once"
        raise TrainError(f"heads is {asked!r}; expected a value such as click-conversion: {mistakes}")
    return heads


def calibrated(rows: Rows, head: str, logits: Logits, negative_sampling: float) -> Calibration:
    """The calibration of a head's logits `(N,)`, on the rows whose label is known."""
    labels, known = rows.known(head)
    return fit(logits[known], labels[known], negative_sampling if head == CLICK else 1.0)


def measured_heads(rows: Rows, logits: Mapping[str, Logits], calibrations: Mapping[str, Calibration]) -> dict[str, Measures]:
    """By head, what its calibrated probabilities come to on the rows whose label is known."""
    found = {}
    for head, calibration in calibrations.items():
        labels, known = rows.known(head)
        found[head] = measure(labels[known], calibration.on_log(logits[head][known]), rows.users[known])
    return found


def predict(network: Network, rows: Rows) -> Logits:
    """Logits `(N,)` of a click for a split, in evaluation mode."""
    return predict_heads(network, rows)[CLICK]


def predict_heads(network: Network, rows: Rows) -> dict[str, Logits]:
    """Logits `(N,)` by head for a split, in evaluation mode."""
    network.eval()
    with torch.no_grad():
        chunks = np.array_split(np.arange(len(rows)), range(EVALUATION_ROWS, len(rows), EVALUATION_ROWS))
        found = [network(rows.batch(chunk)) for chunk in chunks]
        return {head: np.concatenate([outputs[head].squeeze(1).numpy() for outputs in found]) for head in network.heads}


def _weights(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


@contextmanager
def deterministic(settings: TrainSettings) -> Iterator[None]:
    """As long as it lasts a seed gives the same network to the last bit, on the threads that the settings ask for."""
    before = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    torch.manual_seed(settings.seed)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a tenth of the time, for memory that is written anyway
    if settings.threads:
        torch.set_num_threads(settings.threads)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.set_num_threads(before[1])


@contextmanager
def _step(progress: Progress, description: str) -> Iterator[None]:
    task = progress.add_task(description, total=None)
    yield
    progress.update(task, total=1, completed=1)


def override(settings: Any, given: dict[str, str]) -> Any:
    """A settings object with some values replaced, read from texts as their types say; what it does not have stays in `given`.

    Raises:
        TrainError: a text is not of the setting's type.
    """
    changes: dict[str, Any] = {}
    for name in [name for name in given if hasattr(settings, name)]:
        text, now = given.pop(name), getattr(settings, name)
        changes[name] = _read(name, text, now)
    return replace(settings, **changes)


def overridden(given: Mapping[str, str], *settings: Any) -> list[Any]:
    """Each settings object with the values that are given for it, as `override` reads them.

    Raises:
        TrainError: a name is none of theirs, or a text is not of the setting's type.
    """
    rest = dict(given)
    changed = [override(each, rest) for each in settings]
    if rest:
        raise TrainError(
            f"--set {next(iter(rest))}: no such setting; there are {', '.join(name for each in settings for name in vars(each))}"
        )
    return changed


def _read(name: str, text: str, now: object) -> object:
    try:
        if isinstance(now, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(now, tuple):
            return tuple(int(part) for part in text.split("-"))
        return type(now)(text)  # type: ignore[call-arg]
    except (KeyError, ValueError) as error:
        example = "-".join(map(str, now)) if isinstance(now, tuple) else now
        raise TrainError(f"--set {name}={text}: expected a value such as {example}") from error
