"""Which version is live: publish, promote, roll back, by hand and by the command line, at once and after crashes."""

import re
import subprocess
import sys
from pathlib import Path

import bundles
import pytest

from features.bundle import BundleError, current_path, load_bundle, released
from features.releases import promote, rollback, versions
from features.repository import model_names
from tests.test_cli import refused, run
from tests.test_datasets import ROOT


def live(models: Path) -> int:
    return int(current_path(models, "din").name)


def published(models: Path, count: int, make_current: bool = True) -> list[int]:
    """Versions of that many bundles, the oldest first."""
    return [int(bundles.publish(models, make_current=make_current).name) for _ in range(count)]


def test_a_version_may_be_published_without_being_live(tmp_path: Path) -> None:
    path = bundles.publish(tmp_path, make_current=False)
    assert model_names(tmp_path) == []
    load_bundle(path)
    assert promote(tmp_path, "din") == live(tmp_path) == int(path.name)
    later = bundles.publish(tmp_path, make_current=False)
    assert live(tmp_path) == int(path.name)
    assert versions(tmp_path, "din") == [int(path.name), int(later.name)]


def test_rolling_back_twice_goes_back_two(tmp_path: Path) -> None:
    first, second, third = published(tmp_path, 3)
    assert rollback(tmp_path, "din") == live(tmp_path) == second
    assert rollback(tmp_path, "din") == live(tmp_path) == first
    with pytest.raises(BundleError, match=r"no earlier version of din in .* was live before; promote one"):
        rollback(tmp_path, "din")
    assert promote(tmp_path, "din") == live(tmp_path) == third
    assert rollback(tmp_path, "din") == first


def test_what_was_rolled_back_is_not_gone_back_to(tmp_path: Path) -> None:
    first, _, _ = published(tmp_path, 3)
    rollback(tmp_path, "din")
    rollback(tmp_path, "din")
    fourth = published(tmp_path, 1)[0]
    assert released(tmp_path / "din") == [first, fourth]
    assert rollback(tmp_path, "din") == first


def test_promoting_what_is_live_changes_nothing(tmp_path: Path) -> None:
    first, second = published(tmp_path, 2)
    assert promote(tmp_path, "din", second) == second
    assert released(tmp_path / "din") == [first, second]


def test_by_default_no_older_version_is_promoted(tmp_path: Path) -> None:
    first, second = published(tmp_path, 2)
    with pytest.raises(BundleError, match=f"no version newer than {second}, which is live; name another"):
        promote(tmp_path, "din")
    assert promote(tmp_path, "din", first) == live(tmp_path) == first
    assert rollback(tmp_path, "din") == second


def test_versions_that_are_gone_or_damaged_are_passed_over(tmp_path: Path) -> None:
    first, second, third, _ = published(tmp_path, 4)
    (tmp_path / "din" / str(third) / "model.onnx").write_bytes(b"changed")
    (tmp_path / "din" / str(second)).rename(tmp_path / "din" / "kept-elsewhere")
    assert rollback(tmp_path, "din") == live(tmp_path) == first


def test_with_no_whole_version_left_the_live_one_stays(tmp_path: Path) -> None:
    first, second = published(tmp_path, 2)
    (tmp_path / "din" / str(first) / "model.onnx").write_bytes(b"changed")
    with pytest.raises(BundleError, match=r"was live before that can be used \(bundle .*digest differs"):
        rollback(tmp_path, "din")
    assert live(tmp_path) == second


@pytest.mark.parametrize("torn", [b'{"version"', b"\x00\xff\n", b'{"version": "new"}\n', b"[]\n", b"7"])
def test_a_line_that_a_crash_cut_short_is_passed_over(tmp_path: Path, torn: bytes) -> None:
    first, second = published(tmp_path, 2)
    with (tmp_path / "din" / "releases.jsonl").open("ab") as file:
        file.write(torn)
    third = published(tmp_path, 1)[0]
    assert [rollback(tmp_path, "din"), rollback(tmp_path, "din")] == [second, first]
    assert promote(tmp_path, "din") == third


