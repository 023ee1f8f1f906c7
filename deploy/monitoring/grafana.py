"""Dashboards as values, and the JSON that Grafana 10 to 12 imports."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal, TypeAlias

from monitoring.objectives import Objectives
from monitoring.query import Expr, Scope, labels_of
from shoal.cluster.metrics import HTTP_OPEN, ITL, METRICS, RUNNING, TTFT, Metric

Json: TypeAlias = dict[str, Any]

SCHEMA_VERSION = 38  # Grafana 10.0's; later ones bring it up to date themselves
WIDTH = 24  # columns of a dashboard
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}

# Variables of every dashboard, by the label that they choose values of, and a metric that has it.
VARIABLES: tuple[tuple[str, Metric], ...] = (
    ("namespace", HTTP_OPEN),
    ("job", HTTP_OPEN),
    ("model_name", RUNNING),
    ("engine", RUNNING),
    ("gateway", HTTP_OPEN),
)
SCOPE = Scope({label: f"${label}" for label, _ in VARIABLES}, "$__rate_interval")
TTFT_OBJECTIVE, ITL_OBJECTIVE = "$ttft_objective", "$itl_objective"


@dataclass(frozen=True, slots=True)
class Query:
    """One query of a panel. legend: its series' name, with `{{label}}` of the result."""

    expr: Expr
    legend: str = ""

    def __post_init__(self) -> None:
        strange = set(re.findall(r"{{(\w+)}}", self.legend)) - self.expr.labels
        assert not strange, f"legend {self.legend!r}: the result has no {strange}, only {sorted(self.expr.labels)}"


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture. about: what to see in it; the metrics' own help follows.

    thresholds: from which value on which colour; below the first one it is `base`. maximum: of the axis. without: shown
    where there is no data.
    """

    title: str
    unit: str
    queries: tuple[Query, ...]
    about: str = ""
    kind: Literal["timeseries", "stat", "bargauge"] = "timeseries"
    width: int = 8
    height: int = 8
    is_stacked: bool = False
    maximum: float | None = None
    without: str | None = None
    base: str = "green"
    thresholds: tuple[tuple[float, str], ...] = ()

    @property
    def metrics(self) -> frozenset[str]:
        return frozenset().union(*(query.expr.metrics for query in self.queries))

    @property
    def description(self) -> str:
        """In the metrics' words."""
        lines = [f"`{name}`: {METRICS[name].help}" for name in sorted(self.metrics)]
        return "\n\n".join(filter(None, (self.about, "\n".join(f"- {line}" for line in lines))))


@dataclass(frozen=True, slots=True)
class Row:
    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Dashboard:
    """uid: stays, whatever the title becomes; links and bookmarks are made of it."""

    uid: str
    title: str
    about: str
    rows: tuple[Row, ...]

    @property
    def panels(self) -> Iterator[Panel]:
        return (panel for row in self.rows for panel in row.panels)

    def json(self, objectives: Objectives) -> Json:
        return {
            "id": None,
            "uid": self.uid,
            "title": self.title,
            "description": self.about,
            "tags": ["shoal"],
            "schemaVersion": SCHEMA_VERSION,
            "version": 1,
            "editable": True,
            "graphTooltip": 1,  # one crosshair for all panels
            "timezone": "browser",
            "refresh": "30s",
            "time": {"from": "now-1h", "to": "now"},
            "timepicker": {},
            "fiscalYearStartMonth": 0,
            "weekStart": "",
            "liveNow": False,
            "annotations": {"list": [_BUILT_IN_ANNOTATIONS]},
            "links": [_LINKS],
            "templating": {"list": list(_variables(objectives))},
            "panels": list(_placed(self.rows)),
        }


def _placed(rows: Sequence[Row]) -> Iterator[Json]:
    """Rows and panels from left to right, from top to bottom."""
    ids = count(1)
    y = 0
    for row in rows:
        yield {
            "id": next(ids),
            "type": "row",
            "title": row.title,
            "collapsed": False,
            "gridPos": {"h": 1, "w": WIDTH, "x": 0, "y": y},
            "panels": [],
        }
        y += 1
        x = height = 0
        for panel in row.panels:
            if x + panel.width > WIDTH:
                x, y, height = 0, y + height, 0
            yield _panel(panel, next(ids), {"h": panel.height, "w": panel.width, "x": x, "y": y})
            x, height = x + panel.width, max(height, panel.height)
        y += height


