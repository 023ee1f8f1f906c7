"""Recording and alerting rules as values, and the YAML that Prometheus reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from monitoring.query import Expr, Recording, Scope

EVERYWHERE = Scope({}, "5m")


@dataclass(frozen=True, slots=True)
class Alert:
    """hold: how long it must be so. summary, description: templates of Prometheus.

    RUNBOOK.md has a section of its name.
    """

    name: str
    expr: Expr
    hold: str
    severity: Literal["critical", "warning"]
    summary: str
    description: str


def recording_rules(groups: Mapping[str, Sequence[Recording]]) -> str:
    return _yaml({
        name: [{"record": rule.name, "expr": rule.expr.write(EVERYWHERE)} for rule in rules]
        for name, rules in groups.items()
    })  # fmt: skip


def alerting_rules(groups: Mapping[str, Sequence[Alert]], runbook: str) -> str:
    """runbook: where the runbook is to be found by who is woken."""
    return _yaml({name: [_alert(alert, runbook) for alert in alerts] for name, alerts in groups.items()})


def _alert(alert: Alert, runbook: str) -> dict[str, Any]:
    return {
        "alert": alert.name,
        "expr": alert.expr.write(EVERYWHERE),
        "for": alert.hold,
        "labels": {"severity": alert.severity},
        "annotations": {
            "summary": alert.summary,
            "description": alert.description,
            "runbook_url": f"{runbook}#{alert.name.lower()}",
        },
    }


def _yaml(groups: Mapping[str, Sequence[dict[str, Any]]]) -> str:
    content = {"groups": [{"name": name, "rules": list(rules)} for name, rules in groups.items()]}
    return HEADER + yaml.safe_dump(content, sort_keys=False, width=118, allow_unicode=True)


HEADER = "# Written by deploy/dashboards.py from cluster/metrics.py: change those, not this.\n"
