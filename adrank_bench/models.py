"""`adrank benchmark models`: every network on one data set, what it learns and what it costs to serve. Goes on where it was stopped."""

import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import onnxruntime
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from features.bundle import replace_file
from features.encode import Encoder
from training.calibrate import Calibration
from training.datasets.encoded import Rows, encode_split
from training.datasets.prepared import SPLITS, DataError, Prepared
from training.datasets.vocabularies import learn_vocabularies
from training.export.export import ServedNetwork, random_feeds, to_onnx
from training.first_order import settled
from training.fit import deterministic, fit_network, predict_heads
from training.networks import NETWORKS, build
from training.networks.contract import CLICK, Fields, Network
from training.train import calibrated, heads_of, measured_heads
from training.train_settings import TrainError, TrainSettings, overridden

from .cold import by_exposure, exposures

CANDIDATES = 200
SCORING_SECONDS = 1.0
LETTER = (8, 13)
"""How wide and high a letter of a network's name is in the picture, in pixels: names do not lie on each other."""
Said = Callable[[str], Mapping[str, str]]
"""The settings of a network, as the texts of `--set`."""


@dataclass(frozen=True)
class ModelRun:
    """What came of one network with one seed."""

    family: str
    seed: int
    settings: dict[str, str]
    """Those that differ from the defaults, as texts."""
    refused: str = ""
    """Why it cannot be trained on this data set; then there is nothing else."""
    test: dict[str, float | None] = field(default_factory=dict)
    cold: list[dict[str, Any]] = field(default_factory=list)
    """AUC and log loss on test by how many impressions of train its ad had, and its user."""
    valid_auc: float = 0.0
    epochs: int = 0
    parameters: int = 0
    training_rows_per_second: float = 0.0
    """Rows that were trained on, over all the time until the last epoch was measured."""
    candidates_per_second: float = 0.0
    """Of the exported graph, one thread of ONNX Runtime, one request of 200 candidates at a time, by the median run."""

    @property
    def key(self) -> tuple[str, int, str]:
        """What makes it another measurement."""
        return self.family, self.seed, json.dumps(self.settings, sort_keys=True)


class Results:
    """The file of measurements, written anew after each."""

    def __init__(self, path: Path, data: Prepared) -> None:
        """Open or begin it.

        Raises:
            DataError: it is not such a file, or is of another data set.
        """
        self.path, self.name = path, data.schema.name
        self.runs: list[ModelRun] = []
        if path.exists():
            try:
                document = json.loads(path.read_text("utf-8"))
                self.runs = [ModelRun(**run) for run in document["runs"]]
                about = document["data_set"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path} is no file of adrank benchmark models: {error!r}; name another with --json") from error
            if about != self.name:
                raise DataError(f"{path} is about the data set {about}, and this is {self.name}; name another file with --json")

    def has(self, run: ModelRun) -> bool:
        """Whether it was measured already."""
        return run.key in {each.key for each in self.runs}

    def add(self, run: ModelRun) -> None:
        """Keep a measurement, in the file too."""
        self.runs.append(run)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = {"data_set": self.name, "machine": machine(), "runs": [asdict(each) for each in self.runs]}
        replace_file(self.path, (json.dumps(whole, indent=1) + "\n").encode())


def machine() -> str:
    """What measured, in words."""
    return f"{os.cpu_count()} processors, {platform.machine()}, torch and ONNX Runtime with one thread each"


