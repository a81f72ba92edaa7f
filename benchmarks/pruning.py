"""What pruning a DeepLight makes of its exported graph: bytes and CPU time, one thread of ONNX Runtime, rounds interleaved.

26 fields of categories, 10 of them the ad's, an MLP of 400-400-400, weights at random: what it costs, not how good it is.

    python -m benchmarks.pruning --rounds 9
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from features.schema import parse_schema
from training.calibrate import Calibration
from training.export.export import ServedNetwork, random_feeds, score, to_onnx
from training.networks.contract import Fields
from training.networks.deeplight import DeepLight, DeepLightSettings

from .scoring import REQUESTS, rounds_of, scores_of

OURS, THEIRS, VALUES = 16, 10, 5_000
SCHEMA = parse_schema(
    'name = "wide"\n[user.user_id]\nkind = "category"\n[ad.ad_id]\nkind = "category"\n'
    + "".join(f'[context.c{i}]\nkind = "category"\n' for i in range(OURS - 1))
    + "".join(f'[ad.a{i}]\nkind = "category"\n' for i in range(THEIRS - 1))
)
CANDIDATES = 200
SHARES: dict[str, Sequence[float]] = {
    "whole": (0.0, 0.0, 0.0),
    "pairs": (0.9, 0.0, 0.0),
    "values": (0.0, 0.0, 0.4),
    "units": (0.0, 0.7, 0.0),
    "defaults": (0.9, 0.7, 0.4),
    "more": (0.95, 0.8, 0.9),
    "90 % of all": (0.9, 0.9, 0.9),
    "95 % of all": (0.95, 0.95, 0.95),
}
"""What is pruned of pairs, units and values."""


def served(pairs: float, units: float, values: float) -> tuple[ServedNetwork, dict[str, int]]:
    """A network of random weights at the end of its schedule, and its vocabularies' sizes."""
    torch.manual_seed(0)
    sizes = {field.vocabulary: VALUES + 2 for field in SCHEMA.fields}
    settings = DeepLightSettings(hidden=(400, 400, 400), dropout=0.0, prune_pairs=pairs, prune_units=units, prune_values=values)
    network = DeepLight(Fields(SCHEMA.layouts, sizes), settings)
    with torch.no_grad():
        network.second.table.weight[1:].normal_(std=0.1)
    network.after_step(network.settles_after)
    return ServedNetwork(network.eval(), Calibration(), SCHEMA).eval(), sizes


@click.command()
@click.option("--rounds", type=click.IntRange(min=3), default=9, show_default=True)
def main(rounds: int) -> None:
    """Size and cost of a pruned graph beside the whole one."""
    graphs: dict[str, Any] = {}
    measured = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, shares in SHARES.items():
            network, sizes = served(*shares)
            path = Path(folder) / f"{name}.onnx"
            path.write_bytes(to_onnx(network))
            feeds = [random_feeds(SCHEMA, sizes, 1, 1, CANDIDATES, seed) for seed in range(REQUESTS)]
            run = scores_of(path)
            off = max(float(np.abs(run(one) - score(network, one)).max()) for one in feeds)
            graphs[name], measured[name] = (run, feeds), (path.stat().st_size, off)
        seconds = rounds_of(graphs, rounds)
    table = Table("graph", "pairs", "units", "values", "MB", "of whole", f"us a request of {CANDIDATES}", "of whole", "off torch")
    for name, shares in SHARES.items():
        size, off = measured[name]
        cells = [f"{size / 1e6:.2f}", f"{size / measured['whole'][0]:.0%}", f"{1e6 * np.median(seconds[name]):,.0f}"]
        ratio = np.median(seconds[name] / seconds["whole"])
        table.add_row(name, *(f"{share:.0%}" for share in shares), *cells, f"{ratio:.0%}", f"{off:.1e}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
