"""CTR networks, one family a file, made of blocks. A new network is a file and a line here."""

from importlib import import_module
from typing import Any

from .contract import Fields, Network
from .heads import SharedEmbeddings

CLASSES = {
    "lr": "lr.LR",
    "fm": "fm.FM",
    "ffm": "ffm.FFM",
    "fwfm": "fwfm.FwFM",
    "mf": "mf.MF",
    "fnn": "fnn.FNN",
    "ipnn": "pnn.IPNN",
    "opnn": "pnn.OPNN",
    "wide_deep": "wide_deep.WideDeep",
    "deepfm": "deepfm.DeepFM",
    "deeplight": "deeplight.DeepLight",
    "deep_crossing": "deep_crossing.DeepCrossing",
    "dcn": "dcn.DCN",
    "dcn_v2": "dcn_v2.DCNV2",
    "dlrm": "dlrm.DLRM",
    "tab_transformer": "tab_transformer.TabTransformer",
    "finalmlp": "finalmlp.FinalMLP",
    "youtube_dnn": "youtube_dnn.YoutubeDNN",
    "din": "din.DIN",
    "dien": "dien.DIEN",
    "bst": "bst.BST",
    "dkt": "dkt.DKT",
    "two_tower": "two_tower.TwoTower",
    "vae_cf": "vae_cf.VAECF",
    "esmm": "esmm.ESMM",
    "mmoe": "mmoe.MMoE",
}
"""The file and the class of each network, by what `--model` calls it."""


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
