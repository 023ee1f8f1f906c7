"""Composition root: a ClusterConfig becomes a Serve application.

`shoal serve` builds it in its own process; a Serve config file names `import_path: shoal.cluster.app:app` and gives
the configuration's keys as `args`.
"""

from __future__ import annotations

import re
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.schema import LoggingConfig

from shoal.cluster.config import ClusterConfig, ModelSettings, parse_config
from shoal.cluster.gateway.deployment import Gateway
from shoal.cluster.replica.deployment import Replica

APP_NAME = "shoal"

# libgomp's threads spin before they sleep between the parallel regions of a step, some 300,000 times by default. On two
# cores with 32 streams over HTTP, not spinning at all costs a quarter of the throughput. The default costs nothing
# there, but a step takes ten times as long when another process wants a core. A short spin has neither fault.
THREAD_ENV = {"GOMP_SPINCOUNT": "3000"}
# A call that waits for a slow step must not be counted as a replica that hangs.
HEALTH_CHECK_PERIOD_S = 5.0
HEALTH_CHECK_TIMEOUT_S = 30.0
LOGGING = LoggingConfig(log_level="INFO", enable_access_log=False)  # /metrics counts requests
DRAIN_TIMEOUT_S = 10.0
DRAIN_POLL_S = 0.2


def app(args: dict[str, Any]) -> Application:
    """Builder for Serve config files. Raises ConfigError."""
    return build_app(parse_config(args, source="args"))


def build_app(
    config: ClusterConfig, *, progress_address: str | None = None, token_ip: str | None = None
) -> Application:
    """Gateways in front of one replica deployment per model.

    Replicas tell how their start goes to `progress_address` ("tcp://ip:port"), if one is given. `token_ip` is the
    address on which each gateway receives tokens; None means its node's own.
    """
    replicas = {
        model.name: _replica(model, _deployment_name(index, model.name), progress_address)
        for index, model in enumerate(config.models)
    }
    gateway = serve.deployment(
        serve.ingress()(Gateway),
        name="gateway",
        num_replicas=config.gateways,
        max_ongoing_requests=100_000,  # calls wait in front of a replica, where the engine can see them
        ray_actor_options={"num_cpus": 0},  # shares the cores that are left
        logging_config=LOGGING,
        graceful_shutdown_timeout_s=DRAIN_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=DRAIN_POLL_S,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=HEALTH_CHECK_TIMEOUT_S,
        max_constructor_retry_count=1,
    )
    return gateway.bind(config.models, config.http, replicas, token_ip)


def num_cpus(model: ModelSettings) -> float:
    """Logical CPUs that Ray sets aside for one replica."""
    if model.resources.num_cpus is not None:
        return model.resources.num_cpus
    return 1.0 if _num_gpus(model) else float(model.num_threads)


def _num_gpus(model: ModelSettings) -> float:
    if model.resources.num_gpus is not None:
        return model.resources.num_gpus
    if model.engine.device == "auto":
        return 1.0 if ray.is_initialized() and ray.cluster_resources().get("GPU", 0) else 0.0
    return 1.0 if model.engine.device == "cuda" else 0.0


def _deployment_name(index: int, model: str) -> str:
    """Serve makes file names of it, so it may not hold every character that a model's name may."""
    return f"replica-{index}-{re.sub(r'[^A-Za-z0-9_.-]+', '-', model)}"


def _replica(model: ModelSettings, name: str, progress_address: str | None) -> Application:
    deployment = serve.deployment(
        Replica,
        name=name,
        num_replicas=model.replicas,
        max_ongoing_requests=model.max_ongoing_requests,
        max_queued_requests=model.max_queued_requests,
        ray_actor_options={
            "num_cpus": num_cpus(model),
            "num_gpus": _num_gpus(model),
            # Ray sets OMP_NUM_THREADS to 1 unless it is told.
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(model.num_threads), **THREAD_ENV}},
        },
        logging_config=LOGGING,
        graceful_shutdown_timeout_s=DRAIN_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=DRAIN_POLL_S,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=HEALTH_CHECK_TIMEOUT_S,
        max_constructor_retry_count=1,
    )
    return deployment.bind(model, progress_address)
