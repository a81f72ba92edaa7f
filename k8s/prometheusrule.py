"""Make k8s/base/prometheusrule.yaml of prometheus/rules.yml, so that the rules are written once.

python k8s/prometheusrule.py
"""

from pathlib import Path

ROOT = Path(__file__).parent.parent
RULES, RULE = ROOT / "prometheus" / "rules.yml", ROOT / "k8s" / "base" / "prometheusrule.yaml"
HEAD = """\
# Made of prometheus/rules.yml by k8s/prometheusrule.py; change it there.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: adrank
spec:
"""


def prometheus_rule(rules: str) -> str:
    """The rules as a resource of the Prometheus operator, their comments too."""
    return HEAD + "".join(f"  {line}\n" if line else "\n" for line in rules.splitlines())


if __name__ == "__main__":
    RULE.write_text(prometheus_rule(RULES.read_text()))
