"""Encoded rows on disk: the same as in memory, made once, anew when damaged or of something else, and nothing where there is no room."""

import os
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import small
import torch

from features.encode import Block, Encoder
from tests.test_ages import SCHEMA as WITH_AGES
from tests.test_ages import data_set as with_ages
from tests.test_checkpoint import Killed, KilledAfter, state, trained
from tests.test_cli import QUICK, refused, run
from training.checkpoint import Checkpoint, CheckpointError
from training.datasets.columns import FACTS
from training.datasets.distinct import DistinctAds
from training.datasets.encoded import Rows, encode_split
from training.datasets.memory import CACHE, GB, PART, Memory
from training.datasets.prepared import DataError, Prepared
from training.datasets.vocabularies import learn_vocabularies
from training.fit import deterministic, fit_network, predict
from training.train_settings import TrainError, TrainSettings

NONE = Memory(1e-9)
"""No split fits into it."""


@pytest.fixture
def data(tmp_path: Path) -> Prepared:
    return small.data_set(tmp_path, (2200, 100, 100))


def arrays(rows: Rows) -> dict[str, np.ndarray[Any, Any]]:
    blocks = {name: getattr(rows, name) for name in ("user", "ad", "behaviours", "catalogue")}
    found = {f"{name}.{part}": getattr(block, part) for name, block in blocks.items() for part in ("ids", "numbers")}
    found |= {name: getattr(rows, name) for name in ("labels", "users", "history", "weight", "ages")} | dict(rows.outcomes)
    return {name: values for name, values in found.items() if values is not None}


def check_same(one: Rows, other: Rows) -> None:
    before, after = arrays(one), arrays(other)
    assert before.keys() == after.keys()
    for name, values in before.items():
        assert values.dtype == after[name].dtype
        assert np.array_equal(values, after[name], equal_nan=values.dtype.kind == "f"), name


def on_disk(data: Prepared, split: str = "train", memory: Memory = NONE, encoder: Encoder | None = None) -> Rows:
    return encode_split(replace(data, memory=memory), split, encoder or small.encoder())


def entries(data: Prepared) -> dict[str, int]:
    """The folders of columns, and when each was made."""
    return {path.name: path.stat().st_ino for path in (data.folder / CACHE).iterdir() if path.is_dir()}


@pytest.mark.parametrize("kind", ["usual", "ages", "heads"])
def test_columns_on_disk_are_those_in_memory(tmp_path: Path, kind: str) -> None:
    data = with_ages(tmp_path) if kind == "ages" else small.data_set(tmp_path)
    encoder, heads = small.encoder(WITH_AGES if kind == "ages" else small.SCHEMA), ("click", "conversion")[: 1 + (kind == "heads")]
    if kind == "heads":
        (path,) = data.files("train")
        more = {"conversion": pl.Series([None, 0, 1] * 100, dtype=pl.Int8), "weight": pl.Series([0.0, 1.0, 2.5] * 100)}
        pl.read_parquet(path).with_columns(**more).write_parquet(path)
    held, stored = (encode_split(replace(data, memory=memory), "train", encoder, heads) for memory in (Memory(), NONE))
    assert held.mapped is None
    assert stored.mapped is not None
    assert not stored.ad.ids.flags.writeable
    check_same(held, stored)
    assert {"weight", "conversion"} <= arrays(stored).keys() or kind != "heads"
    assert "ages" in arrays(stored) or kind != "ages"
    some = np.array([5, 0, 77, 5])
    check_same(held.take(some), stored.take(some))
    for (_, here), (_, there) in zip(held.batch(some).parts().items(), stored.batch(some).parts().items(), strict=True):
        assert torch.equal(here.ids, there.ids)
        assert torch.equal(here.numbers, there.numbers)


def test_a_training_from_disk_is_that_of_the_same_order_in_memory(data: Prepared) -> None:
    stored, held = on_disk(data), encode_split(data, "train", small.encoder())
    settings = TrainSettings(epochs=2, batch=64, threads=1, flat_below=0, shuffle_rows=1024, unknown_rate=0.0)
    ends = []
    for rows in (stored, replace(held, mapped=stored.mapped), held):
        with deterministic(settings):
            network = small.network("deepfm")
            fit_network(network, rows, encode_split(data, "valid", small.encoder()), settings, small.quiet())
        ends.append([value.numpy().tobytes() for value in network.state_dict().values()])
    assert ends[0] == ends[1]
    assert ends[0] != ends[2]  # that one mixes all rows
    assert np.array_equal(predict(network, stored), predict(network, held))


