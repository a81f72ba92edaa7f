"""A real Prometheus that watches a ranker with two workers and a joiner at work: whatever the dashboard and the rules ask is answered."""

import asyncio
import contextlib
import json
import re
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import bundles
import httpx
import pytest
from conftest import Server, free_port
from joining import join_process
from processes import SERVE, ended, environment, fill
from redis_servers import eventually
from test_dashboard import BOARD, QUERIES
from watching import asked, get, prometheus, rules, tool, unanswered, values

from features.challenger import CanaryBounds, Challenger, challenge
from features.repository import CURRENT
from service.telemetry import series

SELECTOR = re.compile(r"(?<![\w:\"])(?:up|(?:\w+:)?adrank[\w:]*)(?:\{[^}]*\})?")
USERS = 40
DESIGNED = {
    *(
        "requests_total",
        "request_duration_seconds",
        "stage_duration_seconds",
        "candidates",
        "batch_rows",
        "inflight_requests",
        "shed_total",
    ),
    *("degraded_total", "feature_lookups_total", "history_length", "catalogue_ads", "catalogue_lag_seconds", "p_click", "model_info"),
    *("model_loaded_timestamp_seconds", "model_reload_total", "events_total", "calibration_ratio"),
}
"""What the design asks for."""


@dataclass
class Watched:
    """What is at work: the addresses of the ranker's and the joiner's metrics, and of Prometheus."""

    ranker: str
    joiner: str
    prometheus: str
    ports: tuple[int, int]
    models: Path
    process: "subprocess.Popen[bytes]"


def publish(models: Path) -> None:
    """Two models: one with a training reference and a shadow, one with a canary."""
    counts = {"kind": "category", "counts": [900, 100, 0, 0, 0], "values": ["feed", "side"], "edges": []}
    reference = {"reference.json": json.dumps({"fields": {"context.slot": counts}}).encode()}
    for name, mode, share in (("din", "shadow", 1.0), ("other", "canary", 0.5)):
        bundles.publish(models, name, files=reference)
        version = int(bundles.publish(models, name, bias=0.2, files=reference, make_current=False).name)
        challenge(models, name, Challenger(version, mode, share, CanaryBounds(p99_ratio=1e6)))


def visit(client: httpx.Client, wave: int, store: Server) -> None:
    """Users visit and some click; some requests are wrong, too late, or come while Redis stands still."""
    codes: Counter[int] = Counter()
    clicks = []
    for i in range(2 * USERS):
        request = {
            "request_id": f"r{wave}-{i}",
            "user": {"id": f"u{i % USERS}"},
            "context": {"slot": "feed"},
            "candidates": [*bundles.ADS, "new"],
        }
        codes[
            client.post("/rank", json={**request, "options": {"model": ("din", "other")[i % 2], "shown": len(bundles.ADS)}}).status_code
        ] += 1
        clicks += [
            {
                "type": "click",
                "event_id": f"c{wave}-{i}",
                "ts": time.time(),
                "request_id": f"r{wave}-{i}",
                "ad_id": f"a{i % 3}",
                "user_id": f"u{i % USERS}",
            }
        ]
    events = [*clicks, *clicks[:3], {"type": "click", "event_id": "old", "ts": 1.0, "user_id": "u1", "ad_id": "a1"}, {"type": "nonsense"}]
    codes[client.post("/v1/events", json={"events": events}).status_code] += 1
    for wrong in ({"user": {"id": "u1"}}, {**request, "options": {"model": "none"}}, {**request, "options": {"deadline_ms": 0.001}}):
        codes[client.post("/rank", json=wrong).status_code] += 1
    store.pause()
    codes[client.post("/v1/rank", json=request).status_code] += 1
    store.resume()
    assert codes == {200: 2 * USERS + 1, 202: 1, 422: 1, 404: 1, 504: 1}


@pytest.fixture(scope="module")
def watched(tmp_path_factory) -> Iterator[Watched]:
    """All of it at work, and visited while Prometheus looks."""
    tool("prometheus")
    folder, store = tmp_path_factory.mktemp("watched"), Server("valkey")
    models, (port, join_port) = folder / "models", (free_port(), free_port())
    publish(models)
    asyncio.run(fill(store.url))
    # With a long timeout, so that a busy machine degrades nothing.
    settings = environment(models=models, model="din", redis=store.url, port=port, workers=2, store_timeout_ms=500)
    with contextlib.ExitStack() as stack:
        stack.callback(store.stop)
        log = stack.enter_context((folder / "log-of-ranker").open("wb"))
        process = stack.enter_context(ended(subprocess.Popen(SERVE, env=settings, stdout=log, stderr=log)))
        options = ("--window", "0.2", "--lateness", "0.1", "--metrics-port", str(join_port))
        stack.enter_context(ended(join_process(store.url, folder / "log", models, *options)))
        address = stack.enter_context(prometheus(folder, {"adrank": port, "adrank-joiner": join_port}))
        client = stack.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20))
        eventually(lambda: '"ready"' in get(f"http://127.0.0.1:{port}/readyz"))
        eventually(lambda: sum(values(address, "sum(up)")) == 2)
        for wave in range(3):
            visit(client, wave, store)
        yield Watched(
            f"http://127.0.0.1:{port}/metrics", f"http://127.0.0.1:{join_port}/metrics", address, (port, join_port), models, process
        )


