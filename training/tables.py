"""Large tables, which lie in files of their own beside the ONNX files that gather from them. Knows nothing about ONNX.

ONNX Runtime maps such a file, so that all workers of a machine have one copy in memory; what lies in an ONNX file, which ends at 2 GiB,
it copies for each. A table that is large is served as it was trained: nothing that is fused with it would be equal to it, and lie in a
bundle once for serving and once for the training that goes on.
"""

import hashlib
from typing import Any

import numpy as np
from torch import Tensor

LARGE = 3 * 2**24
"""Bytes from which on a table has a file, such as a million rows of 16 numbers: below that a copy a worker is no matter, and a bundle of
one file less is easier to look at."""

Table = np.ndarray[Any, np.dtype[np.float32]]


def is_large(table: Tensor | Table) -> bool:
    """Whether it is to have a file of its own."""
    return table.nbytes >= LARGE


def file_of(table: Table) -> str:
    """The name of a table's file, by what it holds: graphs that gather from equal tables share one."""
    return f"table-{hashlib.sha256(table.data).hexdigest()[:16]}.bin"
