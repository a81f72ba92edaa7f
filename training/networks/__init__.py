"""CTR networks, one family a file, made of blocks. A new network is a file and a line here."""

from .contract import Network
from .dcn import DCN
from .dcn_v2 import DCNV2
from .deepfm import DeepFM
from .din import DIN
from .ffm import FFM
from .fm import FM
from .fwfm import FwFM
from .lr import LR

NETWORKS: dict[str, type[Network]] = {
    "lr": LR,
    "fm": FM,
    "ffm": FFM,
    "fwfm": FwFM,
    "deepfm": DeepFM,
    "dcn": DCN,
    "dcn_v2": DCNV2,
    "din": DIN,
}
