"""Composition root: a ClusterConfig becomes a Serve application.

`shoal serve` builds it in its own process; a Serve config file names `import_path: shoal.cluster.app:app` and gives
the configuration's keys as `args`.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import ray
from pydantic import BaseModel
from ray import serve
from ray._private.state import available_resources_per_node
from ray.serve import Application, Deployment
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.schema import LoggingConfig

from shoal.cluster.admin.deployment import GATEWAY_NAME as GATEWAY_NAME
from shoal.cluster.admin.deployment import Admin
from shoal.cluster.config import ClusterConfig, LogSettings, ModelSettings, parse_config
from shoal.cluster.gateway.deployment import Gateway
from shoal.cluster.logs import log_environment
from shoal.cluster.replica.deployment import Replica
from shoal.cluster.replica.placement import Placement, Resources, Room, place, take
from shoal.cluster.routing.policies import make_policy
from shoal.cluster.routing.serve_router import ShoalRouter
from shoal.engine.group.processes import SPIN_COUNT

APP_NAME = "shoal"

# A replica whose engine has failed ends its process; Serve learns of it when the next check finds nobody.
HEALTH_CHECK_PERIOD_S = 1.0
# A call that waits for a slow step must not be counted as a replica that hangs.
HEALTH_CHECK_TIMEOUT_S = 30.0
# A rank may die while its group loads: Serve then makes another group. What cannot work at all ends `shoal serve`.
MAX_STARTS = 3
DRAIN_POLL_S = 0.2
ADMIN_SHUTDOWN_S = 5.0
SCALING_METRICS_PERIOD_S = 2.0
SCALING_LOOK_BACK_S = 5.0


def app(args: dict[str, Any]) -> Application:
    """Builder for Serve config files. Raises ConfigError."""
    return build_app(parse_config(args, source="args"))


def build_app(
    config: ClusterConfig,
    *,
    progress_address: str | None = None,
    own_ip: str | None = None,
    runtime_env: Mapping[str, Any] | None = None,
    replica: type[Replica] = Replica,
) -> Application:
    """Gateways in front of one replica deployment per model, and the admin port beside them.

    Replicas tell how their start goes to `progress_address` ("tcp://ip:port"), if one is given. `own_ip` is the
    address on which gateways and replicas hear each other; None means each node's own. `runtime_env` is Ray's, for all
    of them. `replica`: the class, which a benchmark gives an engine that does nothing. Raises ConfigError for a routing
    policy that cannot be made here.

    A deployment's version is made of what its processes begin with: where that stays the same, an update leaves them
    running, whatever else changes.
    """
    for model in config.models:
        make_policy(model.routing.policy, model.routing.options)
    environment = dict(runtime_env or {})
    free, whole = _rooms()
    replicas = {}
    for model in config.models:
        surge, free = _surge(model, free, whole)
        replicas[model.name] = _replica(replica, model, surge, progress_address, own_ip, environment, config.logging)
    models = tuple(model.of_a_gateway for model in config.models)
    gateway = serve.deployment(
        serve.ingress()(Gateway),
        name=GATEWAY_NAME,
        num_replicas=config.gateways,
        max_surge_percent=100,  # they cost next to nothing, and the old ones have streams to finish
        max_ongoing_requests=100_000,  # calls wait in front of a replica, where the engine can see them
        # They share the cores that are left.
        ray_actor_options={"num_cpus": 0, "runtime_env": environment, **_label_selector(config.gateway_labels)},
        logging_config=serve_logging(config.logging),
        graceful_shutdown_timeout_s=max(model.drain_timeout for model in config.models),
        graceful_shutdown_wait_loop_s=DRAIN_POLL_S,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=HEALTH_CHECK_TIMEOUT_S,
        max_constructor_retry_count=1,
    )
    begins_with = (models, config.http, config.auth, config.logging, config.tracing)
    return _with_version(gateway, begins_with, sorted(replicas), own_ip).bind(
        models,
        config.http,
        replicas,
        own_ip,
        admin=_admin(config, environment),
        logs=config.logging,
        tracing=config.tracing,
        auth=config.auth,
    )


def _admin(config: ClusterConfig, runtime_env: Mapping[str, Any]) -> Application:
    """On the head node, where operators look for it and where Serve always has an HTTP proxy."""
    admin = serve.deployment(
        Admin,
        name="admin",
        num_replicas=1,
        ray_actor_options={
            "num_cpus": 0,
            "resources": {"node:__internal_head__": 0.001},
            "runtime_env": dict(runtime_env),
        },
        logging_config=serve_logging(config.logging),
        graceful_shutdown_timeout_s=ADMIN_SHUTDOWN_S,
        graceful_shutdown_wait_loop_s=DRAIN_POLL_S,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=HEALTH_CHECK_TIMEOUT_S,
        max_constructor_retry_count=MAX_STARTS,
    )
    begins_with = (config.admin, config.admin_port, config.http, config.logging)
    return _with_version(admin, begins_with).bind(*begins_with)


def _with_version(deployment: Deployment, *begins_with: Any) -> Deployment:
    """With a version that changes when what its processes begin with does, or the code.

    Serve draws a new version for each deployment that has none, and restarts all of it. It calls versions internal.
    """
    encoded = msgspec.json.encode((_code_version(), begins_with), enc_hook=_plain, order="sorted")
    deployment._version = hashlib.sha256(encoded).hexdigest()[:16]
    return deployment


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else repr(value)


@cache
def _code_version() -> str:
    """Of the source, so that an update brings changed code also where the version number is the same."""
    root = Path(__file__).resolve().parents[1]
    files = sorted(file for part in ("cluster", "engine", "kernels") for file in (root / part).rglob("*.*"))
    digest = hashlib.sha256()
    for file in files:
        if file.suffix in (".py", ".cpp", ".h"):
            digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def _rooms() -> tuple[Room, Room]:
    """What is free on the nodes of the cluster that this process has joined, and all they have; nothing without one."""
    if not ray.is_initialized():
        return {}, {}
    nodes = [node for node in ray.nodes() if node["Alive"]]
    free = available_resources_per_node()
    return (
        {node["NodeID"]: (free.get(node["NodeID"], {}), node["Labels"]) for node in nodes},
        {node["NodeID"]: (node["Resources"], node["Labels"]) for node in nodes},
    )


def _surge(model: ModelSettings, free: Room, whole: Room) -> tuple[int, Room]:
    """How many replicas an update may start beside the old ones, in Serve's percent, and what is free then."""
    left: Room | None = free
    wanted = 1 if model.max_surge is None else model.max_surge
    if model.max_surge is None:
        left = take(_placement(model), free)
        # Where even an empty cluster has no place for it, the old ones go on until there is one.
        wanted = 0 if left is None and take(_placement(model), whole) is not None else 1
    percent = min(100, max(1, 100 * wanted // model.max_replicas)) if wanted else 0
    return percent, free if left is None else left


def num_cpus(model: ModelSettings) -> float:
    """Logical CPUs that Ray sets aside for one replica."""
    return sum(bundle.get("CPU", 0.0) for bundle in _placement(model).bundles)


def _placement(model: ModelSettings) -> Placement:
    rank, nodes = _rank_resources(model), model.nodes
    return place(
        model.tensor_parallel,
        model.pipeline_parallel,
        rank,
        _coordinator_resources(model, rank),
        stages=nodes.stages,
        labels=nodes.labels,
    )


def _rank_resources(model: ModelSettings) -> Resources:
    num_gpus = _num_gpus(model)
    num_cpus = 1.0 if num_gpus else float(model.num_threads)
    return Resources(num_cpus if model.resources.num_cpus is None else model.resources.num_cpus, num_gpus)


def _coordinator_resources(model: ModelSettings, rank: Resources) -> Resources:
    """Beside its ranks'. Where these compute on the CPU it shares their cores, and a single rank is in its process."""
    return Resources(1.0 if rank.num_gpus and model.num_ranks > 1 else 0.0, 0.0)


def _num_gpus(model: ModelSettings) -> float:
    if model.resources.num_gpus is not None:
        return model.resources.num_gpus
    if model.engine.device == "auto":
        return 1.0 if ray.is_initialized() and ray.cluster_resources().get("GPU", 0) else 0.0
    return 1.0 if model.engine.device == "cuda" else 0.0


def deployment_name(model: str) -> str:
    """Serve makes file names of it, so it may not hold every character that a model's name may."""
    clean = re.sub(r"[^A-Za-z0-9_.-]+", "-", model)
    return f"replica-{clean}" if clean == model else f"replica-{clean}-{hashlib.sha256(model.encode()).hexdigest()[:6]}"


def serve_logging(settings: LogSettings) -> LoggingConfig:
    """Serve's own lines look as ours do. It logs no requests: the gateway does."""
    encoding = "JSON" if settings.format == "json" else "TEXT"
    return LoggingConfig(encoding=encoding, log_level=settings.level, enable_access_log=False)


def _replica(
    kind: type[Replica],
    model: ModelSettings,
    surge_percent: int,
    progress_address: str | None,
    own_ip: str | None,
    runtime_env: Mapping[str, Any],
    logs: LogSettings,
) -> Application:
    made_of, rank = model.of_a_replica, _rank_resources(model)
    deployment = serve.deployment(
        kind,
        name=deployment_name(model.name),
        **scaling_options(model),
        max_surge_percent=surge_percent,
        max_ongoing_requests=model.max_ongoing_requests,
        max_queued_requests=model.max_queued_requests,
        request_router_config=RequestRouterConfig(
            request_router_class=ShoalRouter, request_router_kwargs=model.routing.model_dump()
        ),
        logging_config=serve_logging(logs),
        graceful_shutdown_timeout_s=model.drain_timeout,
        graceful_shutdown_wait_loop_s=DRAIN_POLL_S,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=HEALTH_CHECK_TIMEOUT_S,
        max_constructor_retry_count=MAX_STARTS,
        **_where(model, runtime_env, log_environment(logs.format, logs.level)),
    )
    return _with_version(deployment, made_of, rank, own_ip, logs).bind(
        made_of, rank, progress_address, own_ip, logs=logs
    )


def scaling_options(model: ModelSettings) -> dict[str, Any]:
    """Serve's options for the number of replicas."""
    scaling = model.autoscaling
    if scaling is None:
        return {"num_replicas": model.replicas}
    serve_policy: dict[str, Any] = {"downscale_to_zero_delay_s": scaling.idle_timeout}
    if scaling.policy == "latency":
        arguments = {
            "ttft_s": model.target_ttft_s,
            "kv_usage": scaling.target_kv_usage,
            "idle_timeout_s": scaling.idle_timeout,
        }
        policy = AutoscalingPolicy(policy_function="shoal.cluster.autoscaling:LatencyPolicy", policy_kwargs=arguments)
        # The policy alone decides when.
        delays = dict.fromkeys(("upscale_delay_s", "downscale_delay_s", "downscale_to_zero_delay_s"), 0.0)
        serve_policy = {"policy": policy, "look_back_period_s": SCALING_LOOK_BACK_S, **delays}
    with warnings.catch_warnings():
        # Ray 2.60 announces environment variables in place of metrics_interval_s, and does not read them yet.
        warnings.simplefilter("ignore", DeprecationWarning)
        config = AutoscalingConfig(
            min_replicas=scaling.min_replicas,
            initial_replicas=model.first_replicas,
            max_replicas=scaling.max_replicas,
            target_ongoing_requests=scaling.target_ongoing_requests,
            metrics_interval_s=SCALING_METRICS_PERIOD_S,
            **serve_policy,
        )
    return {"autoscaling_config": config}


def _where(model: ModelSettings, runtime_env: Mapping[str, Any], log_env: Mapping[str, str]) -> dict[str, Any]:
    """Serve's options for the place of a replica: an actor if it is one process, else a placement group."""
    # Ray sets OMP_NUM_THREADS to 1 unless it is told. The ranks inherit the environment.
    own = {"OMP_NUM_THREADS": str(model.num_threads), "GOMP_SPINCOUNT": SPIN_COUNT, **log_env}
    environment = {**runtime_env, "env_vars": {**runtime_env.get("env_vars", {}), **own}}
    placement = _placement(model)
    rank = _rank_resources(model)
    if model.num_ranks == 1:
        (labels,) = placement.label_selectors
        actor = {"num_cpus": rank.num_cpus, "num_gpus": rank.num_gpus, "runtime_env": environment}
        return {"ray_actor_options": actor | _label_selector(labels)}
    coordinator = _coordinator_resources(model, rank)
    return {
        "ray_actor_options": {"num_cpus": coordinator.num_cpus, "runtime_env": environment},
        "placement_group_bundles": [dict(bundle) for bundle in placement.bundles],
        "placement_group_strategy": placement.strategy,
        "placement_group_bundle_label_selector": [dict(labels) for labels in placement.label_selectors],
    }


def _label_selector(labels: Mapping[str, str]) -> dict[str, Any]:
    """As an option of a Ray actor; Ray takes no empty one."""
    return {"label_selector": dict(labels)} if labels else {}
