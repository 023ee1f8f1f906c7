"""Dashboards are what the generator writes, ask only for what a scrape has, and are what Grafana can import."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import closing
from itertools import combinations
from pathlib import Path
from typing import Any

import dashboards
import pytest
from monitoring.grafana import Panel, Query
from monitoring.objectives import Objectives
from monitoring.query import SCRAPE_LABELS, rate
from prometheus_client.parser import text_string_to_metric_families

from shoal.cluster import metrics
from shoal.cluster.gateway.admission import Admission
from shoal.cluster.metrics import METRICS, HttpMetrics, ReplicaMetrics
from shoal.cluster.routing.model_routing import ModelRouting
from shoal.engine.request import EngineStats

ROOT = Path(__file__).resolve().parents[3]
FILES = sorted((ROOT / "deploy/grafana/dashboards").glob("*.json"))
# Metrics that no panel shows -> why.
NOT_SHOWN: dict[str, str] = {}

# Measured by whole deployments only, or where something is configured.
OF_A_CLUSTER = {metric.name for metric in (
    *metrics.AUTH_METRICS, *metrics.CLUSTER_METRICS, metrics.INDEX_BLOCKS, metrics.INDEX_STALENESS, metrics.COST,
    metrics.GATEWAY_TOKENS, metrics.GROUP_RESTARTS, metrics.HELD_SECONDS, metrics.TRACES, metrics.WAITING_BY_REASON,
)}  # fmt: skip
KNOWN_UNITS = {"s", "short", "reqps", "percentunit", "currencyUSD", "suffix: /s", "suffix: tok", "suffix: tok/s"}


def dashboard(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text())
    assert isinstance(content, dict)
    return content


def panels(path: Path) -> list[dict[str, Any]]:
    return [panel for panel in dashboard(path)["panels"] if panel["type"] != "row"]


def test_what_is_committed_is_what_is_generated() -> None:
    assert dashboards.outdated(ROOT, dashboards.contents(Objectives())) == []
    assert {path.stem for path in FILES} == {board.uid for board in dashboards.DASHBOARDS}


def test_the_check_names_what_is_out_of_date(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dashboards.main(["--out", str(tmp_path)]) == 0
    assert dashboards.main(["--out", str(tmp_path), "--check"]) == 0
    (tmp_path / "helm/shoal/rules/alerts.yaml").write_text("groups: []\n")
    (tmp_path / "deploy/grafana/dashboards/shoal-overview.json").unlink()
    assert dashboards.main(["--out", str(tmp_path), "--check"]) == 1
    complaints = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in complaints] == [
        "deploy/grafana/dashboards/shoal-overview.json", "helm/shoal/rules/alerts.yaml",
    ]  # fmt: skip


def test_other_objectives_are_in_rules_and_dashboards(tmp_path: Path) -> None:
    assert dashboards.main(["--out", str(tmp_path), "--ttft-s", "0.5", "--share", "0.9", "--runbook", "https://r"]) == 0
    assert '_bucket{le="0.5"}' in (tmp_path / "deploy/prometheus/rules.yaml").read_text()
    alerts = (tmp_path / "deploy/prometheus/alerts.yaml").read_text()
    assert "runbook_url: https://r#shoalkvfull" in alerts
    assert "longer than 0.5 s for their first token; 10 % may" in alerts
    variables = dashboard(tmp_path / "deploy/grafana/dashboards/shoal-overview.json")["templating"]["list"]
    (objective,) = (one for one in variables if one["name"] == "ttft_objective")
    assert objective["current"]["value"] == "0.5"


def test_an_objective_that_no_bucket_ends_at_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        dashboards.main(["--ttft-s", "3"])
    assert "invalid choice: 3.0" in capsys.readouterr().err


def test_every_metric_is_in_a_panel() -> None:
    shown = {name for board in dashboards.DASHBOARDS for panel in board.panels for name in panel.metrics}
    assert METRICS.keys() - shown == NOT_SHOWN.keys()


def test_panels_tell_what_their_metrics_are() -> None:
    for path in FILES:
        for panel in panels(path):
            asked = {name for target in panel["targets"] for name in metrics_in(target["expr"])}
            assert asked
            assert all(METRICS[name].help in panel["description"] for name in asked), panel["title"]


def metrics_in(query: str) -> set[str]:
    """Names in the list of metrics, without what a scrape appends."""
    suffixes = {"gauge": ("",), "counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}
    in_scrape = {f"{name}{suffix}": name for name, metric in METRICS.items() for suffix in suffixes[metric.kind]}
    return {in_scrape[name] for name in re.findall(r"(?:vllm|shoal):\w+", query)}


def test_queries_name_metrics_and_labels_of_a_scrape(
    scrape: Callable[[int], str], panel_queries: list[tuple[str, str]]
) -> None:
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(scrape(0)):
        for sample in family.samples:
            found.setdefault(sample.name, set(SCRAPE_LABELS)).update(sample.labels)
    wrong = []
    for where, query in panel_queries:
        for name, matchers in re.findall(r"((?:vllm|shoal):\w+)(?:{([^}]*)})?", query):
            if unknown := set(re.findall(r"(\w+)=", matchers)) - found.get(name, set()) or name not in found:
                wrong.append(f"{where}: {name} {unknown}")
    assert not wrong, "\n".join(wrong)
    assert len(panel_queries) > 60


def test_queries_name_what_is_measured(panel_queries: list[tuple[str, str]]) -> None:
    """In this process; tests/e2e/test_serving.py asks a live server the same."""
    http, admission = HttpMetrics(), Admission(NoBackend())
    http.observe(handler="/v1/models", method="GET", status=200, seconds=0.1)
    with closing(ModelRouting("replica")) as routing:
        gateway = (*http.snapshot(), *admission.snapshot("m"), *routing.snapshot("m"))
    text = metrics.render({("m", "0"): ReplicaMetrics().snapshot(EngineStats())}, {"g0": gateway})
    measured = {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}
    asked = {name for _, query in panel_queries for name in re.findall(r"(?:vllm|shoal):\w+", query)}
    assert len(measured & asked) > 40
    elsewhere = {name for name in asked - measured if name.removesuffix("_total") not in OF_A_CLUSTER}
    assert not elsewhere


class NoBackend:
    """Nobody calls."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(name)


