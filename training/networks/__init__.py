"""CTR networks, one family a file, made of blocks. A new network is a file and a line here."""

from .contract import Network
from .deepfm import DeepFM
from .din import DIN

NETWORKS: dict[str, type[Network]] = {"deepfm": DeepFM, "din": DIN}
