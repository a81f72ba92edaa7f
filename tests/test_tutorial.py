"""docs/tutorial.md, whose commands are run as they stand, but for the ports and torch's exporter, which would take half a minute."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import small
from conftest import free_port
from processes import PATIENCE, ended
from test_cli import run

import adrank

PAGE = Path(adrank.__file__).parent / "docs" / "tutorial.md"
COMMANDS = 10


def shell(block: str) -> str:
    return subprocess.run(["bash", "-ec", block], check=True, stdout=subprocess.PIPE, text=True, timeout=PATIENCE).stdout


def best(answer: str) -> dict[str, Any]:
    return json.loads(answer)["ads"][0]


def wait(port: str, process: "subprocess.Popen[bytes]") -> None:
    for _ in range(10 * PATIENCE):
        with socket.socket() as probe:
            if not probe.connect_ex(("127.0.0.1", int(port))):
                return
        assert process.poll() is None
        time.sleep(0.1)
    raise AssertionError(f"nothing listens on {port}")


@pytest.fixture
def blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The commands, with ports of their own, in a folder of their own."""
    for place, quick in (("export.to_onnx", small.traced), ("explain.request_graph", small.traced_request)):
        monkeypatch.setattr(f"training.export.{place}", quick)
    port, of_redis = str(free_port()), str(free_port())
    (folder := tmp_path / "a folder").mkdir()  # with a blank, which is nothing special to anybody
    monkeypatch.chdir(folder)
    monkeypatch.setenv("ADRANK_PORT", port)
    monkeypatch.setenv("ADRANK_REDIS", f"redis://127.0.0.1:{of_redis}/0")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    text = (
        PAGE.read_text().replace("127.0.0.1:8000/rank", f"127.0.0.1:{port}/rank").replace("Adrank()", f'Adrank("http://127.0.0.1:{port}")')
    )
    return re.findall(r"^```sh\n(.*?)^```$", text.replace("adrank redis", f"adrank redis --port {of_redis}"), re.MULTILINE | re.DOTALL)


def test_the_commands_of_the_page_serve_explain_and_retrain_a_model(blocks: list[str]) -> None:
    assert len(blocks) == 1 + COMMANDS
    answers = list[str]()
    with ExitStack() as running:
        for block in blocks:
            if block.endswith("&\n"):
                process = running.enter_context(ended(subprocess.Popen(shlex.split(block)[:-1])))
                wait(block.split()[3] if "redis" in block else os.environ["ADRANK_PORT"], process)
            elif block.startswith("adrank "):
                code, printed, complaint = run(*shlex.split(block)[1:])
                assert code == 0, block + printed + complaint
            else:
                answers.append(shell(block))
        [asked] = (block for block in blocks if block.startswith("curl "))
        before = best(answers[1])
        assert before["ad_id"] == "a3"
        assert {"user.user_id*ad.category", "rest"} <= before["contributions"].keys()
        until = time.monotonic() + PATIENCE
        while best(shell(asked))["ad_id"] != "a4":
            assert time.monotonic() < until
            time.sleep(0.2)
    assert len(list(Path("models/deepfm").glob("*/report.html"))) == 2