def test_a_list_of_releases_that_was_not_written_is_made_up_for(tmp_path: Path) -> None:
    first, second = published(tmp_path, 2)
    releases = tmp_path / "din" / "releases.jsonl"
    before = releases.read_bytes()
    third = published(tmp_path, 1)[0]
    releases.write_bytes(before)  # killed between the two renames
    assert released(tmp_path / "din") == [first, second, third]
    after = published(tmp_path, 1)[0]
    assert released(tmp_path / "din") == [first, second, third, after]
    before = releases.read_bytes()
    assert rollback(tmp_path, "din") == third
    releases.write_bytes(before)
    assert rollback(tmp_path, "din") == second
    releases.unlink()  # a repository from before there was such a list
    assert promote(tmp_path, "din", first) == first
    assert rollback(tmp_path, "din") == second


def test_a_current_that_names_nothing_is_mended_by_a_rollback(tmp_path: Path) -> None:
    first, _ = published(tmp_path, 2)
    (tmp_path / "din" / "current").write_text("latest")
    assert rollback(tmp_path, "din") == live(tmp_path) == first


def test_what_is_damaged_is_not_promoted(tmp_path: Path) -> None:
    first = published(tmp_path, 1)[0]
    damaged = published(tmp_path, 1, make_current=False)[0]
    (tmp_path / "din" / str(damaged) / "model.onnx").write_bytes(b"changed")
    for version in (None, damaged):
        with pytest.raises(BundleError, match="digest differs"):
            promote(tmp_path, "din", version)
    with pytest.raises(BundleError, match="din has no version 7"):
        promote(tmp_path, "din", 7)
    assert live(tmp_path) == first
    assert released(tmp_path / "din") == [first]


PROGRAM = """
import sys
from pathlib import Path
from features.bundle import BundleError, MANIFEST, publish
from features.releases import promote, rollback
models = Path(sys.argv[1])
files = {path.name: path.read_bytes() for path in Path(sys.argv[2]).iterdir() if path.name != MANIFEST}
for _ in range(10):
    publish(models, "din", files, {})
    publish(models, "din", files, {}, make_current=False)
    for act in (promote, rollback):
        try:
            act(models, "din")
        except BundleError as error:
            if "no version newer" not in str(error):
                raise
"""


def test_those_who_publish_and_promote_at_once_lose_nothing(tmp_path: Path) -> None:
    path = bundles.publish(tmp_path)
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), str(path)]
    others = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    said = [other.communicate(timeout=90)[1] for other in others]
    assert [other.returncode for other in others] == [0, 0, 0], said
    assert len(versions(tmp_path, "din")) == 1 + 3 * 20
    stack = released(tmp_path / "din")
    assert stack[-1] == live(tmp_path)
    assert set(stack) <= set(versions(tmp_path, "din"))
    assert not [path.name for path in (tmp_path / "din").iterdir() if path.name.startswith((".publishing", ".current", ".releases"))]


def test_the_command_line(tmp_path: Path) -> None:
    first, second = published(tmp_path, 2)
    third = published(tmp_path, 1, make_current=False)[0]
    where = ("--models", tmp_path, "--name", "din")
    assert run("promote", *where) == (0, f"din {third} is live\n", "")
    assert run("rollback", *where) == (0, f"din {second} is live again\n", "")
    assert run("rollback", *where) == (0, f"din {first} is live again\n", "")
    refused(run("rollback", *where), "no earlier version of din")
    assert run("promote", *where, "--version", second) == (0, f"din {second} is live\n", "")
    refused(run("promote", *where, "--version", 7), "din has no version 7; there are")
    refused(run("promote", "--models", tmp_path, "--name", "absent"), f"there is no model absent in {re.escape(str(tmp_path))}")
    refused(run("promote", "--models", tmp_path, "--name", "../din"), "is not a model name")
    assert not (tmp_path / "absent").exists()


def test_a_model_without_a_version(tmp_path: Path) -> None:
    (tmp_path / "din").mkdir()
    refused(run("promote", "--models", tmp_path, "--name", "din"), "has no version; train one")
    refused(run("rollback", "--models", tmp_path, "--name", "din"), "no earlier version")
