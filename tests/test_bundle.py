import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import bundles
import numpy as np
import pytest

from features import bundle, vocabulary
from features.bundle import LOCK, BundleError, check_files, current_path, load_bundle, new_version, read_bundle
from features.encode import Feeds
from features.repository import model_names
from tests.test_cli import refused, run
from tests.test_datasets import ROOT

FILES = [bundle.MODEL, bundle.SCHEMA, bundle.VOCABULARIES, bundle.GOLDENS]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file and folder below, hidden ones too, but the locks."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*") if path.name != LOCK}


def test_what_is_published_is_loaded(tmp_path: Path) -> None:
    path = bundles.publish(tmp_path, "din")
    assert path == current_path(tmp_path, "din")
    loaded = load_bundle(path)
    assert (loaded.name, loaded.version, loaded.path) == ("din", int(path.name), path)
    assert loaded.schema == bundles.encoder().schema
    assert loaded.fingerprint == vocabulary.fingerprint(loaded.schema, bundles.vocabularies())
    assert loaded.goldens == bundles.goldens()
    assert loaded.encoder.vocabularies.to_json() == bundles.vocabularies().to_json()
    assert sorted(p.name for p in path.iterdir()) == sorted([*FILES, bundle.MANIFEST])
    assert (path.parent / "current").read_text() == f"{path.name}\n"
    loaded.check_goldens(bundles.expected)


def test_versions_are_times_and_two_in_one_second_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.fullmatch(r"20\d{12}", str(new_version()))
    monkeypatch.setattr(bundle, "new_version", lambda: 20260102030405)
    paths = [bundles.publish(tmp_path) for _ in range(3)]
    assert [path.name for path in paths] == ["20260102030405", "20260102030406", "20260102030407"]
    assert current_path(tmp_path, "din") == paths[-1]
    assert [load_bundle(path).version for path in paths] == [20260102030405, 20260102030406, 20260102030407]


def test_what_a_killed_publisher_left_is_cleared_and_one_at_work_is_left_alone(tmp_path: Path) -> None:
    dead, alive = tmp_path / "din" / ".publishing-dead", tmp_path / "din" / ".publishing-alive"
    for staging in (dead, alive):
        (staging / "bundle").mkdir(parents=True)
    (tmp_path / "din" / ".current-99").write_text("2026")
    handle = os.open(alive, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    bundles.publish(tmp_path, "din")
    assert not dead.exists()
    assert not (tmp_path / "din" / ".current-99").exists()
    assert alive.exists()
    os.close(handle)
    bundle.clear_abandoned(tmp_path, "din")
    assert not alive.exists()


def test_an_earlier_version_can_be_made_current(tmp_path: Path) -> None:
    first, second = bundles.publish(tmp_path), bundles.publish(tmp_path)
    assert current_path(tmp_path, "din") == second
    bundles.set_current(tmp_path, "din", int(first.name))
    assert current_path(tmp_path, "din") == first
    assert sorted(path.name for path in first.parent.iterdir()) == sorted([first.name, second.name, "current", "releases.jsonl", ".lock"])


@pytest.mark.parametrize("file", FILES)
def test_a_changed_byte_in_any_file_is_refused(tmp_path: Path, file: str) -> None:
    path = bundles.publish(tmp_path)
    data = bytearray((path / file).read_bytes())
    data[len(data) // 2] ^= 1
    (path / file).write_bytes(data)
    with pytest.raises(BundleError, match=re.escape(f"{path}: {file} is not what was published")):
        load_bundle(path)


@pytest.mark.parametrize("file", [*FILES, bundle.MANIFEST])
def test_a_file_that_is_absent_or_cut_short_is_refused(tmp_path: Path, file: str) -> None:
    path = bundles.publish(tmp_path)
    os.truncate(path / file, 10)
    with pytest.raises(BundleError, match=re.escape(str(path))):
        load_bundle(path)
    (path / file).unlink()
    with pytest.raises(BundleError, match=re.escape(str(path)) if file != bundle.MANIFEST else "din has no version"):
        load_bundle(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(fingerprint="0123456789abcdef"), "made with feature contract 0123456789abcdef, this program has"),
        (lambda m: m.pop("fingerprint"), "made with feature contract None"),
        (lambda m: m["files"].update({"model.onnx": "0" * 64}), "model.onnx is not what was published"),
        (lambda m: m["files"].update({"../../din/current": "0" * 64}), "is not what was published"),
        (lambda m: m["files"].pop("goldens.json"), "does not list all of its files"),
        (lambda m: m.update(files=[]), "does not list all of its files"),
        (lambda m: m.update(files=None), "cannot be read"),
    ],
)
def test_a_changed_manifest_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    path = bundles.publish(tmp_path)
    manifest = json.loads((path / bundle.MANIFEST).read_text())
    change(manifest)
    (path / bundle.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=message):
        load_bundle(path)


