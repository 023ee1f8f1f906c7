"""`shoal status`: what a server is doing, from its admin port's /status and /metrics or from Ray."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from shoal.cluster import metrics
from shoal.cluster.commands.client import ServerError, get, get_json


def status(url: str, *, ray_address: str | None = None, is_json: bool = False) -> int:
    """Print the state; exit code 0 if all is well, 1 if there is no server or it is not healthy."""
    try:
        report = ray_report(ray_address) if ray_address is not None else server_report(url.rstrip("/"))
    except ServerError as error:
        print(f"shoal: error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report, indent=2) if is_json else "\n".join(_lines(report)))
    return 0 if report["is_healthy"] else 1


def server_report(url: str) -> dict[str, Any]:
    """Models, their groups and ranks, from the admin port at `url`. Healthy is a server whose groups are all up.

    Raises ServerError if there is none.
    """
    samples = _samples(get(f"{url}/metrics"))
    models = get_json(f"{url}/status")["models"]
    for model in models:
        measured = _measured(samples, model["name"])
        model["groups"] = [{**group, **measured.get(group["label"], {})} for group in model["groups"]]
    is_healthy = all(model["groups"] and all(map(_is_running, model["groups"])) for model in models)
    return {"url": url, "is_healthy": is_healthy, "models": models}


def _is_running(group: dict[str, Any]) -> bool:
    return bool(group["state"] == "running")


def ray_report(address: str) -> dict[str, Any]:
    """Deployments and their replica states, as Serve sees them. Raises ServerError if there is no Ray."""
    import ray
    from ray import serve

    from shoal.cluster.app import APP_NAME

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise ServerError(f"no Ray at {address} ({error}): start one, or ask a server with --url") from None
    try:
        app = serve.status().applications.get(APP_NAME)
    finally:
        ray.shutdown()
    if app is None:
        raise ServerError(f"no shoal application runs on the Ray at {address}: start it with `shoal serve`")
    return {
        "ray_address": address,
        "is_healthy": app.status.value == "RUNNING",
        "status": app.status.value,
        "deployments": {
            name: {"status": deployment.status.value, "replicas": dict(deployment.replica_states)}
            for name, deployment in app.deployments.items()
        },
    }


def _samples(exposition: str) -> list[Sample]:
    return [sample for family in text_string_to_metric_families(exposition) for sample in family.samples]


def _measured(samples: Iterable[Sample], model: str) -> dict[str, dict[str, Any]]:
    """What the metrics say of each replica of `model`, by its `engine` label."""
    shown = {
        metrics.RUNNING.name: "running",
        metrics.WAITING.name: "waiting",
        metrics.KV_USAGE.name: "kv_usage",
        f"{metrics.PROMPT_TOKENS.name}_total": "prompt_tokens",
        f"{metrics.PREFIX_HITS.name}_total": "cached_tokens",
        f"{metrics.GENERATION_TOKENS.name}_total": "generation_tokens",
        f"{metrics.PREEMPTIONS.name}_total": "preemptions",
        f"{metrics.SPEC_DRAFT_TOKENS.name}_total": "drafted_tokens",
        f"{metrics.SPEC_ACCEPTED.name}_total": "accepted_tokens",
    }
    replicas: dict[str, dict[str, Any]] = {}
    for sample in samples:
        if sample.name in shown and sample.labels.get("model_name") == model:
            engine = sample.labels["engine"]
            is_share = sample.name == metrics.KV_USAGE.name
            value = round(sample.value, 4) if is_share else int(sample.value)
            replicas.setdefault(engine, {})[shown[sample.name]] = value
    return replicas


def _lines(report: dict[str, Any]) -> Iterable[str]:
    yield f"{report.get('url') or report['ray_address']}: {'healthy' if report['is_healthy'] else 'NOT HEALTHY'}"
    for name, deployment in report.get("deployments", {}).items():
        states = ", ".join(f"{count} {state.lower()}" for state, count in deployment["replicas"].items())
        yield f"  {name}: {deployment['status'].lower()} ({states or 'no replicas'})"
    for model in report.get("models", ()):
        yield f"  {model['name']} (up to {model['max_model_len']} tokens): {len(model['groups'])} replica(s)"
        for group in model["groups"]:
            yield from _group_lines(group)


def _group_lines(group: dict[str, Any]) -> Iterable[str]:
    if not _is_running(group):
        yield f"    replica: {group['state']}"
        return
    head = f"    replica {group['label']}: {group['num_blocks'] * group['block_size']} KV tokens"
    if "running" in group:  # otherwise it answered for its state and not for its measurements
        head += (
            f", {group['kv_usage']:.1%} used; {group['running']} running, {group['waiting']} waiting; "
            f"{group['prompt_tokens']} prompt tokens ({_hit_rate(group):.1%} cached), "
            f"{group['generation_tokens']} generated, {group['preemptions']} preemptions"
        )
        if group["drafted_tokens"]:
            head += f", {group['accepted_tokens']} of {group['drafted_tokens']} drafts accepted"
    yield head
    if group.get("routing"):
        yield f"      router: {_routing(group['routing'])}"
    for rank in group["ranks"]:
        last = rank["first_layer"] + rank["num_layers"] - 1
        yield (
            f"      stage {rank['stage']} rank {rank['tensor_rank']}: {rank['node']} pid {rank['pid']}, "
            f"{rank['device_name']}, layers {rank['first_layer']}-{last}, "
            f"weights {_mib(rank['weight_bytes'])}, KV {_mib(rank['kv_bytes'])}"
        )


def _hit_rate(group: dict[str, Any]) -> float:
    """Share of the prompt tokens that were found in the prefix cache."""
    return float(group["cached_tokens"] / group["prompt_tokens"]) if group["prompt_tokens"] else 0.0


def _routing(view: dict[str, Any]) -> str:
    """What the gateway that answered knows of a replica."""
    speed, age = view["seconds_per_prompt_token"], view["staleness_s"]
    return ", ".join(
        (
            f"{view['num_indexed_blocks']} blocks known to be cached",
            f"as of {age:.1f} s ago" if age is not None else "not followed",
            f"{1e3 * speed:.3g} ms a prompt token" if speed is not None else "speed not known yet",
            f"{view['num_tokens_routed']} tokens sent to compute",
        )
    )


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.0f} MiB"
