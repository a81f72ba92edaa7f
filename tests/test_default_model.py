"""Which model ranks requests that name none: never the first by name, and no other one without a word."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys

import bundles
import pytest
from conftest import free_port, running, until, until_ready
from processes import ROOT, serving, workers_of

from service.models import watcher as reload
from service.models.default_model import FILE, DefaultModel
from service.settings import Settings
from tests.test_cli import refused, run

pytestmark = pytest.mark.anyio
BOTH = "2 models are live (aa, din), and which one is for requests that name none is not set; set ADRANK_MODEL, or --model"


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(reload, "LOOK_SECONDS", 0.02)


async def loaded(client, *names):
    await client.until("/readyz", lambda said: said["models"]["loaded"] == sorted(names))


class TestRunning:
    async def test_a_new_name_is_never_the_default_by_itself(self, tmp_path, ads, caplog):
        bundles.publish(tmp_path, "din")
        async with running(Settings(models=tmp_path, redis="memory://"), ads, settle=False) as client:
            bundles.publish(tmp_path, "aa", bias=1.0)
            await loaded(client, "aa", "din")
            assert (await client.rank())["model"]["name"] == "din"
            report = (await client.get("/readyz")).json()
            assert (report["status"], report["models"]["default"]) == ("ready", "din")
            models = (await client.get("/v1/models")).json()
            assert models["default"] == "din"
            assert [(model["name"], model["default"]) for model in models["models"]] == [("aa", False), ("din", True)]
            said = "aa and din are live, and ADRANK_MODEL is not set: requests that name no model stay with din"
            assert said in report["models"]["notice"] == models["notice"]
            assert caplog.text.count(said) == 1
            assert (await client.rank(options={"model": "aa"}))["model"]["name"] == "aa"

    async def test_a_start_with_two_is_unready_until_one_goes(self, tmp_path, ads):
        bundles.publish(tmp_path, "din")
        other = bundles.publish(tmp_path, "aa")
        async with running(Settings(models=tmp_path, redis="memory://"), ads, ready=False, settle=False) as client:
            await loaded(client, "aa", "din")
            answer = await client.get("/readyz")
            assert answer.status_code == 503
            assert BOTH in answer.json()["reasons"][0]
            refusal = await client.post("/rank", json={"user": {"id": "u"}, "candidates": ["a1"]})
            assert refusal.status_code == 503
            assert "name one in options.model: aa, din" in refusal.json()["detail"]
            assert (await client.rank(options={"model": "aa"}))["model"]["name"] == "aa"
            (other.parent / "current").unlink()
            await until_ready(client)
            assert (await client.rank())["model"]["name"] == "din"

    async def test_a_default_that_is_damaged_is_not_replaced_by_another(self, tmp_path, ads):
        path = bundles.publish(tmp_path, "din")
        (path / "model.onnx").write_bytes(b"other")
        async with running(Settings(models=tmp_path, redis="memory://"), ads, ready=False, settle=False) as client:
            bundles.publish(tmp_path, "aa")
            await loaded(client, "aa")
            assert "model din is not usable" in (await client.get("/readyz")).json()["reasons"][0]


class TestCommands:
    def test_a_start_with_two_and_none_set_is_refused(self, tmp_path):
        for name in ("din", "aa"):
            bundles.publish(tmp_path, name)
        for workers in (1, 2):
            words = ("--models", tmp_path, "--redis", "memory://", "--port", free_port(), "--workers", workers)
            refused(run("serve", *words), re.escape(BOTH))

    def test_the_doctor_knows(self, tmp_path, monkeypatch):
        for name in ("din", "aa"):
            bundles.publish(tmp_path, name)
        code, out, _ = run("doctor", "--models", tmp_path, "--redis", "memory://", "--port", free_port(), "--json")
        findings = {each["check"]: each for each in json.loads(out)["findings"] if each["status"] == "problem"}
        assert (code, BOTH.partition("; ")[0]) == (11, findings["repository"]["said"])
        assert findings["repository"]["fix"] == "set ADRANK_MODEL, or --model"
        monkeypatch.setenv("ADRANK_MODEL", "aa")
        assert run("doctor", "--models", tmp_path, "--redis", "memory://", "--port", free_port())[0] == 0

    def test_a_new_log_takes_no_schema_by_the_order_of_names(self, tmp_path, shared_server, monkeypatch):
        for name in ("din", "aa"):
            bundles.publish(tmp_path / "models", name)
        words = ("join", "--models", tmp_path / "models", "--log", tmp_path / "log", "--redis", shared_server.url, "--once")
        refused(run(*words), r"2 models are live in .*models \(aa, din\), and a new log takes the schema of one; name it with --name")
        monkeypatch.setenv("ADRANK_MODEL", "din")
        assert run(*words)[0] == 0


async def test_a_worker_that_is_replaced_goes_on_with_the_default_of_the_others(tmp_path, server):
    models = tmp_path / "models"
    bundles.publish(models, "din")
    async with serving(models, server.url, workers=2) as client:
        bundles.publish(models, "aa", bias=1.0)
        await until(lambda: client.log.read_text().count("model aa version") >= 2)
        os.kill(workers_of(client)[0], signal.SIGKILL)
        await until(lambda: client.log.read_text().count("model aa version") >= 3)
        await asyncio.sleep(1)
        for _ in range(20):
            async with type(client)(base_url=client.base_url) as fresh:
                assert (await fresh.rank())["model"]["name"] == "din"


class TestChoice:
    def test_of_workers_the_first_to_choose_chooses_for_all(self, tmp_path):
        one, other = DefaultModel(None, tmp_path), DefaultModel(None, tmp_path)
        one.saw(["din"], [])
        other.saw(["aa"], [])
        assert (one.name, other.name, (tmp_path / FILE).read_text()) == ("din", "din", "din")

    def test_what_never_came_to_be_is_forgotten(self, tmp_path):
        choice = DefaultModel(None, tmp_path)
        choice.saw(["din"], [])
        choice.saw(["din", "aa"], ["aa"])
        assert choice.name == "din"
        choice.saw(["aa"], ["aa"])
        assert choice.name == "aa"

    def test_what_is_loaded_stays_when_it_is_gone(self):
        choice = DefaultModel(None, None)
        choice.saw(["din"], [])
        choice.saw(["aa"], ["aa", "din"])
        assert choice.name == "din"

    def test_a_folder_that_cannot_be_written_is_said(self, tmp_path, caplog):
        choice = DefaultModel(None, tmp_path / "none")
        choice.saw(["din"], [])
        assert choice.name == "din"
        assert "cannot be noted" in caplog.text


def test_the_command_line_s_process_needs_no_numpy_for_it(tmp_path):
    code = "import sys, features.repository; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