def test_a_bundle_of_other_feature_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = bundles.publish(tmp_path)
    monkeypatch.setattr(vocabulary, "ENCODING", vocabulary.ENCODING + 1)
    with pytest.raises(BundleError, match="train it again with this version"):
        load_bundle(path)


def _nudged(by: float) -> Any:
    def score(feeds: Feeds) -> Any:
        return bundles.expected(feeds) + np.float32(by)

    return score


def test_goldens_that_fail_are_refused(tmp_path: Path) -> None:
    loaded = load_bundle(bundles.publish(tmp_path))
    loaded.check_goldens(_nudged(5e-6))
    with pytest.raises(BundleError, match=r"golden 0 is off by 2e-05, 1e-05 is allowed"):
        loaded.check_goldens(_nudged(2e-5))
    with pytest.raises(BundleError, match="golden 0 is off by nan"):
        loaded.check_goldens(_nudged(float("nan")))
    with pytest.raises(BundleError, match="golden 0 has 3 probabilities for 7 candidates"):
        loaded.check_goldens(lambda _: np.zeros((1, 7), np.float32))


@pytest.mark.parametrize("text", ["", "{", "[3]", '[{"user_id": "u"}]', '[{"other": 1}]', "[" * 100_000])
def test_goldens_that_are_none_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(BundleError, match=r"goldens\.json cannot be read"):
        load_bundle(bundles.publish(tmp_path, files={bundle.GOLDENS: text.encode()}))


@pytest.mark.parametrize("candidates", [None, []])
def test_a_bundle_without_goldens_is_refused(tmp_path: Path, candidates: list[str] | None) -> None:
    """Neither no request at all nor requests without a candidate show anything."""
    goldens = [] if candidates is None else [{**json.loads(bundle.goldens_json(bundles.goldens()))[0], "candidates": [], "p_click": []}]
    path = bundles.publish(tmp_path, files={bundle.GOLDENS: json.dumps(goldens).encode()}, make_current=False)
    with pytest.raises(BundleError, match="has no request with candidates"):
        load_bundle(path)
    refused(run("promote", "--models", tmp_path, "--name", "din"), "has no request with candidates")


@pytest.mark.parametrize("count", [0, 1, 4])
def test_goldens_of_another_length_are_refused(tmp_path: Path, count: int) -> None:
    """One probability would be held against every candidate, and none against nothing."""
    golden = json.loads(bundle.goldens_json(bundles.goldens()))[0]
    loaded = load_bundle(bundles.publish(tmp_path, files={bundle.GOLDENS: json.dumps([{**golden, "p_click": [0.2] * count}]).encode()}))
    with pytest.raises(BundleError, match=rf"golden 0 has {count} probabilities for 3 candidates of model\.onnx"):
        loaded.check_goldens(lambda feeds: np.full((1, 3), 0.2, np.float32))


def test_a_golden_with_a_feature_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    goldens = [{**json.loads(bundle.goldens_json(bundles.goldens()))[0], "user": {"age": ["25"]}}]
    loaded = load_bundle(bundles.publish(tmp_path, files={bundle.GOLDENS: json.dumps(goldens).encode()}))
    with pytest.raises(BundleError, match=r"golden 0 cannot be encoded: user\.age"):
        loaded.check_goldens(bundles.expected)


@pytest.mark.parametrize("name", ["../x", "", ".", "..", "a/b", "A", "-a", ".a", "a b", "a\n", "x" * 65, "é"])
def test_a_name_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    models = tmp_path / "models"
    for act in (lambda: bundles.publish(models, name), lambda: current_path(models, name)):
        with pytest.raises(BundleError, match="is not a model name"):
            act()
    assert tree(tmp_path) == {}


def test_a_repository_without_a_live_version(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="does not name a version"):
        current_path(tmp_path, "din")
    assert model_names(tmp_path) == []
    bundles.publish(tmp_path, "din")
    bundles.publish(tmp_path, "b")
    (tmp_path / "empty").mkdir()
    assert model_names(tmp_path) == ["b", "din"]
    (tmp_path / "din" / "current").write_text("../../x")
    with pytest.raises(BundleError, match="does not name a version"):
        current_path(tmp_path, "din")


