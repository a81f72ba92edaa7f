"""The comparison with other servers, on a small benchmark model: what is up ranks alike, and what is not installed is said."""

from collections.abc import Callable
from pathlib import Path

import pytest
from bench_models import built_once
from conftest import Server

from adrank_bench.load import LoadError
from benchmarks.peers import __main__ as peers
from benchmarks.service import INT8, OURS


def test_each_server_takes_its_turn_and_ranks_alike(
    servers: Callable[[str], Server], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "CANDIDATES", (20, 50))
    built = built_once("deepfm-20", tmp_path_factory)
    rows = peers.compare(built, servers("valkey").url.replace("/0", "/9"), {"fastapi": peers.python_of("fastapi")}, 1, 0.3, tmp_path)
    assert [(row.candidates, row.subject) for row in rows] == [
        (count, name) for count in (20, 50) for name in (OURS, INT8, "fastapi", peers.TUNED)
    ]
    assert all(row.errors == 0 and row.requests_per_s > 0 and 0 < row.p50 <= row.p99 for row in rows)
    assert all(row.adrank_is == 1 for row in rows if row.subject == OURS)
    peers.plot(rows, tmp_path / "peers.png")
    assert (tmp_path / "peers.png").read_bytes().startswith(b"\x89PNG")


def test_a_server_that_ranks_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = b'{"ads": [{"ad_id": "a", "p_click": 0.5}]}'
    monkeypatch.setattr(peers, "ask", lambda *_: (200, answer))
    subject = type("Up", (), {"target": type("At", (), {"request": staticmethod(bytes)})})
    scores = {"a": 0.5 + 2e-5}
    with pytest.raises(LoadError, match="does not rank as the others"):
        peers.check_alike("litserve", subject, b"", scores)  # type: ignore[arg-type]
    peers.check_alike(INT8, subject, b"", scores)  # type: ignore[arg-type]


def test_one_that_is_not_installed_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(peers, "ENVIRONMENTS", tmp_path)
    with pytest.raises(LoadError, match="bentoml is left out: there is none"):
        peers.python_of("bentoml")
