"""How fast is a training step? With a large table against a small one, beside deepctr-torch, and against the machine's arithmetic.

On drawn rows: every id as likely, histories of 1 to `--history` behaviours. All that is compared takes turns, so that whatever else the
machine does falls on all of it; `--clock cpu` counts the processor's time alone. deepctr-torch 0.3.0 is measured where it is installed, in
the loop of its own `fit`: with rows taken by their numbers, and as it loads them itself, one by one. Its MLP in DIN has ReLU, ours Dice:

    build/peers/bin/python -m pip install deepctr-torch==0.3.0   (after make peers-test, which makes that environment)
    build/peers/bin/python -m benchmarks.training --rounds 7 --json data/bench/training.json
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import default_collate

from adrank_bench.bench import write
from features.encode import Block, Encoder
from features.schema import Schema, parse_schema
from features.vocabulary import FIRST, HashBuckets, Vocabularies
from training.datasets.encoded import Rows, Strangers
from training.device import device_of, moved
from training.fit import batch_loss, deterministic
from training.networks import NETWORKS
from training.networks.contract import Fields, Network
from training.train_settings import TrainSettings
from training.unknown import Hiding
from training.updates import Updates

BATCH, ROWS, WARM = 2048, 40_960, 3
USER, AD = {"user_id": 6_000, "age": 8, "gender": 3, "job": 22, "slot": 6}, {"ad_id": 4_000, "genre": 20, "year": 90}
HISTORY = ("ad_id", "genre")
Step = Callable[[np.ndarray[Any, np.dtype[np.int64]]], None]


@dataclass(frozen=True)
class DrawnRows:
    """Rows of a schema whose fields are all categories."""

    schema: Schema
    encoder: Encoder
    rows: Rows

    @classmethod
    def of(cls, history: int, users: int = USER["user_id"], seed: int = 1) -> "DrawnRows":
        """`history` 0: there is none."""
        random, sizes = np.random.default_rng(seed), {**USER, "user_id": users, **AD}
        past = f"history = {{ length = {history}, fields = {list(HISTORY)} }}\n".replace("'", '"') if history else ""
        sides = [("user", name) for name in USER] + [("ad", name) for name in AD]
        fields = (f'[{side}.{name}]\nkind = "category"\nbuckets = {sizes[name]}\n' for side, name in sides)
        schema = parse_schema(f'name = "drawn"\n{past}' + "".join(fields))
        encoder = Encoder(schema, Vocabularies({name: HashBuckets(size) for name, size in sizes.items()}, {}))
        user, ad, ads = (_block(random, [sizes[name] for name in of], n) for of, n in ((USER, ROWS), (AD, ROWS), (AD, AD["ad_id"])))
        behaviours = Block(
            np.vstack([np.zeros_like(ads.ids[:1]), ads.ids])[:, : len(HISTORY) if history else 0], np.zeros((len(ads) + 1, 0), np.float32)
        )
        lengths = random.integers(1, max(history, 1) + 1, (ROWS, 1))
        shown = random.integers(1, len(ads) + 1, (ROWS, max(history, 1))) * (np.arange(max(history, 1)) < lengths) * (history > 0)
        labels = random.integers(0, 2, ROWS).astype(np.float32)
        numbers = np.arange(ROWS, dtype=np.uint64)
        return cls(schema, encoder, Rows(labels, numbers, user, ad, shown.astype(np.int32), behaviours, Strangers.of(encoder), ads))

    def network(self, family: str) -> Network:
        """A fresh one, as wide as it is by default."""
        kind = NETWORKS[family]
        return kind(Fields.of(self.schema, self.encoder.vocabularies), kind.settings())


def _block(random: np.random.Generator, sizes: Sequence[int], rows: int) -> Block:
    return Block(np.stack([random.integers(FIRST, FIRST + size, rows) for size in sizes], 1), np.zeros((rows, 0), np.float32))


def ours(data: DrawnRows, network: Network, **given: Any) -> Step:
    """A step of `fit_network`, from the rows' numbers to the updated weights."""
    settings = TrainSettings(**{"device": "cpu", **given}).for_rows(ROWS)
    device = device_of(settings.device)
    network.to(device)
    hiding, updates = Hiding(data.rows, settings.unknown_rate, settings.seed), Updates(network, data.rows, settings)
    network.train()

    def step(chosen: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        batch, labels, twins, _ = moved(next(hiding.batches([(data.rows, chosen)])), device)
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.amp):
            loss = batch_loss(network, batch, labels, twins)
        updates.step(loss, batch)
        loss.item()

    return step


