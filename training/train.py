"""The training loop, in plain sight: a prepared data set and a network in, the best epoch's network out.

Knows nothing about ONNX or bundles (`export.py`).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional as F

from features.encode import Encoder
from features.vocabulary import Vocabularies

from .calibrate import Calibration, fit
from .datasets.encoded import Batch, Rows, encode_split, learn_vocabularies
from .datasets.prepared import SPLITS, Prepared
from .evaluate import Metrics, measure
from .networks import NETWORKS
from .networks.blocks import Embeddings, Fields, Part
from .networks.grown import take_over

EVALUATION_ROWS = 4096


class TrainError(ValueError):
    """A training cannot be as asked for; the message says why."""


@dataclass(frozen=True)
class TrainSettings:
    """How to train; the widths of a network are the network's own settings."""

    seed: int = 1
    epochs: int = 30
    batch: int = 2048
    learning_rate: float = 1e-3
    drop: float = 0.1
    """Factor on the learning rate after an epoch without gain on valid."""
    patience: int = 2
    """Epochs without gain in a row that end the training."""
    embedding_l2: float = 0.01
    regularise: str = "table"
    """`table`: each step decays every embedding by (λ/2)‖table‖². `batch`: only those in the mini-batch, each by its share
    λ / n of its n occurrences in the training split (DIN paper, eq. 6)."""
    clip: float = 10.0
    """Largest norm of a step's gradient."""
    threads: int = 0
    """Threads of torch; 0 is as many as the machine allows. Another number may give other last bits."""
    int8: bool = False
    """Publish an int8 graph too, which processors with VNNI or AMX score 2 to 3 times faster, if its scores are as good."""

    def __post_init__(self) -> None:
        rules = (
            ("seed", 0 <= self.seed < 2**63, "at least 0, and below 2**63"),
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch", self.batch >= 2, "at least 2 rows, to normalise over"),
            ("learning_rate", self.learning_rate > 0, "above 0"),
            ("drop", 0 < self.drop <= 1, "above 0, at most 1"),
            ("patience", self.patience >= 1, "at least 1"),
            ("embedding_l2", self.embedding_l2 >= 0, "at least 0"),
            ("regularise", self.regularise in ("table", "batch"), "table or batch"),
            ("clip", self.clip > 0, "above 0"),
            ("threads", self.threads >= 0, "at least 0"),
        )
        wrong = [f"{name} is {getattr(self, name)!r}; it must be {rule}" for name, fits, rule in rules if not fits]
        if wrong:
            raise TrainError(", and ".join(wrong))


@dataclass(frozen=True)
class Epoch:
    """What an epoch came to."""

    number: int
    learning_rate: float
    train_loss: float
    valid: Metrics

    def line(self) -> str:
        """The epoch in a line, for people who wait."""
        valid = f"valid AUC {self.valid.auc:.5f}, log loss {self.valid.log_loss:.5f}"
        return f"epoch {self.number:2}: learning rate {self.learning_rate:.0e}, train loss {self.train_loss:.5f}, {valid}"


@dataclass(frozen=True)
class Trained:
    """The network of the best epoch, in evaluation mode, and what belongs to it."""

    family: str
    network: nn.Module
    encoder: Encoder
    calibration: Calibration
    epochs: list[Epoch]
    metrics: dict[str, Metrics]
    """By split, of calibrated probabilities."""
    settings: dict[str, Any]


@dataclass(frozen=True)
class Start:
    """A network to go on from, and the vocabularies that its embeddings are laid out by."""

    network: nn.Module
    vocabularies: Vocabularies


def train(
    data: Prepared, family: str, network_settings: Any, settings: TrainSettings, progress: Progress, start: Start | None = None
) -> Trained:
    """Learn vocabularies, encode, train, calibrate on valid, and measure valid and test once. `start` is where the weights begin.

    Raises:
        DataError: a split is absent or empty, or a column does not fit the schema.
        TrainError: the network cannot be built for this schema, or is not that of `start`.
    """
    for split in SPLITS:
        data.files(split)  # an absent test split would be found after hours
    with _deterministic(settings):
        with _step(progress, "learning vocabularies"):
            encoder = Encoder(data.schema, learn_vocabularies(data, start.vocabularies if start else None))
        with _step(progress, "encoding"):
            rows, valid = encode_split(data, "train", encoder), encode_split(data, "valid", encoder)
        try:
            network = NETWORKS[family](Fields.of(data.schema, encoder.vocabularies), network_settings)
            if start:
                take_over(start.network, network)
        except ValueError as error:
            raise TrainError(str(error)) from error
        epochs = fit_network(network, rows, valid, settings, progress)
        del rows
        logits = predict(network, valid)
        calibration = fit(logits, valid.labels, data.schema.negative_sampling)
        metrics = {"valid": measure(valid.labels, calibration.on_log(logits), valid.users)}
        with _step(progress, "measuring on test"):
            test = encode_split(data, "test", encoder)
            metrics["test"] = measure(test.labels, calibration.on_log(predict(network, test)), test.users)
        facts = {**vars(network_settings), **vars(settings), "threads": torch.get_num_threads()}
    return Trained(family, network, encoder, calibration, epochs, metrics, facts)


