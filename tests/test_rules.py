"""The alert rules: their unit tests, and a real Prometheus that scrapes a real joiner until they fire."""

import contextlib
import json
import re
import shutil
import signal
import subprocess
import time
import urllib.request
from pathlib import Path

import bundles
import pytest
from conftest import free_port
from joining import Writer, click, eventually, join_process, ranking

RULES = Path(__file__).parent.parent / "prometheus" / "rules.yml"
MISSING = "is not installed: apt-get install prometheus"


def test_the_rules_pass_their_own_tests() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip(f"promtool {MISSING}")
    for words in (["check", "rules", "rules.yml"], ["test", "rules", "rules_test.yml"]):
        done = subprocess.run([promtool, *words], cwd=RULES.parent, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_test() -> None:
    alerts = set(re.findall(r"- alert: (\w+)", RULES.read_text()))
    assert alerts == set(re.findall(r"alertname: (\w+)", (RULES.parent / "rules_test.yml").read_text()))


@contextlib.contextmanager
def prometheus(folder: Path, target: int):
    """A Prometheus that looks every half second, with the shipped rules, which need not hold for long; its address."""
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.skip(f"prometheus {MISSING}")
    shipped = RULES.read_text()
    (folder / "rules.yml").write_text(re.sub(r"\bfor: \w+", "for: 1s", shipped))
    every = {"scrape_interval": "500ms", "evaluation_interval": "500ms"}
    job = {"job_name": "join", "static_configs": [{"targets": [f"127.0.0.1:{target}"]}]}
    (folder / "prometheus.yml").write_text(json.dumps({"global": every, "rule_files": ["rules.yml"], "scrape_configs": [job]}))
    port = free_port()
    options = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb", f"--web.listen-address=127.0.0.1:{port}"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen([binary, *options], stdout=log, stderr=log)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


def asked(url: str):
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
        return json.loads(answer.read())["data"]
    return {}


def test_alerts_fire_on_a_joiner_whose_model_is_off(server, tmp_path: Path) -> None:
    slot = {"kind": "category", "counts": [900, 100, 0, 0, 0], "values": ["feed", "side"], "edges": []}
    reference = json.dumps({"fields": {"context.slot": slot, "user.age": {**slot, "counts": [0, 1000, 0, 0, 0], "values": ["35", "25"]}}})
    version = int(bundles.publish(tmp_path / "models", "din", files={"reference.json": reference.encode()}).name)
    streams, port = Writer(server.url), free_port()
    options = ("--window", "0.2", "--lateness", "0.1", "--metrics-port", str(port))
    joiner = join_process(server.url, tmp_path / "log", tmp_path / "models", *options)
    try:
        with prometheus(tmp_path, port) as address:
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
        _, err = joiner.communicate(timeout=30)
    assert joiner.returncode == 0, err