def peer(data: DrawnRows, family: str) -> dict[str, Step]:
    """Steps of deepctr-torch's `fit`, for a network with the same fields, widths and optimiser."""
    inputs, models = import_module("deepctr_torch.inputs"), import_module("deepctr_torch.models")

    settings, history = NETWORKS[family].settings(), data.schema.history_length
    width = settings.embedding
    columns = [inputs.SparseFeat(name, size + FIRST, embedding_dim=width) for name, size in {**USER, **AD}.items()]
    blocks = [data.rows.user.ids, data.rows.ad.ids]
    if history:
        lengths = (data.rows.history > 0).sum(1, keepdims=True)
        for i, name in enumerate(HISTORY):
            one = inputs.SparseFeat(f"hist_{name}", AD[name] + FIRST, embedding_dim=width, embedding_name=name)
            columns.append(inputs.VarLenSparseFeat(one, maxlen=history, length_name="length" if family == "din" else None))
            blocks += [data.rows.behaviours.ids[data.rows.history, i], *([lengths] if family == "din" and not i else [])]
    if family == "din":
        attention = {"att_hidden_size": settings.attention, "att_activation": "Dice"}
        network = models.DIN(columns, list(HISTORY), True, settings.hidden, dnn_dropout=settings.dropout, **attention)
    else:
        network = models.DeepFM(columns, columns, dnn_hidden_units=settings.hidden, dnn_dropout=settings.dropout, dnn_use_bn=True)
    network.compile("adam", "binary_crossentropy")
    whole, labels = torch.from_numpy(np.hstack(blocks)), torch.from_numpy(data.rows.labels)
    network.train()

    def step(chosen: np.ndarray[Any, np.dtype[np.int64]], load: bool = False) -> None:
        x, y = default_collate([(whole[row], labels[row]) for row in chosen]) if load else (whole[chosen], labels[chosen])
        said = network(x.float()).squeeze(-1)
        network.optim.zero_grad()
        loss = network.loss_func(said, y, reduction="sum") + network.get_regularization_loss() + network.aux_loss
        loss.item()
        loss.backward()
        network.optim.step()

    return {"deepctr-torch": step, "deepctr-torch, its DataLoader": lambda chosen: step(chosen, load=True)}


def in_turns(steps: Mapping[str, Step], rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of the median step of each round, each step of a round after the others'."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds):
        times: dict[str, list[float]] = {name: [] for name in steps}
        for chosen in _batches(turn):
            for name, step in steps.items():
                begun = clock()
                step(chosen)
                times[name].append(clock() - begun)
        for name, each in times.items():
            found[name].append(median(each[WARM:] if not turn else each))
    return found


def _batches(seed: int) -> Iterator[np.ndarray[Any, np.dtype[np.int64]]]:
    yield from np.random.default_rng(seed).permutation(ROWS).reshape(-1, BATCH)


def matmul_rate(clock: Callable[[], float], size: int = 1024, tries: int = 20) -> float:
    """Multiplications and additions a second of the machine, by the best product of two square matrices."""
    a, b, best = torch.rand(size, size), torch.rand(size, size), np.inf
    for _ in range(tries):
        begun = clock()
        a @ b
        best = min(best, clock() - begun)
    return 2 * size**3 / best


def floor(network: Network, behaviours: float) -> float:
    """The additions and multiplications that a row's dense layers take in a step at least: each weight 6, in the attention a behaviour."""
    count = 0.0
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear):
            # Of the attention's first layer, over [q, k, q - k, q * k], a behaviour takes one product: see `LocalActivation`.
            share = 0.25 if name == "attention.first" else 1.0
            count += 6 * layer.weight.numel() * share * (behaviours if name.startswith("attention") else 1)
    return count


