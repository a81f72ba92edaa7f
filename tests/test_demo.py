import re
import socket
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


def test_a_folder_that_no_demo_made_is_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "models" / "mine"
    mine.mkdir(parents=True)
    with pytest.raises(demo.DemoError, match="is not a folder that a demo made"):
        demo.run(tmp_path, free_port(), once=True)
    assert mine.is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


def test_a_port_in_use_is_told_before_the_training(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(demo.DemoError, match="cannot listen on"):
        demo.run(tmp_path / "new", taken.getsockname()[1], once=True)
    assert not (tmp_path / "new").exists()
