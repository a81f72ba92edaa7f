"""A real Prometheus with the shipped rules, and things for it to look at."""

import contextlib
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import free_port

RULES = Path(__file__).parent.parent / "prometheus" / "rules.yml"


def tool(name: str) -> str:
    """The path of a program of Prometheus; skips the test where there is none."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed: apt-get install prometheus")
    return path


def rules() -> list[dict[str, Any]]:
    """All rules, in their order."""
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


@contextlib.contextmanager
def prometheus(folder: Path, targets: Mapping[str, int], shipped: str | None = None) -> Iterator[str]:
    """A Prometheus that looks twice a second at ports by job, with the shipped rules; its address."""
    binary = tool("prometheus")
    (folder / "rules.yml").write_text(shipped or RULES.read_text())
    every = {"scrape_interval": "500ms", "evaluation_interval": "500ms"}
    jobs = [
        {"job_name": job, "static_configs": [{"targets": [f"127.0.0.1:{port}"], "labels": {"namespace": "ads"}}]}
        for job, port in targets.items()
    ]
    (folder / "prometheus.yml").write_text(json.dumps({"global": every, "rule_files": ["rules.yml"], "scrape_configs": jobs}))
    port = free_port()
    options = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb", f"--web.listen-address=127.0.0.1:{port}"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen([binary, *options], stdout=log, stderr=log)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


def get(url: str) -> str:
    """What is answered; empty where nothing is yet."""
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
        return str(answer.read().decode())
    return ""


def asked(url: str) -> Any:
    """The data of an answer of Prometheus."""
    text = get(url)
    return json.loads(text)["data"] if text else {}


def values(address: str, query: str) -> list[float]:
    """What Prometheus answers to a query now. One that it does not understand fails the test."""
    try:
        with urllib.request.urlopen(f"{address}/api/v1/query", urllib.parse.urlencode({"query": query}).encode(), timeout=5) as answer:
            data = json.load(answer)["data"]
    except urllib.error.HTTPError as error:
        pytest.fail(f"{query}: {error.read().decode()}")
    pairs = [data["result"]] if data["resultType"] == "scalar" else [series["value"] for series in data["result"]]
    return [float(value) for _, value in pairs]


def unanswered(address: str, queries: Sequence[str], seconds: float = 40) -> list[str]:
    """Those queries that are still without a single number when the time is over."""
    left, until = list(dict.fromkeys(queries)), time.monotonic() + seconds
    while left and time.monotonic() < until:
        left = [query for query in left if not any(value == value for value in values(address, query))]
        if left:
            time.sleep(0.2)
    return left
