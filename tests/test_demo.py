import contextlib
import json
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import redis
from conftest import free_port
from processes import ended
from test_cli import run

import adrank
from adrank_demo import demo, loop
from training.simulation import make_world, write_log

pytestmark = pytest.mark.usefixtures("traced_export")


def make_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A demo of a small world, whose training hides nothing: see `small.quick`."""
    for module in (demo, loop):
        monkeypatch.setattr(module, "make_world", partial(make_world, users=40, ads=30))
        monkeypatch.setattr(module, "NETWORKS", {name: {**given, "unknown_rate": "0"} for name, given in demo.NETWORKS.items()})
    monkeypatch.setattr(demo, "write_log", partial(write_log, impressions=3_000))


def ran(line: str) -> tuple[int, str]:
    """What comes of a printed line, run in this process, whose exporter is the quick one: another would take seconds to begin."""
    program, *words = shlex.split(line)
    assert Path(program).resolve() == Path(sys.executable).with_name("adrank").resolve()
    code, out, complaint = run(*words)
    return code, out + complaint


def test_the_demo_prints_a_ranking_beside_the_truth_and_a_loop_that_runs_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    make_small(monkeypatch)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(demo, "VISITS", 300)
    monkeypatch.setattr(demo, "LEARNING", {**demo.LEARNING, "unknown_rate": "0"})
    pages, ended, told = [], set(), {}

    def run_what_is_printed() -> None:
        """While the demo stays up: what a person would copy from its page and run."""
        pages.append(capfd.readouterr().out)
        printed = pages[0].splitlines()
        (curl,) = (line for line in printed if line.startswith("curl "))
        assert len(json.loads(subprocess.run(curl, shell=True, check=True, capture_output=True).stdout)["ads"]) == demo.CANDIDATES
        for line in (line for line in printed if line.split(" ")[0].endswith("/adrank")):
            code, output = ran(line)
            ended.add(line.split()[1])
            assert code in ((0, 3) if "retrain" in line else (0,)), line + output
        url = curl.split()[2].removesuffix("/rank")
        monkeypatch.setattr(demo, "stage", lambda *_given, quiet: contextlib.nullcontext((None, url)))
        code, printed, complaint = run("-q", "demo", "--once", "--json", "--dir", tmp_path)
        assert (code, complaint) == (0, "")
        told.update(json.loads(printed))
        raise KeyboardInterrupt

    pause = time.sleep
    monkeypatch.setattr(demo.time, "sleep", lambda seconds: run_what_is_printed() if seconds > 1000 else pause(seconds))
    demo.run(tmp_path, free_port(), once=False)
    assert ended == {"demo", "join", "skew", "retrain"}
    assert list((tmp_path / "models" / "din" / "reports").iterdir())
    assert re.search(r"What user u\d+ clicked last", pages[0])
    ranked = re.findall(r"(\d+) +│ (a\d+) +│ (\w+) +│ (0\.\d{3}) +│ (0\.\d{3})", pages[0])
    assert [int(rank) for rank, *_ in ranked] == list(range(1, 13))
    shown = [float(p) for *_, p, _ in ranked]
    assert shown == sorted(shown, reverse=True)
    again = [ad["ad_id"] for ad in told["answer"]["ads"]]  # in another order perhaps: the loop has learned meanwhile
    assert dict(zip(again, (f"{p:.3f}" for p in told["true_p_click"]), strict=True)) == {ad: truth for _, ad, *_, truth in ranked}
    assert re.search(r"din \d{14} ranked 12 ads in \d+\.\d ms", pages[0])


def test_ctrl_c_is_a_word_and_exit_code_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed(*_given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", pressed)
    assert run("demo", "--once") == (130, "", "\nInterrupted.\n")


def test_visits_without_a_demo_are_refused_with_a_sentence(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        adrank.main(["demo", "--visits", "3", "--port", str(free_port())])
    assert stopped.value.code == 2
    assert "no demo answers on port" in capfd.readouterr().err


def test_the_embedded_redis_keeps_what_it_holds_and_stops_when_told(tmp_path: Path) -> None:
    port, folder = free_port(), tmp_path / "redis"
    command = [sys.executable, "-m", "adrank", "redis", "--port", str(port), "--dir", str(folder)]
    for held in (None, b"1"):
        with ended(subprocess.Popen(command, stdout=subprocess.PIPE, text=True)) as process:
            assert process.stdout
            url = process.stdout.readline().split()[0]
            assert url == f"redis://127.0.0.1:{port}/0"
            with redis.Redis.from_url(url) as client:
                assert client.get("kept") == held
                client.set("kept", 1)
                assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
            if held is None:
                taken = subprocess.run([*command[:-1], str(tmp_path / "other")], check=False, capture_output=True, text=True, timeout=60)
                assert taken.returncode == 2
                assert f"Redis cannot be started on port {port}" in taken.stderr
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
    assert folder.stat().st_mode & 0o077 == 0


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
