"""CTR networks, one family a file, made of blocks. A new network is a file and a line here."""

from typing import Any

from .bst import BST
from .contract import Fields, Network
from .dcn import DCN
from .dcn_v2 import DCNV2
from .deep_crossing import DeepCrossing
from .deepfm import DeepFM
from .deeplight import DeepLight
from .dien import DIEN
from .din import DIN
from .dkt import DKT
from .dlrm import DLRM
from .esmm import ESMM
from .ffm import FFM
from .finalmlp import FinalMLP
from .fm import FM
from .fnn import FNN
from .fwfm import FwFM
from .heads import SharedEmbeddings
from .lr import LR
from .mf import MF
from .mmoe import MMoE
from .pnn import IPNN, OPNN
from .tab_transformer import TabTransformer
from .two_tower import TwoTower
from .vae_cf import VAECF
from .wide_deep import WideDeep
from .youtube_dnn import YoutubeDNN

NETWORKS: dict[str, type[Network]] = {
    "lr": LR,
    "fm": FM,
    "ffm": FFM,
    "fwfm": FwFM,
    "mf": MF,
    "fnn": FNN,
    "ipnn": IPNN,
    "opnn": OPNN,
    "wide_deep": WideDeep,
    "deepfm": DeepFM,
    "deeplight": DeepLight,
    "deep_crossing": DeepCrossing,
    "dcn": DCN,
    "dcn_v2": DCNV2,
    "dlrm": DLRM,
    "tab_transformer": TabTransformer,
    "finalmlp": FinalMLP,
    "youtube_dnn": YoutubeDNN,
    "din": DIN,
    "dien": DIEN,
    "bst": BST,
    "dkt": DKT,
    "two_tower": TwoTower,
    "vae_cf": VAECF,
    "esmm": ESMM,
    "mmoe": MMoE,
}


def build(family: str, fields: Fields, settings: Any) -> Network:
    """A network for the fields and heads of a data set.

    Raises:
        ValueError: it cannot be built for them; the message says why.
    """
    kind = NETWORKS[family]
    return kind(fields, settings) if kind.many_heads or len(fields.heads) == 1 else SharedEmbeddings(kind, fields, settings)