def test_prometheus_reads_every_query(
    promtool: Callable[..., str], panel_queries: list[tuple[str, str]], tmp_path: Path
) -> None:
    rules = [{"record": f"panel:{number}", "expr": query} for number, (_, query) in enumerate(panel_queries)]
    file = tmp_path / "queries.yaml"
    file.write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    assert f"{len(rules)} rules found" in promtool("check", "rules", file)


def test_a_legend_names_labels_of_its_result() -> None:
    with pytest.raises(AssertionError, match=r"the result has no .'engine'"):
        Query(rate(metrics.STEPS, ("model_name",)), "{{engine}}")


def test_a_panel_describes_itself_in_the_metrics_words() -> None:
    panel = Panel("Steps", "short", (Query(rate(metrics.STEPS)),), "All of them.")
    assert panel.description == "All of them.\n\n- `shoal:steps`: Engine steps."


# -- what Grafana's model of a dashboard asks for ------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_grafana_can_import_it(path: Path) -> None:
    board = dashboard(path)
    assert board["id"] is None  # else an import would take another dashboard's place
    assert re.fullmatch(r"[a-z-]{1,40}", board["uid"])
    assert board["uid"] == path.stem
    assert board["schemaVersion"] == 38
    assert board["tags"] == ["shoal"]
    assert all(link["type"] == "dashboards" and link["tags"] == ["shoal"] for link in board["links"])
    numbers = [panel["id"] for panel in board["panels"]]
    assert len(numbers) == len(set(numbers))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_panels_are_whole(path: Path) -> None:
    for panel in panels(path):
        assert panel["type"] in {"timeseries", "stat", "bargauge"}
        assert panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        defaults = panel["fieldConfig"]["defaults"]
        assert defaults["unit"] in KNOWN_UNITS
        steps = defaults["thresholds"]["steps"]
        assert steps[0]["value"] is None
        values = [step["value"] for step in steps[1:]]
        assert values == sorted(values)
        refs = [target["refId"] for target in panel["targets"]]
        assert len(refs) == len(set(refs))
        for target in panel["targets"]:
            assert target["instant"] != target["range"]
            assert (panel["type"] == "timeseries") == target["range"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_panels_lie_side_by_side(path: Path) -> None:
    places = [panel["gridPos"] for panel in dashboard(path)["panels"]]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for one, other in combinations(places, 2):
        is_beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        is_above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert is_beside or is_above, (one, other)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_variables_are_declared_and_used(path: Path) -> None:
    board = dashboard(path)
    variables = {one["name"]: one for one in board["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(board["panels"]))) - {"__rate_interval"}
    assert used <= variables.keys()
    assert variables.keys() - used <= {"ttft_objective", "itl_objective", "gateway", "engine"}
    for label in ("namespace", "job", "model_name", "engine", "gateway"):
        one = variables[label]
        assert (one["type"], one["multi"], one["includeAll"], one["allValue"]) == ("query", True, True, ".*")
        asked = re.fullmatch(r"label_values\(([\w:]+), (\w+)\)", one["query"]["query"])
        assert asked
        assert asked[1] in METRICS
        assert asked[2] == label
    for name, metric, chosen in (("ttft_objective", metrics.TTFT, 2.5), ("itl_objective", metrics.ITL, 0.1)):
        assert [float(option["value"]) for option in variables[name]["options"]] == list(metric.buckets)
        assert [option["value"] for option in variables[name]["options"] if option["selected"]] == [str(chosen)]
