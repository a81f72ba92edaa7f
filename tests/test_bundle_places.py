"""A bundle is its files: it may be copied, linked, renamed and mounted, and what is no file there is never waited for."""

import json
import os
import shutil
import socket
import threading
from pathlib import Path
from typing import Any

import bundles
import pytest
from onnx import ModelProto, TensorProto, helper

from features import bundle, files
from features.bundle import BundleError, check_files, current_path, load_bundle, locked, read_bundle
from features.challenger import CHALLENGER, VERDICT, Challenger, read_challenger, read_decision
from features.graph_file import GraphFileError, graph_facts
from features.releases import promote, rollback
from service.settings import Settings
from tests.test_cli import refused, run

FILES = [bundle.MODEL, bundle.SCHEMA, bundle.VOCABULARIES, bundle.GOLDENS]


def hard_linked(source: Path, there: Path) -> None:
    there.mkdir(parents=True)
    for file in source.iterdir():
        os.link(file, there / file.name)


def with_linked_files(source: Path, there: Path) -> None:
    there.mkdir(parents=True)
    for file in source.iterdir():
        (there / file.name).symlink_to(file)


def mounted(source: Path, there: Path) -> None:
    """As Kubernetes mounts a ConfigMap: every file is a link into `..data`, which is one to a folder with the time in its name."""
    there.mkdir(parents=True)
    shutil.copytree(source, there / "..2026_11_28_13_00_00.123")
    (there / "..data").symlink_to("..2026_11_28_13_00_00.123")
    for file in source.iterdir():
        (there / file.name).symlink_to(Path("..data") / file.name)


def linked(source: Path, there: Path) -> None:
    there.parent.mkdir(parents=True)
    there.symlink_to(source)


WAYS = [shutil.copytree, hard_linked, linked, with_linked_files, mounted]


