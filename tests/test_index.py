"""The index of rows does what a dict does, while ids come in any number and order."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features import index as module
from features.index import AdIds, RowIndex


@pytest.mark.parametrize(("slots", "spread"), [(1, 4), (4, 2), (1_024, 4)])
def test_it_is_a_dict_of_rows(slots: int, spread: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLOTS", slots)

    @settings(max_examples=100)
    @given(st.lists(st.lists(st.text(max_size=2), max_size=12), max_size=12), st.lists(st.text(max_size=2)))
    def check(batches: list[list[str]], asked: list[str]) -> None:
        index, rows = AdIds() if spread == 4 else RowIndex(144, spread), dict[str, int]()
        if isinstance(index, AdIds):
            index.expected = 20
        for batch in batches:
            for each in batch:
                rows.setdefault(each, len(rows) + 1)
            assert index.add(batch).tolist() == [rows[each] for each in batch]
            index.add(batch)[:] = 0  # who asked may write into what it got
            assert index.rows(batch).tolist() == index.add(batch).tolist() == [rows[each] for each in batch]
            batch.append("one more")
            assert index.rows(batch).tolist() == [rows.get(each, 0) for each in batch]
            assert len(index) == len(rows)
            assert index.rows(asked).tolist() == [rows.get(each, 0) for each in asked]
            assert index.rows(asked).dtype == np.int64

    check()


def test_a_hundred_thousand_ids() -> None:
    index = AdIds()
    for start in range(0, 100_000, 700):
        index.add([f"ad{i}" for i in range(start, min(start + 700, 100_000))])
    assert index.rows([f"ad{i}" for i in range(100_000)]).tolist() == list(range(1, 100_001))
    assert not index.rows([f"no{i}" for i in range(100_000)]).any()
