"""A small bundle with a model whose every score can be worked out by hand, for tests of the service."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from features import bundle
from features.bundle import current_path, locked, release, released
from features.encode import Encoder, Features, Feeds
from features.repository import model_names
from features.schema import parse_schema
from features.vocabulary import Numbers, Vocabularies, Vocabulary, parse_vocabularies
from service.models.loaded import Models, load_model
from service.settings import Settings

SCHEMA = """
name = "test"
[history]
length = 5
fields = ["ad_id", "genre"]
[user.user_id]
kind = "category"
buckets = 1000
[user.age]
kind = "category"
[user.interests]
kind = "list"
length = 3
vocabulary = "genre"
[user.income]
kind = "number"
transform = "log"
[context.slot]
kind = "category"
[ad.ad_id]
kind = "category"
buckets = 5000
[ad.genre]
kind = "category"
[ad.tags]
kind = "list"
length = 2
[ad.price]
kind = "number"
transform = "log"
"""
TOO_DEAR = 1e30
"""A price for which the model gives no number: it takes the root of 8 - log(1 + price)."""
ADS = {f"a{i}": {"genre": ("drama", "comedy", "news")[i % 3], "tags": ["x", "y"][: i % 3], "price": float(i)} for i in range(30)}


def set_current(models: Path, name: str, version: int) -> None:
    """Make a version the live one, whatever it holds: `releases.promote` would check it."""
    with locked(models / name):
        release(models / name, version, released(models / name))


def vocabularies() -> Vocabularies:
    """Those of the schema."""
    values = {"age": ["25", "35"], "genre": ["drama", "comedy", "news"], "slot": ["feed", "side"], "tags": ["x", "y"], "ad_id": [*ADS]}
    schema = parse_schema(SCHEMA)
    listed = {field.vocabulary for field in schema.fields if not field.buckets}
    own = {name: Vocabulary(each) for name, each in values.items() if name in listed}
    return parse_vocabularies(Vocabularies(own, {}).to_json(), schema)


def encoder() -> Encoder:
    """That of the bundle."""
    return Encoder(parse_schema(SCHEMA), vocabularies())


def expected(feeds: Feeds, bias: float = 0.0) -> Numbers:
    """What the model gives `(R, C)`, by numpy: waves of the ids, so that each id matters and padding (0) does not."""
    f = np.float32

    def waves(name: str, factor: float, axes: int | tuple[int, int]) -> Numbers:
        # In float32 like the model: the wave of a large id depends on how the id times the factor was rounded.
        total: Numbers = np.sin(feeds[name].astype(f) * f(factor)).sum(axes, dtype=f)
        return total

    user = waves("user_ids", 0.7, -1) + f(0.1) * feeds["user_numbers"].sum(-1)
    ad = waves("ad_ids", 0.9, -1) + f(0.05) * np.sqrt(8 - feeds["ad_numbers"].sum(-1))
    logits = ad * (1 + waves("history_ids", 0.3, (-1, -2))[:, None]) + f(0.1) * user[:, None] - f(1) + f(bias)
    answer: Numbers = (1 / (1 + np.exp(-logits))).astype(f)
    return answer


def model(bias: float = 0.0, conversion: bool = False) -> bytes:
    """The ONNX model of `expected`, perhaps with a second head: p(conversion) = p(click)²."""
    nodes: list[Any] = []
    constants: list[Any] = []

    def constant(value: float | list[int], name: str) -> str:
        kind = TensorProto.INT64 if isinstance(value, list) else TensorProto.FLOAT
        dims = [len(value)] if isinstance(value, list) else []
        constants.append(helper.make_tensor(name, kind, dims, value if isinstance(value, list) else [value]))
        return name

    def apply(operator: str, *inputs: str, **attributes: int) -> str:
        output = f"n{len(nodes)}"
        nodes.append(helper.make_node(operator, list(inputs), [output], None, None, None, None, **attributes))
        return output

    def waves(ids: str, factor: float, axes: list[int]) -> str:
        scaled = apply("Mul", apply("Cast", ids, to=TensorProto.FLOAT), constant(factor, f"{ids}_factor"))
        return apply("ReduceSum", apply("Sin", scaled), constant(axes, f"{ids}_axes"), keepdims=0)

    last = constant([-1], "last")
    income = apply("Mul", apply("ReduceSum", "user_numbers", last, keepdims=0), constant(0.1, "c0"))
    user = apply("Unsqueeze", apply("Add", waves("user_ids", 0.7, [-1]), income), last)
    history = apply("Unsqueeze", waves("history_ids", 0.3, [-1, -2]), last)
    price = apply("Sqrt", apply("Sub", constant(8.0, "c1"), apply("ReduceSum", "ad_numbers", last, keepdims=0)))
    ad = apply("Add", waves("ad_ids", 0.9, [-1]), apply("Mul", price, constant(0.05, "c2")))
    crossed = apply("Mul", ad, apply("Add", history, constant(1.0, "c3")))
    logits = apply("Add", apply("Add", crossed, apply("Mul", user, constant(0.1, "c4"))), constant(bias - 1.0, "c5"))
    nodes.append(helper.make_node("Sigmoid", [logits], ["p_click"]))
    shapes = {"user": ["R"], "history": ["R", "T"], "ad": ["R", "C"]}
    tensors = parse_schema(SCHEMA).tensors
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64 if name.endswith("ids") else TensorProto.FLOAT, [*shapes[part], width])
        for name, (part, width) in tensors.items()
    ]
    heads = ["p_click", "p_conversion"] if conversion else ["p_click"]
    if conversion:
        nodes.append(helper.make_node("Mul", ["p_click", "p_click"], ["p_conversion"]))
    outputs = [helper.make_tensor_value_info(head, TensorProto.FLOAT, ["R", "C"]) for head in heads]
    graph = helper.make_graph(nodes, "test", inputs, outputs, constants)
    made: bytes = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10).SerializeToString()
    return made


def goldens(bias: float = 0.0) -> list[bundle.Golden]:
    """Requests with the probabilities that `expected` gives."""
    user: Features = {"age": "25", "interests": ["news"], "income": 10.0}
    unscored = [
        bundle.Golden("u1", user, {"slot": "feed"}, ["a2", "a3", "zz"], ["a1", "a2", "new"], ADS, []),
        bundle.Golden("u2", {}, {}, [], ["a5"], ADS, []),
    ]
    return [bundle.Golden(g.user_id, g.user, g.context, g.history, g.candidates, g.ads, _probabilities(g, bias)) for g in unscored]


def _probabilities(golden: bundle.Golden, bias: float) -> list[float]:
    return [float(p) for p in expected(golden.feeds(encoder()), bias)[0]]


def publish(
    models: Path, name: str = "din", bias: float = 0.0, files: Mapping[str, bytes] | None = None, make_current: bool = True
) -> Path:
    """Publish the bundle, some of its files replaced."""
    whole = {
        bundle.MODEL: model(bias),
        bundle.SCHEMA: SCHEMA.encode(),
        bundle.VOCABULARIES: vocabularies().to_json().encode(),
        bundle.GOLDENS: bundle.goldens_json(goldens(bias)),
        **(files or {}),
    }
    return bundle.publish(models, name, whole, {}, make_current)


def settled(models: object) -> dict[str, str]:
    """The setting of the default model, for the many tests that have several and do not care which it is."""
    names = [] if models is None else model_names(Path(str(models)))
    return {"model": "din"} if len(names) > 1 and "din" in names else {}


def loaded(settings: Settings) -> Models:
    """The live version of each model, as a service loads it."""
    with ThreadPoolExecutor(1) as opening:
        names = model_names(settings.models)
        loaded = {name: load_model(current_path(settings.models, name), settings, opening) for name in names}
        return Models(loaded, {}, settings.model or names[0])
