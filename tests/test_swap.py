"""Models that are swapped while they rank: under load, bad ones, by the command line, in several workers, and what becomes of the old."""

import asyncio
import contextlib
import json
import os
import re
import sys
import threading
import weakref
from dataclasses import replace

import bundles
import pytest
from conftest import running, until, until_ready
from processes import fill, serving

from features import bundle
from features.bundle import goldens_json, load_bundle
from features.encode import AdTable, Encoder, Request, encode_request
from features.schema import parse_schema
from features.state import Ad, UserState
from features.vocabulary import Vocabularies, Vocabulary, parse_vocabularies
from service.catalogue.catalogue import put_ads
from service.models import loaded as service_models
from service.models import watcher as reload
from service.ranking import scorer
from service.settings import Settings
from tests.test_bundle_places import external
from tests.test_cli import run
from tests.test_models import rewritten

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """A service in this process looks often."""
    monkeypatch.setattr(reload, "LOOK_SECONDS", 0.02)


CANDIDATES = ["a1", "a2", "a3", "a4", "a5", "a6", "a7"]
USERS = range(10)


def other_words(i):
    """Vocabularies in which every value of the genre has another id: the fingerprint differs, and so do the scores."""
    listed = {
        "age": ["25", "35"],
        "genre": [f"g{j}" for j in range(i)] + ["drama", "comedy", "news"],
        "slot": ["feed", "side"],
        "tags": ["x", "y"],
    }
    text = Vocabularies({name: Vocabulary(values) for name, values in listed.items()}, {}).to_json()
    return text.encode(), Encoder(parse_schema(bundles.SCHEMA), parse_vocabularies(text, parse_schema(bundles.SCHEMA)))


def publish(models, name="din", bias=0.0, words=0, make_current=True):
    """A version, and what it must answer each user, by version."""
    text, encoder = other_words(words)
    goldens = [
        replace(golden, p_click=[float(p) for p in bundles.expected(golden.feeds(encoder), bias)[0]]) for golden in bundles.goldens()
    ]
    path = bundles.publish(models, name, bias, {bundle.VOCABULARIES: text, bundle.GOLDENS: goldens_json(goldens)}, make_current)
    return path.name, by_hand(encoder, bias)


def by_hand(encoder, bias, ads=bundles.ADS):
    """What a version must answer each user of `processes.fill`."""
    table = AdTable(encoder)
    put_ads(table, [Ad(ad_id, features) for ad_id, features in ads.items()])
    answers = {}
    for i in USERS:
        request = Request(f"u{i}", {"age": ("25", "35")[i % 2], "income": float(i)}, {}, [f"a{i % 30}"], CANDIDATES)
        answers[f"u{i}"] = dict(zip(CANDIDATES, bundles.expected(encode_request(table, request)[0], bias)[0].tolist(), strict=True))
    return answers


async def version_of(client, **options):
    return (await client.rank("u1", CANDIDATES, **options))["model"]["version"]


async def until_version(client, version, seconds=20):
    async with asyncio.timeout(seconds):
        while await version_of(client) != version:
            await asyncio.sleep(0.02)