def test_a_training_from_disk_that_was_killed_ends_as_one_that_was_not(data: Prepared, tmp_path: Path) -> None:
    size = on_disk(data).mapped.size / GB  # type: ignore[union-attr]
    data = replace(data, memory=Memory(0.4 * PART * size))
    settings = {"flat_below": 0, "shuffle_rows": 1024, "epochs": 2}
    whole = trained(data, "deepfm", None, settings)
    with pytest.raises(Killed):
        trained(data, "deepfm", KilledAfter(tmp_path / "at", 55), settings)  # 16 steps a pool, 35 an epoch: in a later pool of the second
    resumed = trained(data, "deepfm", Checkpoint(tmp_path / "at", resume=True), settings)
    assert state(resumed) == state(whole)
    with pytest.raises(CheckpointError, match="its data is another"):  # in memory the order is another
        trained(replace(data, memory=Memory()), "deepfm", Checkpoint(tmp_path / "at", resume=True), settings)
    with pytest.raises(TrainError, match=r"^2,200 rows that are mixed at once take .* GB of .* GB; say --set shuffle_rows= with fewer"):
        trained(data, "deepfm", None, settings | {"shuffle_rows": 2200})


def test_columns_are_made_once_and_anew_for_other_data_and_other_vocabularies(data: Prepared) -> None:
    first = on_disk(data)
    made = entries(data)
    check_same(on_disk(data), first)
    assert entries(data) == made
    on_disk(data, "test")
    assert entries(data).items() > made.items()
    other = Encoder(small.schema(), learn_vocabularies(data))
    check_same(on_disk(data, encoder=other), encode_split(data, "train", other))
    assert [name.partition("-")[0] for name in sorted(entries(data))] == ["test", "train"]  # the one before made room
    (path,) = data.files("train")
    pl.read_parquet(path).head(1000).write_parquet(path)
    assert len(on_disk(data)) == 1000
    assert len(first) == 2200  # whoever reads what is gone goes on
    assert first.labels.sum() > 0
    pl.read_parquet(data.folder / "ads.parquet").with_columns(pl.col("ad.price") + 1).write_parquet(data.folder / "ads.parquet")
    check_same(on_disk(data), encode_split(data, "train", small.encoder()))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


@pytest.mark.parametrize(
    ("name", "damage"),
    [("ad.ids", cut), ("labels", flip), ("history", Path.unlink), (FACTS, cut), (FACTS, lambda path: path.write_text("[1]"))],
)
def test_damaged_columns_are_made_anew(
    data: Prepared, caplog: pytest.LogCaptureFixture, name: str, damage: Callable[[Path], object]
) -> None:
    whole = arrays(on_disk(data))
    kept = {column: values.copy() for column, values in whole.items()}
    (folder,) = (data.folder / CACHE).glob("train-*")
    damage(folder / name)
    (data.folder / CACHE / ".train-left-by-one-that-was-killed").mkdir()
    again = arrays(on_disk(data))
    assert all(np.array_equal(kept[column], again[column]) for column in kept)
    assert f"{folder} is damaged" in caplog.text
    assert [path.name for path in (data.folder / CACHE).iterdir() if path.is_dir()] == [folder.name]
    caplog.clear()
    on_disk(data)
    assert not caplog.text


def test_a_disk_that_is_full_is_a_sentence_and_leaves_nothing(data: Prepared, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(DataError, match=r"^cannot write .*/train-.*: File too large; nothing was written$"):
            on_disk(data)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (data.folder / CACHE).iterdir()] == [".lock"]
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot write .*/file: File exists; name another folder with --cache DIR"):
        on_disk(data, memory=Memory(1e-9, tmp_path / "file"))


def test_the_command_keeps_rows_where_it_is_told(data: Prepared, tmp_path: Path) -> None:
    words = ["train", "--data", data.folder, "--model", "deepfm", "--models", tmp_path / "models", "--memory", "0.00001"]
    refused(run(*words, "--cache", tmp_path / "cache", *QUICK), r"2,200 rows that are mixed at once take .* GB of 1e-05 GB; say --set")
    assert not (data.folder / CACHE).exists()
    assert {path.name.partition("-")[0] for path in (tmp_path / "cache").iterdir()} == {".lock", "train", "valid"}
    refused(run(*words, "--cache", data.files("train")[0]), "is a file")


def test_ads_that_differ_are_each_once_and_of_very_many_some_at_random() -> None:
    random = np.random.default_rng(1)
    ids, numbers = random.integers(0, 12, (3000, 3)).astype(np.uint8), random.random((3000, 1)).astype(np.float32)
    for most in (2**26, 1000):  # the second keeps 1,000 bytes of 7 each
        ads = DistinctAds(most)
        for start in range(0, 3000, 100):
            ads.add(Block(ids[start : start + 100], numbers[start : start + 100]))
        found, (all_ids, first) = ads.block(), np.unique(ids, axis=0, return_index=True)
        at = {tuple(each): numbers[i, 0] for each, i in zip(all_ids.tolist(), first, strict=True)}
        assert [at[tuple(each)] for each in found.ids.tolist()] == found.numbers[:, 0].tolist()
        assert len(found) == len(all_ids) if most > 1000 else len(found) == 1000 // 7
        assert found.ids.dtype == np.int64
        assert np.abs(found.ids.mean(0) - 5.5).max() < 1.2  # of 142 at random the mean is within 0.3, three times in four
