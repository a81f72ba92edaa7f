import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.test_datasets import ROOT, movielens_source, refuses
from training.datasets import movielens
from training.datasets.prepared import DataError, by_order, open_prepared, writing


def test_splits_by_order_are_whole_and_as_the_protocol_counts_them() -> None:
    assert {split: len(rows) for split, rows in by_order(1_000_209).items()} == {"train": 800_167, "valid": 100_021, "test": 100_021}
    assert [list(part) for part in by_order(5, [0.2, 0.4, 0.4]).values()] == [[0], [1, 2], [3, 4]]


@given(st.integers(0, 10_000))
def test_splits_by_order_take_every_row_once(count: int) -> None:
    assert [row for part in by_order(count).values() for row in part] == list(range(count))


def test_a_folder_that_holds_something_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(DataError, match="already exists"), writing(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "precious"]
    with pytest.raises(DataError, match="is not UTF-8"), writing(tmp_path / os.fsdecode(b"\xff")):
        pass


@pytest.mark.parametrize(("mask", "mode"), [(0o077, 0o700), (0o022, 0o755)])
def test_a_data_set_is_open_to_nobody_whom_the_umask_shuts_out(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        with writing(tmp_path / "out"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == mode


def test_a_path_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    for out in (Path("/proc/none/out"), tmp_path / ("x" * 300)):
        with pytest.raises(DataError, match="cannot write"), writing(out):
            pass


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), pl.exceptions.ComputeError("No space left on device")])
def test_a_full_disk_is_a_sentence_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    written: list[Path] = []

    def fill(_frame: pl.DataFrame, path: Path) -> None:
        if len(written) == 3:
            raise error
        path.touch()
        written.append(path)

    monkeypatch.setattr(pl.DataFrame, "write_parquet", fill)
    refuses(movielens.prepare, movielens_source(tmp_path), tmp_path / "out", "No space left on device; nothing was written")
    assert len(written) == 3


def test_a_write_that_the_system_cuts_short_leaves_nothing(tmp_path: Path) -> None:
    source, out = movielens_source(tmp_path), tmp_path / "out"
    program = (
        "import resource, signal, sys; from pathlib import Path; from training.datasets import movielens\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))\n"
        "movielens.prepare(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    done = subprocess.run([sys.executable, "-c", program, source, out], cwd=ROOT, capture_output=True, text=True, check=False)
    assert re.search(r"DataError: cannot write .*File too large.*; nothing was written\n$", done.stderr)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_folder_that_is_no_data_set_is_called_what_it_seems_to_be(tmp_path: Path) -> None:
    version = tmp_path / "models" / "din" / "1"
    version.mkdir(parents=True)
    (version / "schema.toml").write_text('name = "s"\n[ad.ad_id]\nkind = "category"\n')
    for folder, message in {
        "none": "there is no such folder",
        "models": "it has no schema.toml",
        "models/din": "but 1 in it has one",
    }.items():
        with pytest.raises(DataError, match=rf"{folder} is not a prepared data set: .*{message}.*adrank prepare makes one"):
            open_prepared(tmp_path / folder)
    (version / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match="this seems to be a model"):
        open_prepared(version.parent)
    with pytest.raises(DataError, match="not a prepared data set but a bundle"):
        open_prepared(version)