def chosen(query: str, **choice: str) -> str:
    """The query as Grafana sends it: with what is chosen of each variable, all where nothing is."""
    for name in ("namespace", "job", "instance", "model"):
        query = query.replace(f"${name}", choice.get(name, ".*"))
    return query.replace("$__rate_interval", "1m")


def test_every_query_of_the_dashboard_is_answered(watched):
    one = {"namespace": "ads", "job": "adrank", "instance": f"127.0.0.1:{watched.ports[0]}", "model": "din"}
    other = {**one, "job": "(adrank|none)", "model": "(din|other)"}
    assert unanswered(watched.prometheus, [chosen(query, **choice) for query in QUERIES for choice in ({}, one, other)]) == []


def test_no_panel_of_another_service_is_answered(watched):
    """So that the test above can fail."""
    mine = [query for query in QUERIES if "$job" in query]
    assert len(unanswered(watched.prometheus, [chosen(query, job="another") for query in mine], 0.1)) == len(mine)


def test_the_variables_offer_what_there_is(watched):
    offered = {}
    for variable in BOARD["templating"]["list"]:
        if variable["type"] == "query":
            metric, label = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]).groups()
            found = asked(f"{watched.prometheus}/api/v1/label/{label}/values?match[]={chosen(metric).replace(' ', '')}")
            offered[variable["name"]] = found
    assert offered == {"namespace": ["ads"], "job": ["adrank"], "instance": [f"127.0.0.1:{watched.ports[0]}"], "model": ["din", "other"]}


def test_every_recording_rule_gives_numbers_and_no_rule_fails(watched):
    assert unanswered(watched.prometheus, [rule["record"] for rule in rules() if "record" in rule]) == []
    groups = asked(f"{watched.prometheus}/api/v1/rules")["groups"]
    assert {(rule["name"], rule["health"], rule.get("lastError")) for group in groups for rule in group["rules"]} == {
        (rule.get("record") or rule["alert"], "ok", None) for rule in rules()
    }


def test_every_alert_looks_at_something(watched):
    alerts = {rule["alert"]: rule["expr"] for rule in rules() if "alert" in rule}
    assert unanswered(watched.prometheus, [found for expr in alerts.values() for found in SELECTOR.findall(expr)]) == []
    # Comparisons that answer yes or no, rather than nothing where it is no, show that both sides have the labels to be compared.
    compared = [re.sub(r" (>=|<=|==|>|<) ", r" \1 bool ", expr) for expr in alerts.values() if " unless " not in expr]
    assert unanswered(watched.prometheus, compared) == []


def test_nothing_is_lost_of_what_was_asked(watched):
    """Two workers write, one of them is scraped, and Prometheus has the sum."""
    ranked = 'sum(adrank_requests_total{route="/rank", outcome="ok"})'
    eventually(lambda: values(watched.prometheus, ranked) == [3 * 2 * USERS])


@pytest.mark.parametrize("page", ["ranker", "joiner"])
def test_the_pages_are_as_prometheus_wants_them(watched, page):
    text = get(getattr(watched, page))
    done = subprocess.run([tool("promtool"), "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_no_series_came_that_was_not_known(watched):
    """So that each known list is whole as far as all this traffic goes."""
    page = get(watched.ranker)
    for name, order, known in (
        ("served_log", ("result",), series.SERVED),
        ("shed", ("reason",), series.SHED),
        ("degraded", ("stage", "reason"), series.DEGRADED),
        ("events", ("type", "result"), series.EVENTS),
        ("feature_lookups", ("group", "result"), series.LOOKUPS),
        ("model_reload", ("result",), series.RELOADS),
    ):
        found = {
            tuple(re.search(rf'{label}="(\w+)"', line)[1] for label in order)
            for line in page.splitlines()
            if line.startswith(f"adrank_{name}_total{{")
        }
        assert found == set(map(tuple, known))


def test_the_pages_have_what_the_design_names_and_not_much_more(watched):
    pages = {page: get(getattr(watched, page)) for page in ("ranker", "joiner")}
    named = {line.split()[2] for text in pages.values() for line in text.splitlines() if line.startswith("# TYPE")}
    assert named >= {f"adrank_{name}" for name in DESIGNED}
    samples = {page: [line for line in text.splitlines() if not line.startswith("#")] for page, text in pages.items()}
    assert len(samples["ranker"]) < 800
    assert len(samples["joiner"]) < 200
    chosen_by_callers = re.compile(r'="(u\d+|a\d+|r\d+-\d+|c\d+-\d+|new|nonsense)"')
    assert [line for lines in samples.values() for line in lines if chosen_by_callers.search(line)] == []


def test_a_model_that_is_let_go_of_leaves_no_age_behind(watched):
    aged = 'adrank_model_version_timestamp_seconds{model="other"}'
    assert aged in get(watched.ranker)
    (watched.models / "other" / CURRENT).unlink()
    eventually(lambda: aged not in get(watched.ranker))
    assert 'adrank_model_version_timestamp_seconds{model="din"}' in get(watched.ranker)


def test_a_ranker_that_ends_is_missed(watched):
    """The last one: what a ranker told must be gone with it, or no alert would see that it is."""

    def alerts():
        return {alert["labels"]["alertname"] for alert in asked(f"{watched.prometheus}/api/v1/alerts")["alerts"]}

    missed = {"AdrankAbsent", "AdrankInstanceDown"}
    assert not missed & alerts()
    watched.process.terminate()
    eventually(lambda: missed <= alerts())
    assert "AdrankNoModel" not in alerts()  # nobody knows
