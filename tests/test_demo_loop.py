import json
import subprocess
import sys
from pathlib import Path

import joining
import pytest
from conftest import free_port
from test_demo import make_small

import adrank
from adrank_demo import loop as demo_loop
from service.settings import Settings
from training.datasets.log import open_log

pytestmark = pytest.mark.usefixtures("traced_export")


def test_users_visit_click_and_are_learned_from(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop with rounds of seconds, whose retraining only looks: that of minutes is measured, and retraining has its own tests."""
    make_small(monkeypatch)
    monkeypatch.setattr(demo_loop, "ROUND_SECONDS", 2.5)
    monkeypatch.setattr(demo_loop, "WINDOW_SECONDS", 0.5)
    monkeypatch.setattr(demo_loop, "LATENESS_SECONDS", 0.2)
    monkeypatch.setattr(demo_loop, "_retrain", lambda *_: subprocess.Popen([sys.executable, "-c", f"exit({demo_loop.REFUSED})"]))
    monkeypatch.setenv("COLUMNS", "200")
    demo_loop.run(tmp_path, free_port(), rounds=3, as_json=True)
    told = json.loads(capfd.readouterr().out)
    assert told == json.loads((tmp_path / "loop.json").read_text())
    assert told["failed_requests"] == 0
    rounds = told["rounds"]
    assert [result["retrain"] for result in rounds] == ["", "refused", "refused"]
    for result in rounds:
        assert all(result["shown"][arm] > 0 for arm in demo_loop.ARMS)
        assert 0 < result["frozen"] < result["oracle"] < 1
    assert len(open_log(tmp_path / "log").files("train")) > 0
    rows = joining.rows(tmp_path / "log")
    assert set(rows["model"].unique()) == {"din", "frozen"}
    assert {policy.partition(" ")[0] for policy in rows["policy"].unique()} == {"greedy", "plackett_luce"}
    # Clicks of the newest rankings are still on their way, how many on a busy machine nobody knows; the oracle's are of no ranking.
    clicks = sum(result["clicks"][arm] for result in rounds for arm in ("retrained", "exploring", "frozen"))
    assert 0 < rows["label"].sum() <= clicks


def test_a_joiner_that_does_not_start_is_not_waited_for_longer_than_a_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for code, seconds, told in (("import time; time.sleep(30)", 0.2, "did not start within 0.2 s"), ("exit(1)", 30, "the joiner ended")):
        monkeypatch.setattr(demo_loop, "START_SECONDS", seconds)
        monkeypatch.setattr(demo_loop, "_adrank", lambda *_, code=code: [sys.executable, "-c", code])
        with pytest.raises(demo_loop.DemoError, match=told), demo_loop._joiner(Settings(models=tmp_path), tmp_path):
            pass


def test_once_and_loop_are_two_things() -> None:
    with pytest.raises(SystemExit) as stopped:
        adrank.main(["demo", "--once", "--loop"])
    assert stopped.value.code == 2
