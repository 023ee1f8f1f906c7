"""The dashboards' generator, and scrapes to try what it writes on."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pytest

from shoal.cluster.metrics import (
    AUTH_METRICS,
    CLUSTER_METRICS,
    GATEWAY_METRICS,
    REPLICA_METRICS,
    Distribution,
    Metric,
    Point,
    render,
)

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "deploy"))  # as `python deploy/dashboards.py` has it

# Values of labels in made-up scrapes. Of a label not named here, there is one.
VALUES = {
    "status": ("200", "503"),
    "reason": ("cached", "new"),
    "finished_reason": ("stop", "length"),
    "position": ("0", "1"),
    "engine": ("0", "1"),
}
MODEL = "m"
CHOSEN = {"ttft_objective": "2.5", "itl_objective": "0.1", "__rate_interval": "5m"}  # of the dashboards' variables


def chosen(expr: str) -> str:
    """A panel's query as Prometheus is asked it, with all variables as they are at first."""
    return re.sub(r"\$(\w+)", lambda match: CHOSEN.get(match[1], ".*"), expr)


@pytest.fixture(scope="session")
def panel_queries() -> list[tuple[str, str]]:
    """Where it stands, and every panel's query."""
    return [
        (f"{path.stem}: {panel['title']}", chosen(target["expr"]))
        for path in sorted((ROOT / "deploy/grafana/dashboards").glob("*.json"))
        for panel in json.loads(path.read_text())["panels"]
        for target in panel.get("targets", ())
    ]


@pytest.fixture(scope="session")
def promtool() -> Callable[..., str]:
    """Runs it with these arguments and answers what it says; fails when it does."""
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed; Debian has it in the package prometheus")

    def run(*arguments: str | Path) -> str:
        done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="session")
def scrape() -> Callable[[int], str]:
    """The n-th of a row of scrapes in which every metric has values and every counter grows."""
    return _scraped


def _scraped(n: int) -> str:
    """The exposition of two replicas and a gateway, with the labels that a scraper adds."""
    replica, gateway, cluster = (
        tuple(point for metric in of for point in _points(metric, n))
        for of in (REPLICA_METRICS, GATEWAY_METRICS + AUTH_METRICS, CLUSTER_METRICS)
    )
    text = render({(MODEL, engine): replica for engine in VALUES["engine"]}, {"g0": gateway}, cluster)
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return "".join(re.sub(r"({| )", _add_labels, line, count=1) + "\n" for line in lines)


def _add_labels(end_of_name: re.Match[str]) -> str:
    added = 'job="shoal",instance="a:8001"'
    return f"{{{added}," if end_of_name[0] == "{" else f"{{{added}}} "


def _points(metric: Metric, n: int) -> Iterator[Point]:
    of = {"model_name": (MODEL,)} | VALUES
    for labels in product(*(of.get(label, ("x",)) for label in metric.labels)):
        yield Point(metric.name, labels, _value(metric, n))


def _value(metric: Metric, n: int) -> float | Distribution:
    if metric.kind == "histogram":
        return Distribution((n + 1,) * (len(metric.buckets) + 1), 1.5 * n)
    return float(n + 1) if metric.kind == "counter" else 1.0