def ratio(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    """The median of the rounds' ratios, and the least and the most of them."""
    each = [a / b for a, b in zip(over, under, strict=True)]
    return {"median": median(each), "least": min(each), "most": max(each)}


def large_tables(rounds: int, rows: int, clock: Callable[[], float]) -> dict[str, Any]:
    """A step with `rows` in a table against one with 10,000, each batch touching as many as it can."""
    found = {}
    for family, history in (("deepfm", 0), ("deepfm", 20), ("din", 20)):
        steps = {}
        for size in (10_000, rows):
            data = DrawnRows.of(history, size)
            steps[str(size)] = ours(data, data.network(family))
        times = in_turns(steps, rounds, clock)
        found[f"{family}, history {history}"] = {
            "ms": {size: 1e3 * median(each) for size, each in times.items()},
            "ratio": ratio(times[str(rows)], times["10000"]),
        }
    return found


def thresholds(rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Steps of DeepFM with its tables updated densely and sparsely, by their rows."""
    found = {}
    for size in (10_000, 50_000, 100_000, 200_000, 500_000):
        data = DrawnRows.of(0, size)
        times = in_turns({str(above): ours(data, data.network("deepfm"), sparse_above=above) for above in (0, 1_000)}, rounds, clock)
        found[f"{size:,}"] = {"dense ms": 1e3 * median(times["0"]), "sparse ms": 1e3 * median(times["1000"])}
    return found


def speeds(rounds: int, history: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Rows a second of ours, of deepctr-torch where it is there, and the share of what the arithmetic alone would allow."""
    found, rate = {}, matmul_rate(clock)
    for family, length in (("deepfm", 0), ("deepfm", history), ("din", history)):
        data = DrawnRows.of(length)
        network = data.network(family)
        steps = {"ours": ours(data, network)} | (peer(data, family) if find_spec("deepctr_torch") else {})
        times = in_turns(steps, rounds, clock)
        behaviours = float((data.rows.history > 0).sum(1).mean())
        least = floor(network, behaviours) / rate
        found[f"{family}, history {length}"] = {
            "rows a second": {name: BATCH / median(each) for name, each in times.items()},
            "share of the floor": least * BATCH / median(times["ours"]),
            "beside ours": {name: ratio(each, times["ours"]) for name, each in times.items() if name != "ours"},
        }
    return {"matmul GFLOP/s": rate / 1e9, **found}


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--rows", type=click.IntRange(10_001), default=10_000_000, show_default=True, help="Of the large table.")
@click.option("--history", type=click.IntRange(1), default=50, show_default=True, help="The longest.")
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("--clock", type=click.Choice(["wall", "cpu"]), default="wall", show_default=True, help="cpu: with one thread.")
@click.option("--what", type=click.Choice(["large", "thresholds", "speeds"]), multiple=True, default=["large", "speeds"])
@click.option("--json", "target", type=click.Path(path_type=Path))
def main(rounds: int, rows: int, history: int, threads: int, clock: str, what: tuple[str, ...], target: Path | None) -> None:
    """Measure steps of training."""
    counted = time.perf_counter if clock == "wall" else time.process_time
    found: dict[str, Any] = {"threads": threads, "clock": clock, "batch": BATCH, "rounds": rounds}
    with deterministic(TrainSettings(threads=threads)):
        if "large" in what:
            found["large tables"] = large_tables(rounds, rows, counted)
        if "thresholds" in what:
            found["thresholds"] = thresholds(rounds, counted)
        if "speeds" in what:
            found["speeds"] = speeds(rounds, history, counted)
    write(found, target)
    console = Console()
    for title, each in found.items():
        if isinstance(each, Mapping):
            table = Table("", "", title=title)
            for name, value in each.items():
                table.add_row(name, _plain(value))
            console.print(table)


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_plain(each)}" for name, each in value.items())
    return f"{value:,.2f}"


if __name__ == "__main__":
    main()
