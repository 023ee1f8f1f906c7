"""One answer of many gateways' and replicas' answers: pure functions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from shoal.cluster.admin.cluster import Decisions, Measured
from shoal.cluster.metrics import GATEWAYS, GATEWAYS_SILENT, REPLICAS, Point, render


def exposition(measured: Measured) -> str:
    """Prometheus' text format: replicas once, and every gateway under its label."""
    replicas = {
        (model, label): snapshot
        for model, of_model in measured.replicas.items()
        for label, snapshot in of_model.items()
    }
    return render(replicas, measured.gateways, tuple(_of_cluster(measured)))


def _of_cluster(measured: Measured) -> Iterator[Point]:
    yield Point(GATEWAYS.name, (), float(len(measured.gateways)))
    yield Point(GATEWAYS_SILENT.name, (), float(measured.num_silent))
    for model, of_model in measured.replicas.items():
        yield Point(REPLICAS.name, (model,), float(len(of_model)))


def health(measured: Measured) -> dict[str, Any]:
    """How many answer. What is not there does not make the admin port unwell."""
    return {
        "status": "ok",
        "gateways": len(measured.gateways),
        "gateways_silent": measured.num_silent,
        "replicas": {model: len(of_model) for model, of_model in measured.replicas.items()},
    }


def join_decisions(by_gateway: Mapping[str, Decisions], model: str | None = None) -> list[dict[str, Any]]:
    """Of every model, or of one, its last decisions whoever took them, newest first."""
    names = dict.fromkeys(name for decisions in by_gateway.values() for name in decisions)
    return [
        {"name": name, "decisions": sorted(_marked(by_gateway, name), key=lambda one: float(one["seconds_ago"]))}
        for name in names
        if model in (None, name)
    ]


def _marked(by_gateway: Mapping[str, Decisions], model: str) -> Iterator[dict[str, Any]]:
    for gateway, decisions in by_gateway.items():
        for decision in decisions.get(model, ()):
            yield {**decision, "gateway": gateway}
