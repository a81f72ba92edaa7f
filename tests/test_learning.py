"""Vocabularies learned file by file, the counts of many values on disk."""

import tempfile
from pathlib import Path

import polars as pl
import pytest
import small

from training.datasets import prepared, vocabularies
from training.datasets.prepared import DataError, Prepared
from training.datasets.vocabularies import Counts, learn_vocabularies
from training.tenure import Tenure


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepared:
    monkeypatch.setattr(prepared, "ROWS_PER_FILE", 70)
    return small.data_set(tmp_path)


def test_a_large_file_is_read_in_pieces(data: Prepared) -> None:
    frames = list(data.frames("train"))
    assert [len(frame) for frame in frames] == [70, 70, 70, 70, 20]
    assert pl.concat(frames).equals(pl.read_parquet(data.files("train")[0]))


def test_what_is_counted_on_disk_is_what_is_counted_in_memory(data: Prepared, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = learn_vocabularies(data)
    before = Tenure(1), Tenure(1)
    later = learn_vocabularies(data, whole, before[0])
    (tmp_path / "counts").mkdir()
    monkeypatch.setattr(vocabularies, "HELD", 4)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "counts"))
    assert learn_vocabularies(data).to_json() == whole.to_json()
    assert learn_vocabularies(data, whole, before[1]).to_json() == later.to_json()
    assert before[0] == before[1]
    assert not list((tmp_path / "counts").iterdir())


def test_values_are_counted_over_many_files_of_which_some_are_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabularies, "HELD", 30)
    counts, expected = Counts(), dict[str, int]()
    for file in range(12):
        some = {f"v{value}": value + file for value in range(file, file + 9)}
        counts.add(pl.DataFrame({"value": list(some), "count": pl.Series(list(some.values()), dtype=pl.UInt32)}))
        expected = {value: expected.get(value, 0) + some.get(value, 0) for value in expected | some}
    assert counts.folder is not None
    parts = list(counts.totals())
    assert len(parts) > 4
    found = pl.concat(parts)
    assert dict(zip(found["value"], found["count"], strict=True)) == expected
    assert len(found) == len(expected)


def test_no_room_to_count_is_a_sentence(data: Prepared, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(vocabularies, "HELD", 4)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    with pytest.raises(DataError, match=r"^cannot count values in .*/absent: .*; make room there, or set TMPDIR to another folder$"):
        learn_vocabularies(data)