class Measuring:
    """Trains and measures networks on one data set, which is encoded once for each set of heads."""

    def __init__(self, data: Prepared, progress: Progress) -> None:
        self.data, self.progress = data, progress
        self.encoder = Encoder(data.schema, learn_vocabularies(data))
        self.exposure = exposures(data)
        self._rows: dict[tuple[str, ...], dict[str, Rows]] = {}

    def rows(self, heads: tuple[str, ...]) -> dict[str, Rows]:
        """The splits with the labels of these heads."""
        if heads not in self._rows:
            self._rows[heads] = {split: encode_split(self.data, split, self.encoder, heads) for split in SPLITS}
        return self._rows[heads]

    def run(self, wanted: ModelRun) -> ModelRun:
        """Train, measure on test, export, and time the graph.

        Raises:
            TrainError: a setting is none, or not of its type.
        """
        kind = NETWORKS[wanted.family]
        given = {"threads": "1", **wanted.settings, "seed": str(wanted.seed)}
        network_settings, settings = overridden(given, kind.settings(), TrainSettings())
        heads = heads_of(wanted.family, settings.heads)
        try:
            rows = self.rows(heads)
            network_settings = settled(network_settings, len(rows["train"]) < settings.flat_below)
            with deterministic(settings):
                network = build(wanted.family, Fields.of(self.data.schema, self.encoder.vocabularies, heads), network_settings)
                begun = time.perf_counter()
                epochs = fit_network(network, rows["train"], rows["valid"], settings, self.progress)
                seconds = time.perf_counter() - begun
                valid = predict_heads(network, rows["valid"])
                calibrations = {head: calibrated(rows["valid"], head, valid[head], self.data.negative_sampling) for head in heads}
                logits = predict_heads(network, rows["test"])
                network.cpu()
                test = measured_heads(rows["test"], logits, calibrations)[CLICK]
        except (ValueError, DataError) as error:  # TrainError is a ValueError
            return ModelRun(wanted.family, wanted.seed, wanted.settings, refused=str(error))
        return ModelRun(
            wanted.family,
            wanted.seed,
            wanted.settings,
            test=test.as_dict(),
            cold=by_exposure(self.exposure, rows["test"].labels, calibrations[CLICK].on_log(logits[CLICK])),
            valid_auc=max(epoch.valid.auc for epoch in epochs),
            epochs=len(epochs),
            parameters=sum(parameter.numel() for parameter in network.parameters()),
            training_rows_per_second=len(rows["train"]) * len(epochs) / seconds,
            candidates_per_second=self.scoring(network, calibrations),
        )

    def scoring(self, network: Network, calibrations: Mapping[str, Calibration]) -> float:
        """Candidates a second of the exported graph."""
        others = {head: each for head, each in calibrations.items() if head != CLICK}
        schema = self.data.schema
        graph = to_onnx(ServedNetwork(network, calibrations[CLICK], schema, others).eval())
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        sizes = {name: v.size for name, v in self.encoder.vocabularies.categories.items()}
        feeds = random_feeds(schema, sizes, 1, max(schema.history_length, 1), CANDIDATES)
        times, end = list[float](), time.perf_counter() + SCORING_SECONDS
        while time.perf_counter() < end or len(times) < 20:
            begun = time.perf_counter()
            session.run(["p_click"], feeds)
            times.append(time.perf_counter() - begun)
        return CANDIDATES / median(times)


def measure(data: Prepared, families: Sequence[str], seeds: int, said: Said, target: Path, progress: Progress) -> list[ModelRun]:
    """Measure each network with seeds 1 to `seeds`, but for what the file `target` has already; all that it has then.

    Raises:
        TrainError: there is no such network, or a setting is none.
        DataError: the data set or the file cannot be read.
    """
    if unknown := [family for family in families if family not in NETWORKS]:
        raise TrainError(f"there is no network {unknown[0]!r}; there are {', '.join(NETWORKS)}")
    results = Results(target, data)
    wanted = [ModelRun(family, seed, dict(said(family))) for seed in range(1, seeds + 1) for family in families]
    todo = [run for run in wanted if not results.has(run)]
    progress.console.print(f"{len(wanted) - len(todo)} of {len(wanted)} measurements are in {target} already")
    if todo:
        measuring, task = Measuring(data, progress), progress.add_task("networks", total=len(todo))
        for run in todo:
            progress.console.print(f"{run.family}, seed {run.seed}")
            results.add(measuring.run(run))
            progress.advance(task)
    keys = {run.key for run in wanted}
    return [run for run in results.runs if run.key in keys]


@dataclass(frozen=True)
class Row:
    """A network in the table: means over its seeds."""

    family: str
    seeds: int
    auc: float
    spread: float
    """The largest AUC less the smallest."""
    gauc: float
    log_loss: float
    parameters: int
    training: float
    serving: float


