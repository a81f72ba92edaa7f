"""The benchmark models, small, each exported once for all tests: torch takes up to half a minute of a processor for one."""

import os
from dataclasses import replace

import pytest

from benchmarks import scoring
from benchmarks.benchmark_models import BenchmarkModel, Built, build
from features.files import exclusive
from training.networks.deepfm import DeepFMSettings
from training.networks.din import DINSettings

NARROW: dict[str, DINSettings | DeepFMSettings] = {
    "din-100": DINSettings(embedding=4, attention=(10, 6), hidden=(16, 8), dropout=0.0),
    "deepfm-20": DeepFMSettings(embedding=4, hidden=(16, 16, 16), dropout=0.0),
    "din-sdim": DINSettings(embedding=4, attention=(10, 6), hidden=(16, 8), dropout=0.0, long="sdim"),
}


def small(name: str) -> BenchmarkModel:
    """A benchmark model in all but its widths and numbers."""
    whole = scoring.SCORED[name]()
    sizes = {vocabulary: min(size, 300) for vocabulary, size in whole.population.sizes.items()}
    return replace(whole, settings=NARROW[name], population=replace(whole.population, sizes=sizes))


def built_once(name: str, factory: pytest.TempPathFactory) -> Built:
    """A small benchmark model, built by the first of pytest's workers that asks for it."""
    folder = factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "bench"
    folder.mkdir(exist_ok=True)
    with exclusive(folder / f"{name}.lock", 600):
        return build(small(name), folder)
