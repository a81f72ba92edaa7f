"""The dashboard: what is committed is what the program writes, and whole."""

import json
import re

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from watching import rules

from grafana.dashboard import TARGET, text
from grafana.serving import FAST_ENOUGH

BOARD = json.loads(TARGET.read_text())
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]


def test_it_is_what_the_program_writes():
    assert TARGET.read_text() == text(), "run python -m grafana.dashboard"


def test_grafanas_own_types_read_it_and_lose_nothing():
    register_default_plugins()
    assert json.loads(JSONEncoder().encode(Dashboard.from_json(BOARD))) == BOARD


def test_every_panel_has_what_a_reader_needs():
    assert (BOARD["uid"], BOARD["title"]) == ("adrank", "adrank")
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
    assert len({panel["title"] for panel in PANELS}) == len(PANELS)
    for panel in PANELS:
        assert panel["description"]
        assert panel["targets"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        if panel["type"] in ("timeseries", "stat"):
            assert panel["fieldConfig"]["defaults"]["unit"]
            assert all(target["expr"] and target["legendFormat"] for target in panel["targets"])
        for target in panel["targets"]:
            assert {target["datasource"]["uid"], panel["datasource"]["uid"]} == {"${datasource}"}


def test_no_two_panels_lie_on_each_other():
    taken = [
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for panel in BOARD["panels"]
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    ]
    assert len(taken) == len(set(taken))
    assert max(x for x, _ in taken) < 24


def test_legends_name_labels_that_their_queries_keep():
    for panel in PANELS:
        for target in panel["targets"]:
            named = set(re.findall(r"\{\{(\w+)\}\}", target.get("legendFormat", "")))
            if grouped := re.match(r"(?:histogram_quantile\([\d.]+, |time\(\) - )?(?:sum|max) by \(([\w, ]*)\)", target["expr"]):
                assert named <= set(grouped[1].split(", "))
            assert not target["expr"].startswith("sum (") or not named


def test_the_objective_is_that_of_the_rules_and_no_record_is_for_nobody():
    exprs = {rule.get("record", rule.get("alert")): rule["expr"] for rule in rules()}
    assert f'le="{FAST_ENOUGH}"' in exprs["job:adrank_rankings_slow:rate5m"]
    everything = " ".join([*exprs.values(), *QUERIES])
    unused = [rule["record"] for rule in rules() if "record" in rule and not re.search(rf"{rule['record']}(?!\w)", everything)]
    assert unused == []
