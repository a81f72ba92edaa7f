"""CTR networks, one family a file, made of blocks. A new network is a file, and a line in `families.py`."""

from importlib import import_module
from typing import Any

from ..families import CLASSES
from .contract import Fields, Network
from .heads import SharedEmbeddings


def _class(name: str) -> type[Network]:
    file, _, kind = CLASSES[name].partition(".")
    found: type[Network] = getattr(import_module(f".{file}", __name__), kind)
    return found


NETWORKS = {name: _class(name) for name in CLASSES}


def build(family: str, fields: Fields, settings: Any) -> Network:
    """A network for the fields and heads of a data set.

    Raises:
        ValueError: it cannot be built for them; the message says why.
    """
    kind = NETWORKS[family]
    return kind(fields, settings) if kind.many_heads or len(fields.heads) == 1 else SharedEmbeddings(kind, fields, settings)
