"""A small prepared data set with a field of every kind, a quick training on it, and a quick export. For tests of the offline road."""

import io
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx
import polars as pl
import torch
from rich.console import Console
from rich.progress import Progress

from features.encode import Encoder, Features, Feeds
from features.schema import Schema, parse_schema
from features.vocabulary import Vocabularies, Vocabulary, parse_vocabularies
from training.datasets.prepared import Prepared, open_prepared
from training.export.export import SAMPLE, ServedNetwork, random_feeds
from training.export.onnx import OPSET
from training.networks import NETWORKS, build
from training.networks.contract import CLICK, Fields, Network, Part, RequestTensors
from training.networks.fuse import fused
from training.train import Trained, train
from training.train_settings import TrainSettings

torch.set_num_threads(1)

USER = """
[user.user_id]
kind = "category"
buckets = 50
[user.age]
kind = "category"
missing = "unknown"
[user.interests]
kind = "list"
length = 3
vocabulary = "genre"
[user.income]
kind = "number"
transform = "standard"
missing = 10
[context.slot]
kind = "category"
"""
AD = """
[ad.ad_id]
kind = "category"
[ad.genre]
kind = "category"
[ad.tags]
kind = "list"
length = 2
missing = "unknown"
[ad.price]
kind = "number"
transform = "log"
missing = -1
"""
HISTORY = 'history = { length = 4, fields = ["ad_id", "genre", "tags", "price"] }\n'
SCHEMA = 'name = "small"\n' + HISTORY + USER + AD
GENRES, AGES, SLOTS, TAGS = ("drama", "comedy", "news"), ("25", "35", "45"), ("feed", "side"), ("x", "y", "z")
ADS = 12
TINY = {"embedding": 4, "hidden": (8,), "hidden_second": (8,), "attention": (6,), "dropout": 0.0}
"""Widths of the networks of tests, where a network has such a setting."""


def tiny(family: str) -> Any:
    """The settings of a network that is small and quick."""
    usual = NETWORKS[family].settings()
    return replace(usual, **{name: value for name, value in TINY.items() if hasattr(usual, name)})


Built = TypeVar("Built", bound=torch.nn.Module)
NETWORK_SETTINGS = {family: tiny(family) for family in NETWORKS}


def quiet() -> Progress:
    """A progress bar that nobody sees."""
    return Progress(console=Console(quiet=True), disable=True)


def schema(text: str = SCHEMA) -> Schema:
    return parse_schema(text)


def vocabularies(text: str = SCHEMA) -> Vocabularies:
    """Those of the schema, by hand."""
    listed = {"age": AGES, "genre": GENRES, "slot": SLOTS, "tags": TAGS, "ad_id": [f"a{i}" for i in range(ADS)], "user_id": ["u0", "u1"]}
    empty = Vocabularies({name: Vocabulary(values) for name, values in listed.items()}, {})
    json = empty.to_json().replace('"moments":{}', '"moments":{"user.income":[20.0,5.0]}')
    return parse_vocabularies(json, parse_schema(text))


def encoder(text: str = SCHEMA) -> Encoder:
    return Encoder(parse_schema(text), vocabularies(text))


def ad_features(i: int) -> Features:
    """Of ad `a{i}`; the first ads lack some."""
    features: Features = {"genre": GENRES[i % 3], "tags": list(TAGS[: i % 4]), "price": float(i)}
    return {} if i == 0 else features


def fields_of(family: str, text: str = SCHEMA) -> Fields:
    """The fields of a schema, with the heads that the network has by itself."""
    return Fields.of(schema(text), vocabularies(text), NETWORKS[family].own_heads)


def network(family: str, text: str = SCHEMA, seed: int = 0, **settings: Any) -> Network:
    """A tiny network with random weights that matter: embeddings as large as the rest, batch statistics off their start."""
    torch.manual_seed(seed)
    defaults = NETWORK_SETTINGS[family]
    return scrambled(build(family, fields_of(family, text), type(defaults)(**{**vars(defaults), **settings})))


def scrambled(built: Built, deviation: float = 0.5) -> Built:
    """The network with such weights, as it is served."""
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(std=deviation)
        for name, buffer in built.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.3)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
        for name, parameter in built.named_parameters():
            if name.endswith("table.weight"):
                parameter[0].zero_()
    return built.eval()


def click(network: torch.nn.Module, user: Part, history: Part, ad: Part, ages: torch.Tensor | None = None) -> torch.Tensor:
    """Logits `(R, C)` of a click."""
    logits: torch.Tensor = network(RequestTensors(user, history, ad, ages))[CLICK]
    return logits