class TestPlaces:
    @pytest.mark.parametrize("way", WAYS)
    def test_a_bundle_is_as_good_where_it_was_brought_to(self, tmp_path: Path, way: Any) -> None:
        source = bundles.publish(tmp_path / "elsewhere", "din")
        models = tmp_path / "models"
        way(source, models / "ctr" / "7")
        assert promote(models, "ctr") == 7
        loaded = load_bundle(current_path(models, "ctr"))
        assert (loaded.name, loaded.version) == ("ctr", 7)
        assert {name: model.facts()["version"] for name, model in bundles.loaded(Settings(models=models)).loaded.items()} == {"ctr": "7"}
        (models / "ctr" / "8").symlink_to(source)
        assert promote(models, "ctr") == 8
        assert rollback(models, "ctr") == 7

    def test_a_model_s_folder_may_be_renamed_and_linked_to(self, tmp_path: Path) -> None:
        path = bundles.publish(tmp_path, "din")
        path.parent.rename(tmp_path / "ctr")
        (tmp_path / "alias").symlink_to("ctr")
        for name in ("ctr", "alias"):
            loaded = load_bundle(current_path(tmp_path, name))
            assert (loaded.name, loaded.version) == (name, int(path.name))
        (tmp_path / "linked").symlink_to(tmp_path, target_is_directory=True)
        assert load_bundle(current_path(tmp_path / "linked", "ctr")).name == "ctr"

    def test_where_it_does_not_lie_in_a_repository_it_is_what_it_was_published_as(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = bundles.publish(tmp_path / "models", "din")
        shutil.copytree(source, tmp_path / "the newest")
        loaded = load_bundle(tmp_path / "the newest")
        assert (loaded.name, loaded.version) == ("din", int(source.name))
        monkeypatch.chdir(source)
        assert load_bundle(Path()).name == "din"
        manifest = tmp_path / "the newest" / bundle.MANIFEST
        manifest.write_text(json.dumps({"files": json.loads(manifest.read_text())["files"]}))
        with pytest.raises(BundleError, match="cannot be read: KeyError"):
            load_bundle(tmp_path / "the newest")


class TestWhatIsNoBundle:
    def test_the_sentence_says_what_was_meant(self, tmp_path: Path) -> None:
        first, second = bundles.publish(tmp_path, make_current=False), bundles.publish(tmp_path, make_current=False)
        data = ("--data", tmp_path)
        refused(run("evaluate", "--bundle", first.parent, *data), rf"din is a model, not one of its versions, and none .* name {second}")
        promote(tmp_path, "din", int(first.name))
        refused(run("evaluate", "--bundle", first.parent, *data), rf"din is a model, not one of its versions; its live one is {first}")
        for words in (("score", "--out", tmp_path / "out"), ("evaluate",)):
            refused(run(*words, *data, "--bundle", first.parent / "current"), rf"din is live, it is none; name {first}")
        refused(run("compare", first.parent / "releases.jsonl", first, *data), r"din has no version releases.jsonl; there are")
        refused(run("evaluate", "--bundle", first.parent / "7", *data), rf"din has no version 7; there are {first.name}, {second.name}; ")
        refused(run("evaluate", "--bundle", tmp_path, *data), rf"is a model repository, not a bundle; name a version, such as {first}")
        refused(run("evaluate", "--bundle", tmp_path / "none", *data), "there is no manifest.json; a bundle is a version's folder")
        refused(run("promote", "--models", tmp_path, "--name", "din", "--version", "7"), "din has no version 7; there are")


PIPES = {"current": bundle.CURRENT, "challenger": CHALLENGER, "releases": bundle.RELEASES, "lock": bundle.LOCK, "verdict": VERDICT}


def within(seconds: float, act: Any) -> Any:
    """What it gives, or raises, if it does so in time."""
    done: list[Any] = []

    def acting() -> None:
        try:
            done.append(act())
        except Exception as error:  # noqa: BLE001
            done.append(error)

    thread = threading.Thread(target=acting, daemon=True)
    thread.start()
    thread.join(seconds)
    assert done, "it waits for something that never comes"
    return done[0]


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def endless(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**40)


def listening(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's path has a limit
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(path.name)
    finally:
        os.chdir(here)


ODD = {"pipe": os.mkfifo, "device": device, "endless": endless, "socket": listening, "folder": os.mkdir}


class TestNoFiles:
    @pytest.mark.parametrize("kind", ODD)
    @pytest.mark.parametrize("file", [*FILES, bundle.MANIFEST])
    def test_of_a_bundle(self, tmp_path: Path, file: str, kind: str) -> None:
        path = bundles.publish(tmp_path)
        (path / file).unlink()
        ODD[kind](path / file)
        error = within(5, lambda: load_bundle(path))
        assert isinstance(error, BundleError)
        assert str(path) in str(error)

    @pytest.mark.parametrize("kind", ODD)
    def test_of_a_model(self, tmp_path: Path, kind: str) -> None:
        home = bundles.publish(tmp_path).parent
        for file in (bundle.CURRENT, CHALLENGER, VERDICT, bundle.RELEASES):
            (home / file).unlink(missing_ok=True)
            ODD[kind](home / file)
        assert isinstance(within(5, lambda: current_path(tmp_path, "din")), BundleError)
        assert isinstance(within(5, lambda: read_challenger(home)), BundleError)
        assert within(5, lambda: read_decision(home, Challenger(1, "shadow", 1.0))) is None

    @pytest.mark.parametrize("kind", ["pipe", "device", "socket", "folder"])
    def test_a_lock(self, tmp_path: Path, kind: str) -> None:
        home = bundles.publish(tmp_path).parent
        (home / bundle.LOCK).unlink()
        ODD[kind](home / bundle.LOCK)
        assert isinstance(within(5, lambda: promote(tmp_path, "din")), BundleError)
        assert isinstance(within(5, lambda: bundles.publish(tmp_path)), BundleError)

    def test_a_lock_that_another_holds_for_ever(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        home = bundles.publish(tmp_path).parent
        monkeypatch.setattr(files, "LOCK_SECONDS", 0.1)
        monkeypatch.setattr(files.exclusive.__wrapped__, "__defaults__", (0.1,))
        with locked(home):
            error = within(5, lambda: bundles.publish(tmp_path))
        assert "another process has held it for 0.1 s" in str(error) or "cannot publish" in str(error)
        assert isinstance(error, BundleError)


def external(name: str, where: str) -> bytes:
    """The test model with a tensor that lies in another file, at the top, in a branch of a condition, or in a function."""
    model = ModelProto.FromString(bundles.model())
    tensor = TensorProto(name="outside", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", name), ("offset", "0"), ("length", "4")):
        tensor.external_data.add(key=key, value=value)
    if where == "initializer":
        model.graph.initializer.append(tensor)
    elif where == "attribute":
        model.graph.node.append(helper.make_node("Constant", [], ["outside"], value=tensor))
    elif where == "branch":
        branch = helper.make_graph([helper.make_node("Constant", [], ["outside"], value=tensor)], "branch", [], [])
        model.graph.node.append(helper.make_node("If", ["c"], ["o"], then_branch=branch, else_branch=branch))
    elif where == "function":
        constant = helper.make_node("Constant", [], ["outside"], value=tensor)
        model.functions.append(helper.make_function("own", "f", [], ["outside"], [constant], [helper.make_opsetid("", 18)]))
    else:
        model.graph.sparse_initializer.add().values.CopyFrom(tensor)
    return model.SerializeToString()


class TestGraphs:
    @pytest.mark.parametrize("where", ["initializer", "attribute", "branch", "function", "sparse"])
    def test_weights_in_a_file_without_a_digest_are_refused(self, tmp_path: Path, where: str) -> None:
        path = bundles.publish(tmp_path, files={bundle.MODEL: external("weights.bin", where)})
        (path / "weights.bin").write_bytes(b"1234")
        with pytest.raises(BundleError, match=r"model\.onnx has weights in weights\.bin, which no digest of manifest\.json covers"):
            load_bundle(path)

    @pytest.mark.parametrize("name", ["../weights.bin", "/tmp/weights.bin"])
    def test_weights_somewhere_else_are_refused(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(BundleError, match="which no digest"):
            load_bundle(bundles.publish(tmp_path, files={bundle.MODEL: external(name, "initializer")}))

    def test_weights_in_a_file_with_a_digest_are_part_of_it(self, tmp_path: Path) -> None:
        path = bundles.publish(tmp_path, files={bundle.MODEL: external("weights.bin", "initializer"), "weights.bin": b"1234"})
        load_bundle(path)
        (path / "weights.bin").write_bytes(b"1235")
        with pytest.raises(BundleError, match=r"weights\.bin is not what was published"):
            load_bundle(path)

    def test_the_manifest_tells_format_and_opset(self, tmp_path: Path) -> None:
        path = bundles.publish(tmp_path)
        assert check_files(path)["graphs"] == {"model.onnx": {"ir": 10, "opset": 18}}
        (facts,) = load_bundle(path).graphs.values()
        assert facts.needs == "onnxruntime >= 1.20"

    def test_a_bundle_from_before_it_told_is_read(self, tmp_path: Path) -> None:
        path = bundles.publish(tmp_path)
        manifest = {key: value for key, value in check_files(path).items() if key not in ("graphs", "created")}
        assert read_bundle(path, manifest).graphs == {}

    @pytest.mark.parametrize(
        ("ir", "opset", "needs"),
        [(8, 17, ">= 1.20"), (10, 22, ">= 1.21"), (11, 18, ">= 1.23"), (12, 20, ">= 1.24"), (13, 26, ">= 1.25"), (14, 18, "later than")],
    )
    def test_what_a_graph_needs(self, ir: int, opset: int, needs: str) -> None:
        model = ModelProto.FromString(bundles.model())
        model.ir_version, model.opset_import[0].version = ir, opset
        model.opset_import.add(domain="ai.onnx.ml", version=3)
        facts = graph_facts(model.SerializeToString())
        assert (facts.ir, facts.opset) == (ir, opset)
        assert needs in facts.needs

    @pytest.mark.parametrize("data", [b"", b"nonsense", b"\x08\n", b"\xff" * 50, b"\x3a\xff\xff\xff\x7f", b"{}"])
    def test_what_is_no_graph(self, data: bytes) -> None:
        with pytest.raises(GraphFileError, match="no ONNX model"):
            graph_facts(data)

    def test_every_cut_of_a_graph_is_told_or_harmless(self) -> None:
        whole = external("weights.bin", "branch")
        for size in range(len(whole)):
            try:
                assert graph_facts(whole[:size]).external <= {"weights.bin"}
            except GraphFileError:
                continue
