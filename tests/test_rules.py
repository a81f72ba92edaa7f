"""The alert rules: their unit tests, and a real Prometheus that scrapes a real joiner until they fire."""

import json
import re
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import bundles
import yaml
from conftest import free_port
from joining import Writer, click, join_process, ranking
from redis_servers import eventually
from watching import RULES, asked, prometheus, rules, tool

from service.errors import KINDS, UNEXPECTED, BacklogError, MetricsGoneError, OverLimitError, StoreDownError
from service.telemetry.metrics import SECONDS
from service.telemetry.series import FAULTS

ROOT = Path(__file__).parent.parent


def test_the_rules_pass_their_own_tests() -> None:
    promtool = tool("promtool")
    tests = sorted(path.name for path in RULES.parent.glob("*_test.yml"))
    for words in (["check", "rules", "rules.yml"], ["test", "rules", *tests]):
        done = subprocess.run([promtool, *words], cwd=RULES.parent, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


ALERTS = [rule for rule in rules() if "alert" in rule]


def test_every_alert_has_a_test_in_which_it_fires() -> None:
    firing = Counter(
        case["alertname"]
        for path in RULES.parent.glob("*_test.yml")
        for test in yaml.safe_load(path.read_text())["tests"]
        for case in test.get("alert_rule_test", ())
        if case["exp_alerts"]
    )
    assert set(firing) == {alert["alert"] for alert in ALERTS}


def test_the_healthy_day_has_all_that_a_rule_asks_for() -> None:
    (healthy,) = yaml.safe_load((RULES.parent / "healthy_test.yml").read_text())["tests"]
    there = {series["series"].partition("{")[0] for series in healthy["input_series"]}
    asked = set(re.findall(r"(?<!:)\badrank_\w+\b(?!:)|\bup\b", " ".join(rule["expr"] for rule in rules())))
    assert asked == there


def test_every_alert_says_what_how_bad_and_what_to_do() -> None:
    for alert in ALERTS:
        assert set(alert) == {"alert", "expr", "for", "labels", "annotations"}
        assert alert["labels"].keys() == {"severity"}
        assert alert["labels"]["severity"] in ("critical", "warning")
        assert alert["annotations"].keys() == {"summary", "description", "runbook_url"}
        assert alert["annotations"]["runbook_url"] == f"docs/runbook.md#{alert['alert'].lower()}"


def test_the_runbook_has_a_section_for_each_alert_and_no_other() -> None:
    sections = re.findall(r"^### (\w+)$", (ROOT / "docs" / "runbook.md").read_text(), re.MULTILINE)
    assert sections == [alert["alert"] for alert in ALERTS]


def test_the_objectives_are_what_the_service_counts() -> None:
    recorded = {rule["record"]: rule["expr"] for rule in rules() if "record" in rule}
    (outcomes,) = re.findall(r'outcome=~"([a-z_|]+)"', recorded["job:adrank_rankings_failed:rate5m"])
    assert sorted(outcomes.split("|")) == sorted(FAULTS)
    elsewhere = {StoreDownError, BacklogError, MetricsGoneError}  # of events, and of /metrics
    ours = {kind.code for error, kind in KINDS.items() if kind.status >= 500 and error not in elsewhere}
    assert set(FAULTS) == ours | {KINDS[OverLimitError].code, UNEXPECTED.code, "cut_off"}
    edges = re.findall(r'le="([\d.]+)"', " ".join(recorded.values()))
    assert [float(edge) for edge in edges] == [0.05]  # in one place
    assert 0.05 in SECONDS


def test_alerts_fire_on_a_joiner_whose_model_is_off(server, tmp_path: Path) -> None:
    slot = {"kind": "category", "counts": [900, 100, 0, 0, 0], "values": ["feed", "side"], "edges": []}
    reference = json.dumps({"fields": {"context.slot": slot, "user.age": {**slot, "counts": [0, 1000, 0, 0, 0], "values": ["35", "25"]}}})
    version = int(bundles.publish(tmp_path / "models", "din", files={"reference.json": reference.encode()}).name)
    streams, port = Writer(server.url), free_port()
    options = ("--window", "0.2", "--lateness", "0.1", "--metrics-port", str(port))
    joiner = join_process(server.url, tmp_path / "log", tmp_path / "models", *options)
    try:
        soon = re.sub(r"\bfor: \w+", "for: 1s", RULES.read_text())
        with prometheus(tmp_path, {"adrank-joiner": port}, soon) as address:
            wave = iter(range(1000))

            def firing() -> set[tuple[str, ...]]:
                """What fires after some more impressions, of which far fewer are clicked than the model says."""
                number, now = next(wave), time.time()
                names = [f"r{number}-{i}" for i in range(60)]
                streams.add(*(ranking(name, now, version=version, context={"slot": "side"}) for name in names))
                streams.add(*(click(name, ts=now) for name in names[:6]))
                time.sleep(0.2)
                alerts = asked(f"{address}/api/v1/alerts").get("alerts", [])
                return {(a["labels"]["alertname"], a["labels"].get("field", "")) for a in alerts if a["state"] == "firing"}

            wanted = {("AdrankPredictsTooManyClicks", ""), ("AdrankFieldDrifted", "context.slot")}
            eventually(lambda: wanted <= firing(), 60)
            found = firing()
            assert ("AdrankFieldDrifted", "user.age") not in found  # it is as it was in training
            assert not {name for name, _ in found} & {"AdrankPredictsTooFewClicks", "AdrankJoinerLoses", "AdrankJoinerDiskFull"}
    finally:
        joiner.send_signal(signal.SIGTERM)
        _, err = joiner.communicate(timeout=90)
    assert joiner.returncode == 0, err
