"""`adrank models`: what a repository has."""

import json
import os
from pathlib import Path

import bundles

from features import bundle
from features.challenger import CanaryDecision, Challenger, challenge, write_decision
from features.listing import METRICS, list_models, table
from tests.test_cli import refused, run


def test_each_version_with_its_role_and_how_it_did(tmp_path: Path) -> None:
    metrics = {"test": {"auc": 0.75, "log_loss": 0.3, "calibration_ratio": 1.01, "rows": 7}}
    first = int(bundles.publish(tmp_path, files={METRICS: json.dumps(metrics).encode()}).name)
    second = int(bundles.publish(tmp_path, make_current=False).name)
    other = int(bundles.publish(tmp_path, "aa", make_current=False).name)
    challenge(tmp_path, "din", facts := Challenger(second, "canary", 0.1))
    code, out, _ = run("models", "--models", tmp_path, "--json")
    document = json.loads(out)
    assert (code, document["wrong"]) == (0, {})
    assert [(each["name"], each["version"], each["role"]) for each in document["versions"]] == [
        ("aa", other, ""),
        ("din", second, "canary 0.1"),
        ("din", first, "live"),
    ]
    assert document["versions"][2]["metrics"] == {"auc": 0.75, "log_loss": 0.3, "calibration_ratio": 1.01}
    assert document["versions"][0]["created"].startswith("20")
    lines = run("models", "--models", tmp_path)[1].splitlines()
    assert lines[0].split()[:5] == ["model", "version", "role", "network", "created"]
    assert f"din    {first}  live        -" in lines[3]
    assert lines[3].endswith("0.75000  0.30000   1.01000")
    write_decision(tmp_path / "din", facts, CanaryDecision("p99", "slow"))
    assert list_models(tmp_path).versions[1].role == "stopped"


def test_what_is_wrong_is_said_and_hides_nothing_else(tmp_path: Path) -> None:
    good, bad = bundles.publish(tmp_path), bundles.publish(tmp_path, make_current=False)
    (bad / bundle.MANIFEST).unlink()
    os.mkfifo(bad / bundle.MANIFEST)
    bundles.publish(tmp_path, "gone").rename(tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "README.md").write_text("")
    found = list_models(tmp_path)
    assert [(each.name, each.version, each.wrong is None) for each in found.versions] == [
        ("din", int(bad.name), False),
        ("din", int(good.name), True),
    ]
    assert found.wrong.keys() == {"gone", "link"}
    assert "and not there; promote another" in table(found)
    assert "it is a pipe, not a file" in table(found)


def test_a_repository_that_is_empty_or_none(tmp_path: Path) -> None:
    assert run("models", "--models", tmp_path) == (0, "no model has been published yet; train one with adrank train\n", "")
    refused(run("models", "--models", tmp_path / "none"), "there is no model repository .*none: No such file")
