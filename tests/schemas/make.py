"""Make the schemas; README.md says of what."""

import json
from pathlib import Path

from cloudcoil.models.prometheus_operator import v1

KINDS = ("ServiceMonitor", "PodMonitor", "PrometheusRule")


def lean(schema):
    """The schema without what validates nothing, and closed."""
    if isinstance(schema, list):
        return [lean(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    given = [each for each in schema.get("anyOf", []) if each != {"type": "null"}]
    if len(given) == 1 and "anyOf" in schema:
        return lean(given[0])
    kept = {}
    for key, value in schema.items():
        if key in ("properties", "$defs"):
            kept[key] = {name: lean(each) for name, each in value.items()}
        elif key == "pattern":
            kept[key] = value.replace("^(?i)(abort|warn)?$", "^(?i:abort|warn)?$")
        elif key not in ("title", "description", "default"):
            kept[key] = lean(value)
    if kept.get("properties"):
        kept.setdefault("additionalProperties", False)
    return kept


for kind in KINDS:
    schema = lean(getattr(v1, kind).model_json_schema(by_alias=True))
    Path(__file__).with_name(f"{kind}.json").write_text(json.dumps(schema, indent=1, sort_keys=True) + "\n")
