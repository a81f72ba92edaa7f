"""Writes docs/reference.md: every setting, option and key that adrank takes, from the code that takes them. `make reference` runs it."""

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel

from features.counters import Counter
from features.schema import Field
from service.api.event_wire import OneOf
from service.api.wire import RankRequest
from service.settings import PREFIX, Settings
from training.datasets.table_settings import TableSettings
from training.networks import NETWORKS
from training.retrain.compare import Gate
from training.retrain.data_checks import Enough, Limits
from training.train_settings import TrainSettings

PAGE = Path(__file__).with_name("reference.md")
HEAD = """# Reference

Every setting, option and key that adrank takes. Made from the code by `make reference`; a test fails where it has fallen behind.
[data.md](data.md) says how to write a schema, [log.md](log.md) what the log holds, and `/docs` of a running service every answer.
"""


class UndescribedError(ValueError):
    """Something that can be set says nothing about itself."""


def described(kind: type) -> dict[str, str]:
    """The attributes of a class that a text stands below, and these texts.

    Raises:
        UndescribedError: an attribute of a dataclass has none.
    """
    texts: dict[str, str] = {}
    for each in reversed([base for base in kind.__mro__ if dataclasses.is_dataclass(base)]):
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
        statements = body.body if isinstance(body, ast.ClassDef) else []
        for one, then in pairwise(statements):
            if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name) and isinstance(then, ast.Expr):
                texts[one.target.id] = ast.literal_eval(then.value)
    missing = [field.name for field in dataclasses.fields(kind) if field.name not in texts]
    if missing:
        raise UndescribedError(f"{kind.__module__}.{kind.__name__}: say below {', '.join(missing)} what it is")
    return texts


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    lines = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in [list(head), *map(list, rows)]]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(" ".join(cell.split()) for cell in line) + " |" for line in lines) + "\n"


def shown(value: object) -> str:
    """A default, as it is written where it is set."""
    if value is None or value == "":
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`{'-'.join(map(str, value))}`" if all(isinstance(part, int) for part in value) else f"`{list(value)}`"
    return f"`{value}`"


def allowed(schema: Mapping[str, Any]) -> str:
    """What a JSON schema allows, in words."""
    kinds = [kind for kind in schema.get("anyOf", [schema]) if kind.get("type") != "null"]
    if len(kinds) != 1:
        return ""
    kind = kinds[0]
    if "enum" in kind:
        return ", ".join(f"`{value}`" for value in kind["enum"])
    if "const" in kind:
        return f"`{kind['const']}`"
    least, most = kind.get("minimum", kind.get("exclusiveMinimum")), kind.get("maximum", kind.get("exclusiveMaximum"))
    bounds = [f"{'above' if 'exclusiveMinimum' in kind else 'at least'} {least:,}"] if least is not None else []
    bounds += [f"{'below' if 'exclusiveMaximum' in kind else 'at most'} {most:,}"] if most is not None else []
    names = {"integer": "a whole number", "number": "a number", "boolean": "`true`, `false`", "string": "a text", "array": "a list"}
    names |= {"object": "an object"}
    return " ".join(filter(None, [names.get(kind.get("type", ""), ""), ", ".join(bounds)]))


def of_model(kind: type[BaseModel], prefix: str = "") -> str:
    """The table of a pydantic model's fields; with a prefix they are variables.

    Raises:
        UndescribedError: a field has no text below it.
    """
    properties, rows = kind.model_json_schema()["properties"], []
    for key, field in kind.model_fields.items():
        if not field.description:
            raise UndescribedError(f"{kind.__module__}.{kind.__name__}: say below {key} what it is")
        name, default = prefix + (key.upper() if prefix else key), field.get_default(call_default_factory=True)
        is_object = isinstance(default, BaseModel | dict)
        rows.append(
            (f"`{name}`", _default(field.is_required(), None if is_object else default), allowed(properties[key]), field.description)
        )
    return table(("name", "default", "may be", ""), rows)


def of_dataclass(kind: type) -> str:
    """The table of a dataclass' fields."""
    texts, rows = described(kind), []
    for field in dataclasses.fields(kind):
        made = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        rows.append((f"`{field.name}`", _default(made is dataclasses.MISSING, made), texts[field.name]))
    return table(("name", "default", ""), rows)


def _default(required: bool, value: object) -> str:
    return "required" if required else shown(value)


def page() -> str:
    """The whole page."""
    parts = [
        HEAD,
        "## The service: `adrank serve`, and what other commands take of it\n",
        "Variables; `adrank serve --help` lists those that are flags too. A flag counts before its variable.\n",
        of_model(Settings, PREFIX),
        "## Training: `--set NAME=VALUE` of `adrank train` and `adrank retrain`\n",
        of_dataclass(TrainSettings),
    ]
    for name, network in NETWORKS.items():
        parts += [f"### Of the network `{name}`\n", of_dataclass(network.settings)]
    parts += [
        "### What a version has to come up to, before it goes live\n",
        of_dataclass(Gate),
        "Of the rows that it learns from and is judged by, `adrank train` asks:\n",
        of_dataclass(Enough),
        "and `adrank retrain` of a window of the log:\n",
        of_dataclass(Limits),
        "## A schema's fields: `[user.NAME]`, `[context.NAME]`, `[ad.NAME]`\n",
        "`name` and `side` are those of the table's head. [data.md](data.md) has examples.\n",
        of_dataclass(Field),
        "### What is counted: `[counter.NAME]`\n",
        of_dataclass(Counter),
        "### Where a table holds them: `[table]`, for `adrank prepare csv`\n",
        of_dataclass(TableSettings),
        "## `POST /rank`\n",
        *_models(nested(RankRequest)),
        "## `POST /v1/events`\n",
        '`{"events": [...]}`, each of one of these types:\n',
        *_models((f"`{_only_value(kind, 'type')}`", kind) for _, kind in models_in(OneOf)),
    ]
    return "\n".join(parts)


def models_in(annotation: Any) -> Iterator[tuple[str, type[BaseModel]]]:
    """The models that a value of an annotation may be, each with `[]` where it is an element of a list."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        yield "", annotation
    parts = get_args(annotation)
    for part in parts[:1] if get_origin(annotation) is Annotated else parts:
        yield from ((("[]" if get_origin(annotation) is list else "") + suffix, kind) for suffix, kind in models_in(part))


def nested(kind: type[BaseModel], path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """A model and all models in it, each with its title: where in the document it stands and, of several policies, which it is."""
    policy = _only_value(kind, "policy")
    yield " ".join(filter(None, [path and f"`{path}`", policy and f"of the policy `{policy}`"])), kind
    for name, field in kind.model_fields.items():
        for suffix, inner in models_in(field.annotation):
            yield from nested(inner, f"{path}.{name}{suffix}".removeprefix("."))


def _only_value(kind: type[BaseModel], name: str) -> str | None:
    """The one value that a field of a model may have, None where there is no such field or there are several."""
    annotation = kind.model_fields[name].annotation if name in kind.model_fields else None
    values = get_args(annotation) if get_origin(annotation) is Literal else ()
    return values[0] if len(values) == 1 else None


def _models(titled: Iterable[tuple[str, type[BaseModel]]]) -> list[str]:
    pages = []
    for title, kind in titled:
        pages += [*([f"### {title}\n"] if title else []), " ".join((inspect.getdoc(kind) or "").split()) + "\n", of_model(kind)]
    return pages


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