@pytest.mark.parametrize("earlier", [False, True])
def test_a_disk_that_is_full_at_any_moment_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: bool) -> None:
    """Let the n-th of the system calls that may find the disk full fail, for every n, until a publication goes through."""
    if earlier:
        bundles.publish(tmp_path)
    before = tree(tmp_path)
    left = 0

    def failing(call: Any) -> Any:
        def wrapped(*args: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return call(*args)

        return wrapped

    monkeypatch.setattr(os, "fsync", failing(os.fsync))
    monkeypatch.setattr(Path, "rename", failing(Path.rename))
    monkeypatch.setattr(Path, "replace", failing(Path.replace))
    failures = 0
    for n in range(1, 30):
        left = n
        try:
            path = bundles.publish(tmp_path)
        except BundleError as error:
            assert str(error) == f"cannot publish din in {tmp_path}: No space left on device; nothing was published"  # noqa: PT017
            assert {name: data for name, data in tree(tmp_path).items() if name != "din"} == {k: v for k, v in before.items() if k != "din"}
            failures += 1
            continue
        load_bundle(path)
        assert current_path(tmp_path, "din") == path
        if left > 0:  # no call was left to fail
            break
        bundle.shutil.rmtree(path)
        bundle.shutil.rmtree(tmp_path / "din") if not earlier else (tmp_path / "din" / "current").write_bytes(before["din/current"])
    assert failures == 9  # five files, their folder, its rename, the new `current` and its rename


PROGRAM = """
import os, resource, signal, sys
from pathlib import Path
from tests import bundles
from features import bundle
models = Path(sys.argv[1])
{before}
try:
    bundles.publish(models, "din", bias=1.0)
except bundle.BundleError as error:
    print(error)
"""


def publishing(models: Path, before: str) -> "subprocess.CompletedProcess[str]":
    program = PROGRAM.format(before=before)
    return subprocess.run([sys.executable, "-c", program, models], cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_file_that_the_system_cuts_short_leaves_nothing(tmp_path: Path) -> None:
    first = bundles.publish(tmp_path)
    before = tree(tmp_path)
    cut = "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))"
    done = publishing(tmp_path, cut)
    assert done.stdout == f"cannot publish din in {tmp_path}: File too large; nothing was published\n", done.stderr
    assert tree(tmp_path) == before
    assert current_path(tmp_path, "din") == first


KILL = """
write = bundle._write
def dying(path, data):
    if path.name == "manifest.json":
        path.write_bytes(data[:9])
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, data)
bundle._write = dying
"""


def test_a_process_that_is_killed_while_publishing_leaves_no_version(tmp_path: Path) -> None:
    done = publishing(tmp_path, KILL)
    assert done.returncode == -signal.SIGKILL
    assert model_names(tmp_path) == []
    [staging] = (path for path in (tmp_path / "din").iterdir() if path.name != ".lock")
    assert staging.name.startswith(".publishing-")
    path = bundles.publish(tmp_path)  # what was left is in nobody's way, and gone
    assert not staging.exists()
    assert model_names(tmp_path) == ["din"]
    load_bundle(path).check_goldens(bundles.expected)


def test_a_repository_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file")
    with pytest.raises(BundleError, match=r"^cannot publish din in .*: Not a directory; nothing was published$"):
        bundles.publish(tmp_path / "models")


def test_what_bundles_have_in_common_is_in_memory_once(tmp_path: Path) -> None:
    first, second = load_bundle(bundles.publish(tmp_path)), bundles.publish(tmp_path, bias=1.0)
    assert read_bundle(second, check_files(second), [first]).vocabularies is first.vocabularies
    other = bundles.vocabularies().to_json().replace('"comedy"', '"tragedy"')
    third = bundles.publish(tmp_path, files={bundle.VOCABULARIES: other.encode()})
    read = read_bundle(third, check_files(third), [first])
    assert read.fingerprint == load_bundle(third).fingerprint != first.fingerprint
    mine, theirs = read.vocabularies.categories["genre"], first.vocabularies.categories["genre"]
    assert isinstance(mine, vocabulary.Vocabulary)
    assert isinstance(theirs, vocabulary.Vocabulary)
    assert mine.values == ("drama", "tragedy", "news")
    assert mine.values[2] is theirs.values[2]


def test_a_bundle_of_other_feature_code_is_refused_beside_one_like_it(tmp_path: Path) -> None:
    first, path = load_bundle(bundles.publish(tmp_path)), bundles.publish(tmp_path)
    with pytest.raises(BundleError, match="made with feature contract 0000"):
        read_bundle(path, {**check_files(path), "fingerprint": "0" * 16}, [first])
