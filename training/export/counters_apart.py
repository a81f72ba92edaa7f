"""Counters taken out of what a graph makes of ads alone: they change with every event, and the rest of an ad does not.

What a first layer or a sum over fields makes of an ad is a sum of what its other features make and of a polynomial of its counters, of
degree 2 at most and without products of two. That is found by asking the graph, not by reading it, and then tried.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, ValueInfoProto, helper, numpy_helper
from onnxruntime import InferenceSession

from features.vocabulary import PADDING, UNKNOWN, Numbers

NUMBERS = "ad_numbers"
TRIED, EXACT = 64, 1e-5
"""Ads that the polynomial is tried on, and how far it may be off, of the largest value or of 1, whichever is more."""
ROUNDING = 1e-6
"""How large squares may seem, of what is linear, and the other way round."""
NARROW = 32
"""Up to so many numbers an ad, those that are no counters are multiplied by 0: to leave them out takes longer."""
Effect = Mapping[str, Numbers]
"""By value of ads what counters and their squares `(2n,)` add to it: `(2n, ...)`."""


def effect_of(ads: InferenceSession, width: int, counters: Sequence[int]) -> Effect | None:
    """What these columns of `ad_numbers`, which has so many, do in a graph of ads; None where it is no such polynomial."""
    n, sides, random = len(counters), [entry.name for entry in ads.get_outputs()], np.random.default_rng(1)
    alone = np.zeros((1 + 2 * n, width), np.float32)
    alone[1 + np.arange(n), counters], alone[1 + n + np.arange(n), counters] = 1.0, -1.0
    effect = {}
    for name, values in zip(sides, _run(ads, sides, np.full(len(alone), PADDING), alone), strict=True):
        base, more, less = values[0], values[1 : 1 + n], values[1 + n :]
        effect[name] = np.concatenate([(more - less) / 2, (more + less) / 2 - base])
    numbers, ids = random.normal(size=(TRIED, width)).astype(np.float32), random.choice([PADDING, UNKNOWN], TRIED)
    told = numbers.copy()
    told[:, counters] = 0.0
    counted = numbers[:, counters]
    for name, whole, rest in zip(sides, _run(ads, sides, ids, numbers), _run(ads, sides, ids, told), strict=True):
        made = rest + np.tensordot(np.hstack([counted, counted**2]), effect[name], 1)
        if not np.abs(made - whole).max() <= EXACT * max(1.0, np.abs(whole).max()):
            return None
    return effect


def _run(ads: InferenceSession, sides: Sequence[str], ids: Any, numbers: Numbers) -> list[Numbers]:
    """The values of ads `(A, ...)`, each of whose ids is the same."""
    widths = {entry.name: entry.shape[2] for entry in ads.get_inputs()}
    feeds = {name: np.repeat(ids[:, None], width, 1)[None] for name, width in widths.items() if name != NUMBERS}
    return [values[0] for values in ads.run(sides, {**feeds, NUMBERS: numbers[None]})]


def without_counters(ads: ModelProto, counters: Sequence[int]) -> ModelProto:
    """The graph of ads to which all counters are 0."""
    numbers = next(entry for entry in ads.graph.input if entry.name == NUMBERS)
    told = np.ones(numbers.type.tensor_type.shape.dim[2].dim_value, np.float32)
    told[list(counters)] = 0.0
    for node in ads.graph.node:
        node.input[:] = [f"{NUMBERS}_told" if name == NUMBERS else name for name in node.input]
    ads.graph.node.insert(0, helper.make_node("Mul", [NUMBERS, f"{NUMBERS}_are_told"], [f"{NUMBERS}_told"]))
    ads.graph.initializer.append(numpy_helper.from_array(told, f"{NUMBERS}_are_told"))
    return ads


def with_counters(rest: ModelProto, numbers: ValueInfoProto, counters: Sequence[int], effect: Effect) -> ModelProto:
    """The rest, which adds to the values of its candidates what their counters do."""
    held: dict[str, np.ndarray[Any, Any]] = {}
    nodes, columns, width = [], list(counters), numbers.type.tensor_type.shape.dim[2].dim_value
    powers = {"counters": NUMBERS, "counters_squared": "counters_squared", "counters_twice": "counters_twice"}
    if width > NARROW:
        held["counter_columns"], width, columns = np.array(counters, np.int64), len(counters), list(range(len(counters)))
        nodes.append(helper.make_node("Gather", [NUMBERS, "counter_columns"], ["counters"], axis=2))
        powers["counters"] = "counters"
    for node in rest.graph.node:
        node.input[:] = [f"{name.removesuffix('_of_candidates')}_now" if name.endswith("_of_candidates") else name for name in node.input]
    gathers, terms = len(effect), {name: _terms(made) for name, made in effect.items()}
    if {*terms.values()} - {"counters"}:
        nodes.append(helper.make_node("Mul", [powers["counters"], powers["counters"]], ["counters_squared"]))
    if "counters_twice" in terms.values():
        nodes.append(helper.make_node("Concat", [powers["counters"], "counters_squared"], ["counters_twice"], axis=2))
    for name, made in effect.items():
        by, counted = f"{name}_by_counters", f"{name}_counted"
        halves = np.zeros((2, width, int(np.prod(made.shape[1:]))), np.float32)
        halves[:, columns] = made.reshape(2, len(counters), -1)
        held[by] = {"counters": halves[0], "counters_squared": halves[1], "counters_twice": np.concatenate(halves)}[terms[name]]
        nodes.append(helper.make_node("MatMul", [powers[terms[name]], by], [counted]))
        if made.ndim != 2:
            held[f"{name}_shape"] = np.array([0, 0, *made.shape[1:]], np.int64)
            nodes.append(helper.make_node("Reshape", [counted, f"{name}_shape"], [counted := f"{name}_shaped"]))
        nodes.append(helper.make_node("Add", [f"{name}_of_candidates", counted], [f"{name}_now"]))
    rest.graph.initializer.extend(numpy_helper.from_array(values, name) for name, values in held.items())
    whole = [*list(rest.graph.node)[:gathers], *nodes, *list(rest.graph.node)[gathers:]]
    del rest.graph.node[:]
    rest.graph.node.extend(whole)
    rest.graph.input.append(numbers)
    return rest


def _terms(made: Numbers) -> str:
    """What a value is made of: of the counters, of their squares, or of both."""
    first, second = (np.abs(half).max() for half in np.split(made, 2))
    return "counters" if second <= ROUNDING * first else "counters_squared" if first <= ROUNDING * second else "counters_twice"
