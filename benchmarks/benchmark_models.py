"""The two models that everything is measured with, as published bundles and, with the same weights, row-wise.

Random weights from a seed, no training. Batch statistics come from random requests and are then moved, Dice's α and the affine
terms are random, and the calibration spreads p(click) over 0.01 to 0.9: nothing folds away, and equal scores mean something.
"""

import hashlib
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import nn

from features.bundle import CUDA_MODEL, GOLDENS, INT8_MODEL, MODEL, SCHEMA, VOCABULARIES, Golden, current_path, goldens_json, publish
from features.encode import Encoder, Feeds
from features.schema import Schema, parse_schema
from training.calibrate import Calibration
from training.export.export import FEW, ServedNetwork, ad_sides, random_feeds, score, to_onnx
from training.export.int8 import quantised
from training.export.onnx import table_files
from training.networks import NETWORKS
from training.networks.contract import Fields
from training.networks.deepfm import DeepFMSettings
from training.networks.din import DINSettings
from training.networks.fuse import is_tiled
from training.networks.layers import Dice

from .population import Population
from .rowwise import rowwise_onnx

FOLDER = Path("data/bench")
ROOT = Path(__file__).parent.parent
SOURCES = (
    "training/networks",
    "training/export/export.py",
    "training/export/onnx.py",
    "training/export/ad_side.py",
    "training/export/int8.py",
    "features",
    *(f"benchmarks/{name}.py" for name in ("population", "rowwise", "benchmark_models")),
)
LOW, HIGH = 0.01, 0.9
"""The 1st and the 99th percentile of p(click)."""
GOLDEN_REQUESTS, GOLDEN_CANDIDATES = 8, 12

USER_FEATURES = {"age": 10, "gender": 3, "city": 1_000, "device": 50, "os": 20, "language": 40, "segment": 200}
AD_FEATURES = {
    "category": 1_000,
    "brand": 5_000,
    "campaign": 20_000,
    "advertiser": 2_000,
    "format": 10,
    "size": 30,
    "colour": 20,
    "price_band": 50,
    "landing": 500,
    "audience": 100,
    "age_band": 10,
}


@dataclass(frozen=True)
class BenchmarkModel:
    """A network with its settings, and the users and ads that it knows."""

    name: str
    family: str
    settings: DINSettings | DeepFMSettings
    population: Population


@dataclass(frozen=True)
class Built:
    """A benchmark model on disk: a model repository that holds it alone, its bundle in there, and the row-wise graph."""

    benchmark_model: BenchmarkModel
    models: Path
    bundle: Path
    rowwise: Path
    textbook: Path

    @property
    def graph(self) -> Path:
        """The exported graph, as it is served."""
        return self.bundle / MODEL

    @property
    def int8(self) -> Path | None:
        """The int8 graph, where it pays."""
        path = self.bundle / INT8_MODEL
        return path if path.exists() else None


def din_100(ads: int = 100_000, history: int = 100, long: str = "attention") -> BenchmarkModel:
    """DIN over 100 behaviours of an item and its category, read as its setting `long` says."""
    text = f"""
name = "din-100"
history = {{ length = {history}, fields = ["ad_id", "category"] }}
[user]
user_id = {{ kind = "category" }}
[ad]
ad_id = {{ kind = "category" }}
category = {{ kind = "category" }}
"""
    settings = DINSettings(embedding=16, attention=(80, 40), hidden=(200, 80), dropout=0.0, long=long)
    sizes = {"user_id": 10_000, "ad_id": ads, "category": 1_000}
    return BenchmarkModel("din-100" if long == "attention" else f"din-{long}", "din", settings, Population(parse_schema(text), sizes))


def deepfm_20(ads: int = 100_000) -> BenchmarkModel:
    """DeepFM over 20 fields: 8 of the user, 12 of the ad."""
    lines = ['name = "deepfm-20"']
    for side, identity, features in (("user", "user_id", USER_FEATURES), ("ad", "ad_id", AD_FEATURES)):
        lines += [f"[{side}]", *(f'{name} = {{ kind = "category" }}' for name in (identity, *features))]
    settings = DeepFMSettings(embedding=16, hidden=(400, 400, 400), dropout=0.0)
    sizes = {"user_id": 10_000, "ad_id": ads, **USER_FEATURES, **AD_FEATURES}
    return BenchmarkModel("deepfm-20", "deepfm", settings, Population(parse_schema("\n".join(lines)), sizes))


BENCHMARK_MODELS = {"din-100": din_100, "deepfm-20": deepfm_20}


def build(benchmark_model: BenchmarkModel, folder: Path = FOLDER) -> Built:
    """The benchmark model under `folder`; built anew only where the code that makes it has changed, which removes what older code built."""
    made = folder / f"built-{_sources()}"
    home = made / f"{benchmark_model.name}-{hashlib.sha256(repr(benchmark_model).encode()).hexdigest()[:8]}"
    if not home.exists():
        for old in folder.glob("built-" + 12 * "[0-9a-f]"):
            if old != made:
                shutil.rmtree(old)
        made.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=made) as staging:
            _write(benchmark_model, Path(staging) / "built")
            (Path(staging) / "built").rename(home)
    models = home / "models"
    return Built(benchmark_model, models, current_path(models, benchmark_model.name), home / "rowwise.onnx", home / "textbook.onnx")