def table_of(runs: Iterable[ModelRun]) -> list[Row]:
    """A row a network, the best AUC first."""
    by_family: dict[str, list[ModelRun]] = {}
    for run in runs:
        if not run.refused:
            by_family.setdefault(run.family, []).append(run)
    rows = []
    for family, found in by_family.items():
        aucs, gaucs, losses = ([number(run.test[name]) for run in found] for name in ("auc", "gauc", "log_loss"))
        speeds = [mean(getattr(run, name) for run in found) for name in ("training_rows_per_second", "candidates_per_second")]
        rows.append(Row(family, len(found), mean(aucs), max(aucs) - min(aucs), mean(gaucs), mean(losses), found[0].parameters, *speeds))
    return sorted(rows, key=lambda row: -row.auc)


def number(value: float | None) -> float:
    """A measure, NaN where there is none."""
    return np.nan if value is None else value


def improvement(auc: float, base: float | None) -> str:
    """RelaImpr: how much further from a coin's AUC than the base, in percent (Shen et al. 2016)."""
    return "" if base is None or base <= 0.5 else f"{100 * ((auc - 0.5) / (base - 0.5) - 1):+.2f} %"


def show(runs: Sequence[ModelRun], console: Console) -> None:
    """The table, and what could not be trained."""
    rows = table_of(runs)
    base = next((row.auc for row in rows if row.family == "lr"), None)
    measures = ("AUC", "spread", "GAUC", "log loss", "RelaImpr")
    table = Table("network", "seeds", *measures, "parameters", "rows/s trained", "candidates/s served")
    for row in rows:
        numbers = f"{row.auc:.5f}", f"{row.spread:.5f}", f"{row.gauc:.5f}", f"{row.log_loss:.5f}", improvement(row.auc, base)
        table.add_row(row.family, str(row.seeds), *numbers, f"{row.parameters:,}", f"{row.training:,.0f}", f"{row.serving:,.0f}")
    console.print(table)
    console.print(cold_table(runs))
    for run in runs:
        if run.refused:
            console.print(f"{run.family}: {run.refused}")


def cold_table(runs: Sequence[ModelRun]) -> Table:
    """AUC on test by how often training has seen the ad and the user, means over the seeds."""
    groups = {(each["of"], each["seen"]): each["rows"] for run in runs for each in run.cold}
    table = Table("AUC by impressions in train", *(f"{of}: {seen} ({rows:,} rows)" for (of, seen), rows in groups.items()))
    for row in table_of(runs):
        same = [run for run in runs if run.family == row.family and run.cold]
        own = [{(each["of"], each["seen"]): number(each["auc"]) for each in run.cold} for run in same]
        table.add_row(row.family, *(f"{np.mean([each.get(group, np.nan) for each in own]):.4f}" if own else "" for group in groups))
    return table


def draw(runs: Sequence[ModelRun], path: Path) -> None:
    """AUC against what a candidate costs to serve, as an SVG or a PNG by the name of the file."""
    import matplotlib as mpl  # noqa: PLC0415  # only who asks for a picture needs it

    mpl.use("agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    rows = table_of(runs)
    costs, aucs = [1e6 / row.serving for row in rows], [row.auc for row in rows]
    figure, axes = plt.subplots(figsize=(9, 6))
    axes.scatter(costs, aucs, color="#1f6feb", s=25)
    axes.set_xscale("log")
    axes.set_xlabel(f"microseconds a candidate, of requests of {CANDIDATES}, one thread")
    axes.set_ylabel("AUC on test")
    axes.set_yscale("logit")  # halving what is missing is as far everywhere
    axes.yaxis.set_major_locator(mpl.ticker.MaxNLocator(10))
    axes.yaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%.3f"))
    axes.yaxis.set_minor_locator(mpl.ticker.NullLocator())
    axes.margins(x=0.12)
    axes.grid(alpha=0.3, which="both")
    figure.tight_layout()
    _name(axes, [(row.family, cost, row.auc) for row, cost in zip(rows, costs, strict=True)])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def _name(axes: Any, points: Iterable[tuple[str, float, float]]) -> None:
    """Write names beside their points, lower where another name is."""
    placed: list[tuple[float, float, float]] = []
    for name, *at in points:
        x, y = axes.transData.transform(at)
        width, low = LETTER[0] * len(name), y
        while any(x < end and start < x + width and abs(low - other) < LETTER[1] for start, end, other in placed):
            low -= 1
        placed.append((x, x + width, low))
        axes.annotate(name, at, textcoords="offset pixels", xytext=(8, low - y - 3), fontsize=9)