class Load:
    """Callers that ask all the time; every answer must be right for the version that it names."""

    def __init__(self, client, expected):
        self.client, self.expected, self.answers, self.versions = client, expected, 0, set()

    async def ask(self, user):
        while True:
            answer = await self.client.post("/rank", json={"user": {"id": user}, "candidates": CANDIDATES})
            assert answer.status_code == 200, answer.text
            ranking = answer.json()
            assert ranking["degraded"] == []
            version = ranking["model"]["version"]
            assert {ad["ad_id"]: ad["p_click"] for ad in ranking["ads"]} == pytest.approx(self.expected[version][user], abs=2e-6), version
            self.versions.add(version)
            self.answers += 1

    @contextlib.asynccontextmanager
    async def running(self):
        tasks = [asyncio.create_task(self.ask(f"u{i}")) for i in USERS]
        try:
            yield self
        finally:
            failed = [task.exception() for task in tasks if task.done()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert not failed, failed


async def test_versions_are_swapped_under_load_and_no_request_fails(tmp_path, server):
    models, workers = tmp_path / "models", 2
    await fill(server.url)
    expected = dict([publish(models)])
    async with serving(models, server.url, workers=workers, store_timeout_ms=5000) as client, Load(client, expected).running() as load:
        await until_all_have(client, *expected, workers)
        for bias, words in ((0.5, 0), (0.0, 2), (1.0, 3), (-0.5, 3)):
            version, answers = await asyncio.to_thread(prepared, models, bias, words)
            expected[version] = answers
            bundles.set_current(models, "din", int(version))
            await until_all_have(client, version, workers)
            before = load.answers
            await until_version(client, version)
            await until(lambda: load.answers >= before + 20)
        assert load.versions == expected.keys()
        text = (await client.get("/metrics")).text
        assert text.count("adrank_model_info{") == 1
        assert f'version="{version}"' in text
        assert re.findall(r'adrank_model_reload_total{result="loaded"} (.*)', text) == [str(5.0 * workers)]
        log = client.log.read_text()
        assert "Traceback" not in log
        assert "ERROR" not in log


async def until_all_have(client, version, workers):
    await until(lambda: len(re.findall(f"version {version} is loaded", client.log.read_text())) >= workers)


def prepared(models, bias, words):
    return publish(models, bias=bias, words=words, make_current=False)


async def test_promote_and_rollback_are_followed(tmp_path, ads):
    models = tmp_path / "models"
    first, _ = publish(models)
    async with running(Settings(models=models, redis="memory://"), ads) as client:
        assert await version_of(client) == first
        second, _ = publish(models, bias=1.0, make_current=False)
        for words, version in ((("promote",), second), (("rollback",), first), (("promote", "--version", second), second)):
            code, _, complaint = run(*words, "--models", models, "--name", "din")
            assert code == 0, complaint
            await until_version(client, version)
        assert (await client.get("/v1/models")).json()["refused"] == {}


def nobody_is_told(client, folder, *answers):
    """Neither where things lie nor what libraries say of them."""
    for word in (str(folder), "model.onnx", "goldens.json", "ONNXRuntimeError", "Errno", "Error("):
        assert word not in str(answers), word


def a_pipe(folder, file=bundle.MODEL):
    (folder / file).unlink()
    os.mkfifo(folder / file)


def damage(path):
    (path / bundle.MODEL).write_bytes(b"other")


def other_contract(path):
    manifest = json.loads((path / bundle.MANIFEST).read_text())
    (path / bundle.MANIFEST).write_text(json.dumps({**manifest, "fingerprint": "0" * 16}))


BAD = {
    "digest": ({}, damage, "damaged: a file of it is not what was published", "digest differs"),
    "file": ({}, lambda path: (path / bundle.GOLDENS).unlink(), "missing: ", "cannot be read"),
    "pipe": ({}, a_pipe, "not_a_file: ", "it is a pipe, not a file"),
    "fingerprint": ({}, other_contract, "other_contract: ", "made with feature contract 0000"),
    "goldens": ({bundle.MODEL: bundles.model(0.01)}, lambda path: None, "goldens: ", "golden 0 is off by"),
    "none": ({bundle.GOLDENS: b"[]"}, lambda path: None, "goldens: ", "has no request with candidates"),
    "graph": ({bundle.MODEL: b"nonsense"}, lambda path: None, "graph: its graph cannot be loaded", "cannot be loaded"),
    "outside": ({bundle.MODEL: external("w.bin", "initializer")}, lambda path: None, "external_data: ", "weights in w.bin"),
    "runtime": ({bundle.MODEL: rewritten(99, 18)}, lambda path: None, "onnxruntime: its graph needs a newer onnxruntime, an", "IR 99"),
    "whole": ({}, lambda path: path.rename(path.with_name("elsewhere")), "missing: ", "has no version"),
    "current": ({}, lambda path: path.with_name("current").write_text("latest"), "no_version: ", "does not name a version"),
    "piped current": ({}, lambda path: a_pipe(path.parent, "current"), "no_version: ", "it is a pipe, not a file"),
}


@pytest.mark.parametrize("kind", BAD)
async def test_a_bad_version_is_refused_and_the_old_one_stays(tmp_path, ads, caplog, kind):
    files, spoil, reason, detail = BAD[kind]
    models = tmp_path / "models"
    first, _ = publish(models)
    async with running(Settings(models=models, redis="memory://"), ads) as client:
        bad = bundles.publish(models, bias=0.0, files=files, make_current=False)
        spoil(bad)
        if "current" not in kind:
            bundles.set_current(models, "din", int(bad.name))
        report = await client.until("/readyz", lambda said: said["models"]["refused"])
        assert report["status"] == "degraded"
        assert report["models"]["refused"]["din"].startswith(reason)
        assert detail in caplog.text
        nobody_is_told(client, tmp_path, report, (await client.get("/v1/models")).text)
        assert report["models"]["refused"]["din"].endswith(f"; version {first} stays live")
        assert (await client.get("/v1/models")).json()["refused"] == report["models"]["refused"]
        await asyncio.sleep(0.1)  # time for more looks
        assert await version_of(client) == first
        assert await client.metric('adrank_model_reload_total{result="refused"}') == 1
        assert caplog.text.count("model din is refused") == 1
        assert "Traceback" not in caplog.text
        if "current" in kind:
            (models / "din" / "current").unlink()
        good, _ = publish(models)
        await until_version(client, good)
        assert (await until_ready(client, "ready"))["models"]["refused"] == {}


async def test_a_bad_version_is_tried_again_only_when_it_was_mended(tmp_path, ads, monkeypatch):
    tries = []
    load = reload.load_model
    monkeypatch.setattr(reload, "load_model", lambda path, *rest: tries.append(path.name) or load(path, *rest))
    models = tmp_path / "models"
    publish(models)
    async with running(Settings(models=models, redis="memory://"), ads) as client:
        second = bundles.publish(models, bias=1.0, make_current=False)
        whole = (second / bundle.MODEL).read_bytes()
        damage(second)
        bundles.set_current(models, "din", int(second.name))
        await until(lambda: second.name in tries)
        await asyncio.sleep(0.1)
        assert tries.count(second.name) == 1
        (second / bundle.MODEL).write_bytes(whole)
        await until_version(client, second.name)
        assert tries.count(second.name) == 2


async def test_what_nobody_foresaw_is_refused_too(tmp_path, ads, monkeypatch, caplog):
    models = tmp_path / "models"
    first, _ = publish(models)
    async with running(Settings(models=models, redis="memory://"), ads) as client:
        monkeypatch.setattr(reload, "load_model", lambda *_: 1 / 0)
        publish(models)
        await client.until("/readyz", lambda said: "unforeseen: " in said["models"]["refused"].get("din", ""))
        assert await version_of(client) == first
        assert caplog.text.count("failed in a way nobody foresaw") == 1
        assert "ZeroDivisionError" in caplog.text


async def test_models_come_and_go_and_the_default_stays(tmp_path, ads, caplog):
    models = tmp_path / "models"
    publish(models, "din")
    async with running(Settings(models=models, redis="memory://"), ads) as client:
        publish(models, "other", bias=1.0, words=3)
        await client.until("/readyz", lambda said: "other" in said["models"]["loaded"])
        assert (await client.rank(options={"model": "other"}))["model"]["name"] == "other"
        for name in ("other", "din"):
            (models / name / "current").unlink()
        gone = await client.until("/readyz", lambda said: "other" not in said["models"]["loaded"] and said["models"]["refused"])
        report = gone["models"]
        assert report["loaded"] == ["din"]
        assert "no live version any more" in report["refused"]["din"]
        assert (
            await client.post("/rank", json={"user": {"id": "u"}, "candidates": ["a1"], "options": {"model": "other"}})
        ).status_code == 404
        assert (await client.rank())["model"]["name"] == "din"
        models.rename(tmp_path / "gone")
        await asyncio.sleep(0.1)
        assert (await client.rank())["model"]["name"] == "din"
        assert caplog.text.count("has no live version any more") == 1


async def test_a_chosen_default_appears_later(tmp_path, ads):
    models = tmp_path / "models"
    publish(models, "other")
    async with running(Settings(models=models, redis="memory://", model="late"), ads, ready=False) as client:
        assert "model late is not usable" in (await client.get("/readyz")).json()["reasons"][0]
        assert (await client.post("/rank", json={"user": {"id": "u"}, "candidates": ["a1"]})).status_code == 503
        publish(models, "late", bias=1.0, words=2)
        await until_ready(client)
        assert (await client.rank())["model"]["name"] == "late"


async def test_changes_of_the_catalogue_during_a_swap_are_in_the_new_table(tmp_path, ads, monkeypatch):
    models = tmp_path / "models"
    publish(models)
    async with running(Settings(models=models, redis="memory://"), ads) as client:
        catalogue = client.app.state.service.ranker.catalogue
        fill, began, go_on = catalogue._fill, asyncio.Event(), asyncio.Event()

        async def filling(*arguments):
            began.set()
            await go_on.wait()
            await fill(*arguments)

        monkeypatch.setattr(catalogue, "_fill", filling)
        version, _ = publish(models, bias=1.0, words=2)
        async with asyncio.timeout(90):
            await began.wait()
        changed = {**bundles.ADS, "a1": {"genre": "news", "price": 5.0}}
        await ads.put_ads([Ad("a1", changed["a1"]), Ad("a2", {}, active=False)])
        await until(lambda: catalogue.ads == 29)
        go_on.set()
        await until_version(client, version)
        _, encoder = other_words(2)
        await ads.put_users([("u1", UserState({"age": "35", "income": 1.0}, ["a1"], [1]))])
        ranking = await client.rank("u1", CANDIDATES)
        answers = {ad["ad_id"]: ad["p_click"] for ad in ranking["ads"]}
        wanted = by_hand(encoder, 1.0, changed)["u1"]
        assert [ad["ad_id"] for ad in ranking["ads"] if not ad.get("known", True)] == ["a2"]
        assert {**answers, "a2": 0} == pytest.approx({**wanted, "a2": 0}, abs=2e-6)


async def test_a_request_on_its_way_ends_with_the_version_that_it_began_with(tmp_path, ads, monkeypatch):
    models = tmp_path / "models"
    first, _ = publish(models)
    async with running(Settings(models=models, redis="memory://"), ads) as client:
        arrived, go_on, get_user = asyncio.Event(), asyncio.Event(), ads.get_user

        async def slow(user_id):
            if user_id == "slow":
                arrived.set()
                await go_on.wait()
            return await get_user(user_id)

        monkeypatch.setattr(ads, "get_user", slow)
        asking = asyncio.create_task(client.rank("slow", CANDIDATES))
        await arrived.wait()
        second, _ = publish(models, bias=1.0, words=2)
        await until_version(client, second)
        catalogue = client.app.state.service.ranker.catalogue
        assert list(catalogue._ads.tables) == [load_bundle(models / "din" / second).fingerprint]
        go_on.set()
        assert (await asking)["model"]["version"] == first


@pytest.mark.parametrize("device", ["cpu", "cuda"])
async def test_nothing_of_an_old_version_stays(tmp_path, ads, device, monkeypatch):
    monkeypatch.setattr(scorer, "PROVIDERS", {**scorer.PROVIDERS, "cuda": "CPUExecutionProvider"})
    if device == "cuda":  # tiles and batches, on the processor
        tiled = scorer.TiledScorer
        monkeypatch.setattr(service_models, "TiledScorer", lambda path, _, length: tiled(path, "cpu", length))
    models, others = tmp_path / "models", set(threading.enumerate())  # such as those of a pool that another test has not let go of yet
    publish(models)
    async with running(Settings(models=models, redis="memory://", device=device, threads=1), ads) as client:
        await client.rank()
        ranker = client.app.state.service.ranker
        model = ranker.models.loaded["din"]
        old = [weakref.ref(model), weakref.ref(model.bundle), weakref.ref(model.bundle.encoder), weakref.ref(model.scorer)]
        old += [weakref.ref(ranker.catalogue.table(model.bundle.fingerprint))]
        threads = {thread for thread in threading.enumerate() if thread.name.startswith("score")} - others
        assert len(threads) == (device == "cuda")
        del model
        version, _ = publish(models, bias=1.0, words=2)
        await until_version(client, version)
        await until(lambda: not any(each() for each in old) and not any(thread.is_alive() for thread in threads))


async def test_the_thread_that_loads_gives_way_and_those_that_score_do_not(tmp_path, ads, monkeypatch):
    if sys.platform != "linux":
        pytest.skip("priorities of threads are Linux's")
    seen = {}
    load, made = reload.load_model, reload.load_model.__globals__["_open"]

    def noted(name, act):
        def acting(*arguments):
            seen[name] = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
            return act(*arguments)

        return acting

    monkeypatch.setitem(load.__globals__, "_open", noted("open", made))
    monkeypatch.setattr(reload, "load_model", noted("load", load))
    publish(tmp_path / "models")
    async with running(Settings(models=tmp_path / "models", redis="memory://"), ads):
        here = os.getpriority(os.PRIO_PROCESS, 0)
        assert seen == {"load": min(19, here + reload.NICE), "open": here}


async def test_a_repository_that_hangs_is_told_and_followed_again(tmp_path, ads, monkeypatch, caplog):
    monkeypatch.setattr(reload, "STUCK_SECONDS", 0.2)
    models, go_on, look = tmp_path / "models", threading.Event(), reload.look
    first, _ = publish(models)
    async with running(Settings(models=models, redis="memory://"), ads) as client:
        monkeypatch.setattr(reload, "look", lambda path: (go_on.wait(20), look(path))[1])
        try:
            report = await until_ready(client, "degraded")
            assert "reading the model repository has taken over 0.2 s" in report["reasons"][0]
            assert "has taken over 0.2 s" in (await client.get("/v1/models")).json()["notice"]
            assert await version_of(client) == first
            assert str(models) in caplog.text
            assert str(models) not in str(report)
        finally:
            go_on.set()
        second, _ = publish(models, bias=1.0)
        await until_version(client, second)
        await until_ready(client, "ready")