def _panel(panel: Panel, number: int, position: Json) -> Json:
    defaults: Json = {
        "unit": panel.unit,
        "color": {"mode": "palette-classic" if panel.kind == "timeseries" else "thresholds"},
        "thresholds": {
            "mode": "absolute",
            "steps": [
                {"color": panel.base, "value": None},
                *({"color": color, "value": value} for value, color in panel.thresholds),
            ],
        },
        "mappings": [],
        "min": 0,
    }
    if panel.maximum is not None:
        defaults["max"] = panel.maximum
    if panel.without is not None:
        defaults["noValue"] = panel.without
    if panel.kind == "timeseries":
        defaults["custom"] = _lines(panel)
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "gridPos": position,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": _OPTIONS[panel.kind],
        "targets": [_target(panel, query, chr(ord("A") + place)) for place, query in enumerate(panel.queries)],
    }


def _lines(panel: Panel) -> Json:
    return {
        "drawStyle": "line",
        "lineInterpolation": "linear",
        "lineWidth": 1,
        "fillOpacity": 30 if panel.is_stacked else 8,
        "showPoints": "never",
        "spanNulls": False,
        "stacking": {"mode": "normal" if panel.is_stacked else "none", "group": "A"},
        "thresholdsStyle": {"mode": "dashed" if panel.thresholds else "off"},
    }


def _target(panel: Panel, query: Query, ref: str) -> Json:
    is_now = panel.kind != "timeseries"
    return {
        "refId": ref,
        "datasource": DATASOURCE,
        "editorMode": "code",
        "expr": query.expr.write(SCOPE),
        "legendFormat": query.legend or "__auto",
        "instant": is_now,
        "range": not is_now,
    }


def _variables(objectives: Objectives) -> Iterator[Json]:
    yield {
        "type": "datasource",
        "name": "datasource",
        "label": "Data source",
        "query": "prometheus",
        "current": {},
        "hide": 0,
        "includeAll": False,
        "multi": False,
        "options": [],
        "refresh": 1,
        "regex": "",
        "skipUrlSync": False,
    }
    for label, metric in VARIABLES:
        yield _label_variable(label, metric)
    yield _bound_variable("ttft_objective", "First token within", TTFT, objectives.ttft_s)
    yield _bound_variable("itl_objective", "Next token within", ITL, objectives.itl_s)


def _label_variable(label: str, metric: Metric) -> Json:
    """All values that the label has, any number of which are chosen."""
    assert metric.kind == "gauge", metric
    assert label in labels_of(metric), (label, metric)
    query = f"label_values({metric.name}, {label})"
    return {
        "type": "query",
        "name": label,
        "label": label,
        "datasource": DATASOURCE,
        "definition": query,
        "query": {"query": query, "refId": "StandardVariableQuery"},
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        "allValue": ".*",  # also where nobody gives this label
        "includeAll": True,
        "multi": True,
        "hide": 0,
        "options": [],
        "refresh": 2,  # with the time range
        "regex": "",
        "skipUrlSync": False,
        "sort": 1,
    }


def _bound_variable(name: str, label: str, metric: Metric, chosen: float) -> Json:
    """One of a histogram's bounds, in seconds as its `le` has them."""
    assert chosen in metric.buckets, f"{metric.name} has no bucket up to {chosen:g} s; it has {metric.buckets}"
    options = [{"selected": bound == chosen, "text": f"{bound} s", "value": str(bound)} for bound in metric.buckets]
    return {
        "type": "custom",
        "name": name,
        "label": label,
        "query": ", ".join(f"{bound} s : {bound}" for bound in metric.buckets),
        "current": {"selected": True, "text": f"{chosen} s", "value": str(chosen)},
        "options": options,
        "includeAll": False,
        "multi": False,
        "hide": 0,
        "skipUrlSync": False,
    }


_LINKS = {
    "type": "dashboards",
    "title": "Shoal",
    "tags": ["shoal"],
    "asDropdown": False,
    "icon": "external link",
    "includeVars": True,
    "keepTime": True,
    "targetBlank": False,
    "tooltip": "",
    "url": "",
}
_BUILT_IN_ANNOTATIONS = {
    "builtIn": 1,
    "datasource": {"type": "grafana", "uid": "-- Grafana --"},
    "enable": True,
    "hide": True,
    "iconColor": "rgba(0, 211, 255, 1)",
    "name": "Annotations & Alerts",
    "type": "dashboard",
}
_LAST = {"calcs": ["lastNotNull"], "fields": "", "values": False}
_OPTIONS: dict[str, Json] = {
    "timeseries": {
        "legend": {"calcs": ["mean", "max"], "displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": {
        "colorMode": "value", "graphMode": "none", "justifyMode": "auto", "orientation": "auto",
        "reduceOptions": _LAST, "textMode": "auto",
    },
    "bargauge": {
        "displayMode": "basic", "orientation": "horizontal", "reduceOptions": _LAST, "showUnfilled": True,
        "valueMode": "color",
    },
}  # fmt: skip
