import re
from functools import partial
from pathlib import Path

import pytest
from conftest import free_port

import demo
from training.world import make_world, write_log


def test_the_demo_prints_a_ranking_beside_the_truth(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "make_world", partial(make_world, users=40, ads=30))
    monkeypatch.setattr(demo, "write_log", partial(write_log, impressions=3_000))
    monkeypatch.setenv("COLUMNS", "120")
    demo.run(tmp_path, free_port(), once=True)
    printed = capfd.readouterr().out
    assert re.search(r"What user u\d+ clicked last", printed)
    ranked = re.findall(r"(\d+) +│ (a\d+) +│ (\w+) +│ (0\.\d{3}) +│ (0\.\d{3})", printed)
    assert [int(rank) for rank, *_ in ranked] == list(range(1, 13))
    shown = [float(p) for *_, p, _ in ranked]
    assert shown == sorted(shown, reverse=True)
    assert re.search(r"din \d{14} ranked 12 ads in \d+\.\d ms", printed)
    assert "curl" not in printed