def data_set(folder: Path, rows: Sequence[int] = (300, 100, 100), seed: int = 0) -> Prepared:
    """Rows of train, valid and test; clicks follow the ad, its genre and the user's age."""
    random = np.random.default_rng(seed)
    (folder / "schema.toml").write_text(SCHEMA)
    ads = [{"ad_id": f"a{i}"} | {f"ad.{name}": value for name, value in ad_features(i).items()} for i in range(ADS)]
    pl.DataFrame(
        ads, schema={"ad_id": pl.String, "ad.genre": pl.String, "ad.tags": pl.List(pl.String), "ad.price": pl.Float64}
    ).write_parquet(folder / "ads.parquet")
    for split, count in zip(("train", "valid", "test"), rows, strict=True):
        (folder / split).mkdir()
        rows_of(random, count).write_parquet(folder / split / "0.parquet")
    return open_prepared(folder)


def rows_of(random: np.random.Generator, count: int, ads: int = ADS) -> pl.DataFrame:
    """Impressions of users `u0` to `u19`, with histories."""
    user, ad = random.integers(0, 20, count), random.integers(0, ads, count)
    p = 1 / (1 + np.exp(-(1.5 * np.sin(ad) + 2.0 * ((user % 3) == (ad % 3)) - 0.7)))
    data = {
        "label": (random.random(count) < p).astype(np.int8),
        "user_id": [f"u{u}" for u in user],
        "ad_id": [f"a{a}" for a in ad],
        "history": [[f"a{a}" for a in random.integers(0, ADS + 1, random.integers(0, 7))] for _ in range(count)],
        "user.age": [None if u == 0 else AGES[u % 3] for u in user],
        "user.interests": [[GENRES[g] for g in random.integers(0, 3, random.integers(0, 5))] for _ in range(count)],
        "user.income": [None if u == 1 else float(u) for u in user],
        "context.slot": [SLOTS[s] for s in random.integers(0, 2, count)],
    }
    lists = pl.List(pl.String)
    return pl.DataFrame(data, schema_overrides={"label": pl.Int8, "history": lists, "user.interests": lists, "user.income": pl.Float64})


def quick(data: Prepared, family: str = "deepfm", **settings: Any) -> Trained:
    """A training of an epoch or two. Neither is the unknown trained, which takes six times as long as all else, nor does the
    first order begin alone: both have tests of their own.
    """
    usual = {"epochs": 2, "batch": 64, "threads": 1, "learning_rate": 0.02, "embedding_l2": 1e-4, "unknown_rate": 0.0, "flat_below": 0}
    loop = TrainSettings(**{**usual, **settings})
    return train(data, family, NETWORK_SETTINGS[family], loop, quiet())


class ByPosition(torch.nn.Module):
    """A module that takes a request's tensors one after the other instead of by name."""

    def __init__(self, module: torch.nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.module, self.names = module, names

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found: tuple[torch.Tensor, ...] = self.module(dict(zip(self.names, tensors, strict=True)))
        return found


def traced(served: ServedNetwork, tile: int | None = None) -> bytes:
    """A graph as `export.to_onnx` makes it, by torch's tracer, which takes a thirtieth of the time: see `conftest.traced_export`."""
    served = ServedNetwork(fused(served.network, None), served.calibration, served.schema, served.others).eval()
    return traced_request(served, served.schema, random_feeds(served.schema, {}, *SAMPLE), served.names)


def traced_request(module: torch.nn.Module, schema: Schema, sample: Feeds, outputs: Sequence[str], facts: Any = None) -> bytes:
    """A graph as `onnx_export.request_graph` makes it."""
    out, axes = io.BytesIO(), {"user": "R", "history": "RT", "ad": "RC"}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # that it is old, and of each size that it takes for a constant
        torch.onnx.export(
            ByPosition(module, list(sample)),
            tuple(map(torch.from_numpy, sample.values())),
            out,  # type: ignore[arg-type]  # which its own documentation calls a file too
            dynamo=False,
            opset_version=OPSET,
            input_names=list(sample),
            output_names=list(outputs),
            dynamic_axes={name: dict(enumerate(axes[schema.tensors[name][0]])) for name in sample},
        )
    graph = onnx.load_from_string(out.getvalue())
    onnx.helper.set_model_props(graph, facts or {})
    made: bytes = graph.SerializeToString()
    return made


def parts(text: str = SCHEMA, requests: int = 3, behaviours: int = 4, candidates: int = 5, seed: int = 0) -> tuple[Part, Part, Part]:
    """Random tensors of requests, padding and unknown among the ids; the last behaviours of the last request are padding."""
    sizes = {name: v.size for name, v in vocabularies(text).categories.items()}
    feeds = random_feeds(schema(text), sizes, requests, behaviours, candidates, seed)
    found = []
    for name, shape in (("user", (requests,)), ("history", (requests, behaviours)), ("ad", (requests, candidates))):
        ids = feeds.get(f"{name}_ids", np.zeros((*shape, 0), np.int64))
        numbers = feeds.get(f"{name}_numbers", np.zeros((*shape, 0), np.float32))
        if name == "history":
            ids[-1, 2:], numbers[-1, 2:] = 0, 0
        found.append(Part(torch.from_numpy(ids), torch.from_numpy(numbers)))
    return found[0], found[1], found[2]
