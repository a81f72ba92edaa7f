"""The workflows are valid, safe, and run what they say."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import adrank

ROOT = Path(__file__).parent.parent
WORKFLOWS = ROOT / ".github" / "workflows"
NAMES = ["ci.yml", "retrain.yml"]
BIN = Path(sys.executable).parent


def is_valid(path: Path) -> "subprocess.CompletedProcess[str]":
    command = [BIN / "check-jsonschema", "--builtin-schema", "vendor.github-workflows", path]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def is_safe(path: Path) -> "subprocess.CompletedProcess[str]":
    command = [BIN / "zizmor", "--offline", "--no-progress", "--persona", "auditor", path]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def jobs(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((WORKFLOWS / name).read_text())["jobs"])


def test_every_workflow_is_tested() -> None:
    assert sorted(path.name for path in WORKFLOWS.iterdir()) == NAMES


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("check", [is_valid, is_safe])
def test_a_workflow_passes(check: Callable[[Path], Any], name: str) -> None:
    done = check(WORKFLOWS / name)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("check", "before", "after", "complaint"),
    [
        (is_valid, "runs-on:", "run-on:", "is not valid under any of the given schemas"),
        (is_safe, "actions/checkout@8e8c483db84b4bee98b60c0593521ed34d9990e8 # v6.0.1", "actions/checkout@v6", "unpinned-uses"),
        (is_safe, '--models "$MODELS"', '--models "${{ inputs.name }}"', "template-injection"),
        (is_safe, "persist-credentials: false", "persist-credentials: true", "artipacked"),
        (is_safe, "contents: read", "contents: write", "excessive-permissions"),
    ],
)
def test_a_workflow_that_is_not_right_is_found(
    tmp_path: Path, check: Callable[[Path], Any], before: str, after: str, complaint: str
) -> None:
    text = (WORKFLOWS / "retrain.yml").read_text()
    assert before in text
    (tmp_path / ".github" / "workflows").mkdir(parents=True)
    path = tmp_path / ".github" / "workflows" / "retrain.yml"
    path.write_text(text.replace(before, after))
    done = check(path)
    assert done.returncode != 0
    assert complaint in done.stdout + done.stderr


def test_ci_runs_what_ci_runs() -> None:
    [job] = jobs("ci.yml").values()
    assert [step["run"] for step in job["steps"] if "run" in step][-1] == ".ci/run"
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def retrain(folder: Path, code: int, **more: str) -> tuple[int, list[str]]:
    """Run the workflow's step with programs that only note how they were called."""
    [job] = jobs("retrain.yml").values()
    [script] = [step["run"] for step in job["steps"] if step.get("name") == "Retrain"]
    (folder / ".venv" / "bin").mkdir(parents=True)
    for name, ending in (("adrank", code), ("python", 0)):
        program = folder / ".venv" / "bin" / name
        program.write_text(f'#!/bin/sh\nprintf "%s\\n" {name} "$@" >> called\nexit {ending}\n')
        program.chmod(0o755)
    variables = {"MODELS": "models", "NAME": "din", "DAYS": "14", "START": "warm", "GATE": "better", "LOG": "", **more}
    done = subprocess.run(["bash", "-e", "-c", script], cwd=folder, env={**os.environ, **variables}, check=False)
    return done.returncode, (folder / "called").read_text().splitlines()


@pytest.mark.parametrize("code", [0, 3])
def test_the_retrain_job_ends_as_the_command_does(tmp_path: Path, code: int) -> None:
    ended, called = retrain(tmp_path, code, LOG="/mnt/the log")
    assert ended == code
    assert called[:2] == ["adrank", "retrain"]
    options = adrank.cli.commands["retrain"].make_context("retrain", called[2:]).params
    given = {name: options[name] for name in ("log", "models", "name", "days", "start", "gate", "report")}
    assert given == {
        "log": Path("/mnt/the log"),
        "models": Path("models"),
        "name": "din",
        "days": 14,
        "start": "warm",
        "gate": "better",
        "report": Path("report"),
    }


def test_without_a_log_the_retrain_job_makes_a_world(tmp_path: Path) -> None:
    _, called = retrain(tmp_path, 0)
    assert called[:6] == ["python", "-m", "training.simulation", "data/world", "adrank", "retrain"]
    options = adrank.cli.commands["retrain"].make_context("retrain", called[6:]).params
    assert (options["log"], options["days"], options["epochs"]) == (Path("data/world"), None, 4)


def test_the_report_is_kept_whatever_came_of_it() -> None:
    [job] = jobs("retrain.yml").values()
    [keep] = [step for step in job["steps"] if step.get("uses", "").startswith("actions/upload-artifact@")]
    assert keep["if"] == "always()"
    assert keep["with"]["path"] == "report"
    assert not any("continue-on-error" in step for step in job["steps"])