def _sources() -> str:
    """What the code that builds is, in 12 hexadecimal digits."""
    digest = hashlib.sha256()
    for source in SOURCES:
        path = ROOT / source
        for file in [path] if path.is_file() else sorted(path.glob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _write(benchmark_model: BenchmarkModel, home: Path) -> None:
    served, encoder = make(benchmark_model), benchmark_model.population.encoder
    graph = to_onnx(served)
    pays = NETWORKS[benchmark_model.family].int8_pays
    rough = quantised(graph, _requests(served.schema, benchmark_model.population.heights, 8)) if pays else None
    graphs = {MODEL: graph, **({INT8_MODEL: rough} if rough else {})}
    files = {
        **graphs,
        **table_files([graph]),
        **ad_sides(graphs, [random_feeds(served.schema, benchmark_model.population.heights, *shape) for shape in FEW]),
        CUDA_MODEL: to_onnx(served, tile=None) if is_tiled(served.network) else graph,
        SCHEMA: encoder.schema.to_toml().encode(),
        VOCABULARIES: encoder.vocabularies.to_json().encode(),
        GOLDENS: goldens_json(random_goldens(benchmark_model.population, served, encoder, rough)),
    }
    publish(home / "models", benchmark_model.name, files, {"network": benchmark_model.family, "settings": vars(benchmark_model.settings)})
    for name in ("rowwise", "textbook"):
        (home / f"{name}.onnx").write_bytes(rowwise_onnx(served, benchmark_model.population.heights, textbook=name == "textbook"))


def make(benchmark_model: BenchmarkModel, seed: int = 1) -> ServedNetwork:
    """The network with its random weights and the calibration that spreads its probabilities."""
    torch.manual_seed(seed)
    schema, sizes = benchmark_model.population.schema, benchmark_model.population.heights
    network = NETWORKS[benchmark_model.family](Fields(schema.layouts, sizes), benchmark_model.settings)
    _randomise(network)
    _settle(network, schema, sizes)
    plain = ServedNetwork(network.eval(), Calibration(), schema).eval()
    p = np.concatenate([score(plain, feeds).ravel() for feeds in _requests(schema, sizes, 32)]).astype(np.float64)
    low, high = np.log(np.quantile(p, (0.01, 0.99)) / (1 - np.quantile(p, (0.01, 0.99))))
    wanted = [float(np.log(share / (1 - share))) for share in (LOW, HIGH)]
    scale = (wanted[1] - wanted[0]) / (high - low)
    return ServedNetwork(network, Calibration(float(scale), float(wanted[0] - scale * low)), schema).eval()


def _randomise(network: nn.Module) -> None:
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Embedding):
                module.weight.normal_(std=0.2)
                module.weight[module.padding_idx or 0].zero_()
            elif isinstance(module, Dice):
                module.alpha.normal_(std=0.3)
            elif isinstance(module, nn.BatchNorm1d) and module.affine:
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.2)
            elif isinstance(module, nn.Linear):
                module.bias.normal_(std=0.1)


def _settle(network: nn.Module, schema: Schema, sizes: Mapping[str, int]) -> None:
    """Batch statistics of random requests, then moved off them."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm1d)]
    for norm in norms:
        norm.momentum = None  # a plain mean over the batches
    served = ServedNetwork(network.train(), Calibration(), schema)
    for feeds in _requests(schema, sizes, 8):
        score(served, feeds)
    with torch.no_grad():
        for norm in norms:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean += 0.2 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean)
            norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.6, 1.6)


def _requests(schema: Schema, sizes: Mapping[str, int], count: int) -> list[Feeds]:
    return [random_feeds(schema, dict(sizes), 32, max(schema.history_length, 1), 8, seed) for seed in range(count)]


def random_goldens(population: Population, served: ServedNetwork, encoder: Encoder, rough: bytes | None = None) -> list[Golden]:
    """Random requests with their scores, those of the int8 graph too where there is one."""
    random = np.random.default_rng([population.seed, 4])
    ads = {ad.ad_id: ad.features for ad in population.ads()}
    users = list(population.users())
    session = onnxruntime.InferenceSession(rough, providers=["CPUExecutionProvider"]) if rough else None
    goldens = []
    for i in random.integers(len(users), size=GOLDEN_REQUESTS).tolist():
        user_id, state = users[i]
        candidates = random.choice(population.ad_ids, GOLDEN_CANDIDATES, replace=False).tolist()
        known = {ad_id: ads[ad_id] for ad_id in {*candidates, *state.ad_ids}}
        golden = Golden(user_id, state.features, {}, list(state.ad_ids), candidates, known, [])
        feeds = golden.feeds(encoder)
        golden = replace(golden, p_click=score(served, feeds)[0].tolist())
        goldens.append(replace(golden, p_click_int8=session.run(None, feeds)[0][0].tolist()) if session else golden)
    return goldens
