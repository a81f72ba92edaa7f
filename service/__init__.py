"""The online road: a request becomes a ranking."""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # ONNX Runtime tells its maker of each session, unless it is told not to
