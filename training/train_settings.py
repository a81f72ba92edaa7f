"""The settings of a training, and how `--set` gives them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from features.errors import AdrankError

from .first_order import SHARE

BY_DATA = ("epochs", "batch", "learning_rate", "first_l2")
ROWS_A_BATCH = 50
"""Rows of train for one row of a batch."""
BATCHES, LARGE = (32, 2048), 512
"""The smallest batch that is chosen and the largest a worker, and from where on one counts as large."""
RATES = (1e-3, 3e-3)
"""Learning rate of large batches and of small ones."""
EPOCHS = 30
KINDS = ("tower", "pal", "ips", "em")
"""Of position bias."""
DEVICES = ("auto", "cpu", "cuda")


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
    as a regression would, and then all of itself; and log loss on a valid of 500 rows, not AUC, tells the best epoch. 0: all learns
    at once, as where half of `epochs` are fewer steps than half of `least_steps`."""
    first_l2: float = 0.0
    """λ of the decay of the first order where `regularise` is `table`; 0: below `flat_below` one over the rows of train, from there on
    that of all embeddings."""
    shuffle_rows: int = 1_000_000
    """Rows that are mixed at once where those of train are read from disk: they are drawn as blocks of 1,024 or of a batch. Rows in memory
    are all mixed at once."""
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
    device: str = "auto"
    """`cpu`, `cuda`, or `auto`: CUDA where there is one. A seed gives other last bits on another device."""
    amp: bool = False
    """On CUDA, multiply matrices in bfloat16 (`torch.autocast`): faster, and rounded to 8 bits; weights, losses and all that is measured
    stay float32. On the CPU it changes nothing."""
    threads: int = 0
    """Threads of torch; 0 is as many as the machine allows. Another number may give other last bits."""
    workers: int = 1
    """Processes of `adrank train` that share every `batch`, by Ray (docs/scale.md)."""
    shard_rows: int = 0
    """Tables of more rows than this are split by rows over the workers: each has its part, updates it sparsely, and sends others the rows
    of their batches. 0: each worker has all of every table."""
    cooccurrence: float = 0.0
    """Weight of a second task for the vectors of ads, how often two are clicked by one user (`cooccurrence.py`); 0: none."""
    position_bias: str = ""
    """How clicks are told apart from the places where ads were shown (docs/models.md): `tower`, `pal`, `ips`, `em`. Default: not at all."""
    heads: str = ""
    """What is predicted, such as `click-conversion`: the click first, then columns of the data set. Default: the network's own, for
    most the click alone."""
    delayed: bool = True
    """Whether a conversion that may still come is no negative: its row counts by how likely it would have come by now, by the exponential
    delay that attribution fits to a log's conversions (`join/delay.py`). False: what has not come is a negative."""
    init_from: str = ""
    """A bundle whose embeddings the network's begin with, those of values that both know; `adrank retrain` goes on from the live version
    instead, or begins without."""
    evict_after: int = 0
    """Retrainings in a row whose rows lack a value after which the next value that is new may take its row of the embeddings, so that
    tables stop growing; 0: every value stays. Counted from version to version, where a training goes on from the one before."""
    int8: bool = False
    """Publish an int8 graph too, which processors with VNNI or AMX score 2 to 3 times faster, if its scores are as good."""
    report: bool = True
    """Publish `report.html` and `report.json` too: what the training came to, drawn."""
    segment: str = ""
    """The field by whose values the report tells of calibration and AUC, such as `context.slot`. Default: the context's first category."""

    def __post_init__(self) -> None:
        rules = (
            ("seed", 0 <= self.seed < 2**63, "at least 0, and below 2**63"),
            ("epochs", self.epochs >= 0, "at least 1, or 0: by the rows"),
            ("batch", self.batch == 0 or self.batch >= 2, "at least 2 rows, to normalise over, or 0: by the rows"),
            ("learning_rate", 0 <= self.learning_rate < math.inf, "above 0, or 0: by the batch"),
            ("drop", 0 < self.drop <= 1, "above 0, at most 1"),
            ("patience", self.patience >= 1, "at least 1"),
            ("least_steps", self.least_steps >= 0, "at least 0"),
            ("flat_below", self.flat_below >= 0, "at least 0"),
            ("first_l2", self.first_l2 >= 0, "above 0, or 0: by the rows"),
            ("shuffle_rows", self.shuffle_rows >= 1, "at least 1"),
            ("unknown_rate", 0 <= self.unknown_rate < 1, "at least 0, below 1"),
            ("embedding_l2", self.embedding_l2 >= 0 or self.embedding_l2 == -1, "at least 0, or -1: the network's own"),
            ("regularise", self.regularise in ("table", "batch"), "table or batch"),
            ("sparse_above", self.sparse_above >= 0, "at least 0"),
            ("clip", self.clip > 0, "above 0"),
            ("device", self.device in DEVICES, "auto, cpu or cuda"),
            ("threads", self.threads >= 0, "at least 0"),
            ("workers", self.workers >= 1, "at least 1"),
            ("workers", self.workers <= 1 or self.regularise == "table", "1 where regularise is batch"),
            ("shard_rows", self.shard_rows >= 0, "at least 0"),
            ("shard_rows", not self.shard_rows or self.workers > 1, "0 where workers is 1: there is nobody to share tables with"),
            ("shard_rows", not self.shard_rows or self.device != "cuda", "0 where device is cuda: parts of tables travel between CPUs"),
            ("shard_rows", not self.shard_rows or not self.cooccurrence, "0 where there is cooccurrence, which counts by whole tables"),
            ("evict_after", self.evict_after >= 0, "at least 0"),
            ("position_bias", self.position_bias in ("", *KINDS), f"one of {', '.join(KINDS)}"),
            ("cooccurrence", 0 <= self.cooccurrence < float("inf"), "at least 0"),
        )
        wrong = [f"{name} is {getattr(self, name)!r}; it must be {rule}" for name, fits, rule in rules if not fits]
        if wrong:
            raise TrainError(", and ".join(wrong))

    def for_rows(self, rows: int) -> "TrainSettings":
        """What is left to the data, settled for so many rows of train.

        As measured (docs/decisions/2026-11-28-defaults-follow-the-rows.md): a batch of a fiftieth of the rows, 32 to 2,048 a worker, and a
        learning rate that grows as the batch shrinks, so that a few thousand rows get the steps that they need, and with the square root of
        what several workers add to a batch of 2,048 (Adam: Malladi et al. 2022, https://arxiv.org/abs/2205.10287). Below `flat_below`
        the first order decays as little as in logistic regression with C = 1.
        """
        batch = self.batch or min(max(2 ** round(math.log2(max(rows, 1) / ROWS_A_BATCH)), BATCHES[0]), BATCHES[1] * self.workers)
        more = 1.0 if self.batch else max(1.0, batch / BATCHES[1])
        rate = self.learning_rate or (RATES[0] if batch >= LARGE else RATES[1]) * math.sqrt(more)
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
