"""Alerts fire when they should, are silent when not, and say what to do."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dashboards
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "deploy/prometheus"
TESTS = sorted((FOLDER / "tests").glob("*.yaml"))


def rules(file: str) -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load((FOLDER / file).read_text())["groups"] for rule in group["rules"]]


def expectations() -> Iterator[dict[str, Any]]:
    for path in TESTS:
        for test in yaml.safe_load(path.read_text())["tests"]:
            yield from test["promql_expr_test"]


def test_prometheus_reads_the_rules_and_the_configuration(promtool: Callable[..., str]) -> None:
    promtool("check", "rules", "--lint=all", "--lint-fatal", FOLDER / "rules.yaml", FOLDER / "alerts.yaml")
    promtool("check", "config", FOLDER / "prometheus.yaml")


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_alerts_fire_when_they_should(promtool: Callable[..., str], path: Path) -> None:
    assert "SUCCESS" in promtool("test", "rules", path)


def test_every_alert_is_tested_firing_and_silent() -> None:
    names = {rule["alert"] for rule in rules("alerts.yaml")}
    severities = {(rule["alert"], rule["labels"]["severity"]) for rule in rules("alerts.yaml")}
    firing, silent = set(), set()
    for expected in expectations():
        for sample in expected["exp_samples"]:
            name, severity = (re.search(rf'{label}="(\w+)"', sample["labels"]) for label in ("alertname", "severity"))
            assert name
            assert severity
            firing.add((name[1], severity[1]))
        if not expected["exp_samples"]:
            silent |= set(re.findall(r'alertname="(\w+)"', expected["expr"]))
    assert firing == severities
    assert silent == names


def test_a_renamed_metric_fails_the_alerts_tests(promtool: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    for path in (FOLDER / "rules.yaml", FOLDER / "alerts.yaml", FOLDER / "tests/capacity.yaml"):
        renamed = (
            path.read_text().replace("vllm:kv_cache_usage_perc", "vllm:renamed")
            if path.parent == FOLDER
            else path.read_text()
        )
        (tmp_path / path.relative_to(FOLDER)).write_text(renamed)
    with pytest.raises(AssertionError, match="ShoalKvFull"):
        promtool("test", "rules", tmp_path / "tests/capacity.yaml")


def test_every_alert_has_a_section_of_the_runbook() -> None:
    sections = re.findall(r"^## (\w+)$", (FOLDER / "RUNBOOK.md").read_text(), re.MULTILINE)
    assert len(sections) == len(set(sections))
    names = {rule["alert"] for rule in rules("alerts.yaml")}
    assert set(sections) == names
    for rule in rules("alerts.yaml"):
        assert rule["annotations"]["runbook_url"] == f"deploy/prometheus/RUNBOOK.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in {"critical", "warning"}


def test_every_section_of_the_runbook_says_what_it_means_where_to_look_and_what_to_do() -> None:
    for section in (FOLDER / "RUNBOOK.md").read_text().split("\n## ")[1:]:
        assert re.findall(r"^\*\*(\w+)\.\*\*", section, re.MULTILINE) == ["Means", "Look", "Do"], section[:40]


def test_the_runbook_names_panels_and_alerts_that_there_are() -> None:
    text = (FOLDER / "RUNBOOK.md").read_text()
    titles = {panel.title for board in dashboards.DASHBOARDS for panel in board.panels}
    boards = {"Overview", "Engines", "Gateways", "Shoal / Overview", "Gateways and routing", "Targets"}
    assert set(re.findall(r"(?<!\*)\*([^*\n]+)\*(?!\*)", text)) <= titles | boards
    anchors = {rule["alert"].lower() for rule in rules("alerts.yaml")}
    assert set(re.findall(r"\]\(#(\w+)\)", text)) <= anchors


def test_groups_of_both_files_have_names_of_their_own() -> None:
    """The chart puts them into one PrometheusRule."""
    files = [yaml.safe_load((FOLDER / file).read_text()) for file in ("rules.yaml", "alerts.yaml")]
    names = [group["name"] for file in files for group in file["groups"]]
    assert len(names) == len(set(names)) == 8


def test_recordings_are_named_as_prometheus_advises() -> None:
    names = [rule["record"] for rule in rules("rules.yaml")]
    assert len(names) == len(set(names))
    assert all(re.fullmatch(r"shoal:[a-z_]+:[a-z]+[a-z0-9_]*", name) for name in names)
    asked = {name for rule in rules("alerts.yaml") for name in re.findall(r"shoal:\w+:\w+", rule["expr"])}
    assert asked <= set(names)


def test_alerts_group_by_what_tells_clusters_apart() -> None:
    for rule in (*rules("rules.yaml"), *rules("alerts.yaml")):
        groupings = re.findall(r" by \(([^)]*)\)", rule["expr"])
        assert all(grouping.startswith("namespace, job") for grouping in groupings), rule