def fit_network(network: nn.Module, rows: Rows, valid: Rows, settings: TrainSettings, progress: Progress) -> list[Epoch]:
    """Train in place until valid stops gaining; the network ends with the weights of its best epoch, in evaluation mode.

    Raises:
        TrainError: a batch would have less than two rows, or the weights are no numbers any more.
    """
    if len(rows) < 2:
        raise TrainError(f"a batch needs at least 2 rows to normalise over, the train split has {len(rows)}")
    optimiser = torch.optim.Adam(network.parameters(), lr=settings.learning_rate, fused=True)
    order = np.random.default_rng(settings.seed)
    decay = EmbeddingDecay(network, rows, settings)
    epochs: list[Epoch] = []
    best, best_score, stale = _weights(network), -np.inf, 0
    for number in range(1, settings.epochs + 1):
        network.train()
        losses = []
        shuffled = order.permutation(len(rows))
        # A last row alone joins the batch before it: batch normalisation needs two.
        batches = np.array_split(shuffled, range(settings.batch, len(rows) - 1, settings.batch))
        for chosen in progress.track(batches, description=f"epoch {number}"):
            batch = rows.batch(chosen)
            logits = network(*batch).squeeze(1)
            loss = F.binary_cross_entropy_with_logits(logits, torch.from_numpy(rows.labels[chosen]))
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            decay.add_gradient(batch)
            nn.utils.clip_grad_norm_(network.parameters(), settings.clip)
            optimiser.step()
            losses.append(loss.item())
        p_click = Calibration().on_log(predict(network, valid))
        if not np.isfinite(p_click).all():
            raise TrainError(f"the training diverged in epoch {number}; try a learning_rate below {optimiser.param_groups[0]['lr']:g}")
        metrics = measure(valid.labels, p_click, valid.users)
        epochs.append(Epoch(number, optimiser.param_groups[0]["lr"], float(np.mean(losses)), metrics))
        progress.console.print(epochs[-1].line(), soft_wrap=True)
        # AUC chooses, because Platt scaling repairs the rest; a split with one class only has none.
        score = metrics.auc if np.isfinite(metrics.auc) else -metrics.log_loss
        if score > best_score:
            best, best_score, stale = _weights(network), score, 0
            continue
        stale += 1
        if stale >= settings.patience:
            break
        for group in optimiser.param_groups:
            group["lr"] *= settings.drop
    network.load_state_dict(best)
    network.eval()
    return epochs


def predict(network: nn.Module, rows: Rows) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Logits `(N,)` of a split, in evaluation mode."""
    network.eval()
    with torch.no_grad():
        chunks = np.array_split(np.arange(len(rows)), range(EVALUATION_ROWS, len(rows), EVALUATION_ROWS))
        return np.concatenate([network(*rows.batch(chunk)).squeeze(1).numpy() for chunk in chunks])


class EmbeddingDecay:
    """L2 of the embeddings, added to the gradient of a step rather than to the loss: the same sum, without the graph."""

    def __init__(self, network: nn.Module, rows: Rows, settings: TrainSettings) -> None:
        self.l2 = settings.embedding_l2
        self.embeddings = [module for module in network.modules() if isinstance(module, Embeddings)]
        self.counts = [self._occurrences(e, rows) for e in self.embeddings] if settings.regularise == "batch" else []

    @torch.no_grad()
    def add_gradient(self, batch: Batch) -> None:
        """Add the decay of one step, `batch` being its rows."""
        if not self.counts:
            for embeddings in self.embeddings:
                _gradient(embeddings).add_(embeddings.table.weight, alpha=self.l2)
        for embeddings, counts in zip(self.embeddings, self.counts, strict=False):
            rows = torch.unique(torch.cat([embeddings.table_rows(name, part.ids).flatten() for name, part in _parts(batch, embeddings)]))
            _gradient(embeddings)[rows] += embeddings.table.weight[rows] * (self.l2 / counts[rows])[:, None]

    @staticmethod
    def _occurrences(embeddings: Embeddings, rows: Rows) -> Tensor:
        total = torch.zeros(embeddings.table.num_embeddings)
        for start in range(0, len(rows), EVALUATION_ROWS):
            for name, part in _parts(rows.batch(np.arange(start, min(start + EVALUATION_ROWS, len(rows)))), embeddings):
                times = torch.ones(len(part.ids)) if part.rows is None else torch.bincount(part.rows.flatten()).float()
                ids = embeddings.table_rows(name, part.ids).flatten(1)
                total += torch.bincount(ids.flatten(), times.repeat_interleave(ids.shape[1]), minlength=len(total))
        return total.clamp(min=1)


def _gradient(embeddings: Embeddings) -> Tensor:
    gradient = embeddings.table.weight.grad
    assert gradient is not None  # noqa: S101  # every network uses every table
    return gradient


def _parts(batch: Batch, embeddings: Embeddings) -> Iterator[tuple[str, Part]]:
    return ((name, part) for name, part in zip(("user", "history", "ad"), batch, strict=True) if name in embeddings)


def _weights(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


@contextmanager
def _deterministic(settings: TrainSettings) -> Iterator[None]:
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
