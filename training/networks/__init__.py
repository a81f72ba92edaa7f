"""CTR networks, one family a file, made of `blocks.py`. A new network is a file and a line here."""

from .deepfm import DeepFM
from .din import DIN

NETWORKS: dict[str, type[DeepFM] | type[DIN]] = {"deepfm": DeepFM, "din": DIN}
