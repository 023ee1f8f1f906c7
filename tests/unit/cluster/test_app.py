"""What Serve is told about the place of a replica, and about the way to it."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest

from shoal.cluster.app import build_app, deployment_name, num_cpus
from shoal.cluster.config import parse_config
from shoal.cluster.routing.serve_router import ShoalRouter
from shoal.engine.config import ConfigError


def replica(**model: Any) -> Any:
    """Serve's own view of the replica deployment of a model with these settings."""
    engine = {"device": "cpu", "num_threads": 3, **model.pop("engine", {})}
    config = parse_config({"models": [{"name": "m", "engine": engine, **model}]})
    deployments = build_app(config)._bound_deployment.init_args[2]
    return deployments["m"]._bound_deployment._replica_config


def test_a_single_rank_is_one_actor_with_its_threads_and_labels() -> None:
    config = replica(nodes={"labels": {"zone": "a"}})
    assert config.placement_group_bundles is None
    assert (config.ray_actor_options["num_cpus"], config.ray_actor_options["num_gpus"]) == (3, 0)
    assert config.ray_actor_options["label_selector"] == {"zone": "a"}
    assert config.ray_actor_options["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == "3"


def test_a_group_is_a_placement_group_with_its_coordinator_in_the_first_bundle() -> None:
    config = replica(
        tensor_parallel=2,
        pipeline_parallel=2,
        nodes={"stages": "spread", "labels": [{"zone": "a"}, {"zone": "b"}]},
        engine={"device": "cuda"},
    )
    assert config.placement_group_bundles == [{"CPU": 3, "GPU": 2}, {"CPU": 2, "GPU": 2}]
    assert config.placement_group_strategy == "SPREAD"
    assert config.placement_group_bundle_label_selector == [{"zone": "a"}, {"zone": "b"}]
    assert (config.ray_actor_options["num_cpus"], config.ray_actor_options.get("num_gpus", 0)) == (1, 0)


@pytest.mark.parametrize(("shape", "expected"), [({}, 3), ({"tensor_parallel": 2, "pipeline_parallel": 2}, 12)])
def test_the_cpus_of_a_replica_are_those_of_its_ranks(shape: dict[str, int], expected: float) -> None:
    config = parse_config({"models": [{"name": "m", "engine": {"device": "cpu", "num_threads": 3}, **shape}]})
    assert num_cpus(config.models[0]) == expected


def test_serve_routes_with_the_models_policy_and_lets_its_replicas_drain() -> None:
    application = build_app(parse_config({"models": [{"name": "m", "routing": "least_loaded", "drain_timeout": 42}]}))
    config = application._bound_deployment.init_args[2]["m"]._bound_deployment._deployment_config
    assert config.request_router_config.get_request_router_class() is ShoalRouter
    assert config.request_router_config.request_router_kwargs == {"policy": "least_loaded", "options": {}}
    assert config.graceful_shutdown_timeout_s == 42
    assert application._bound_deployment._deployment_config.graceful_shutdown_timeout_s == 42


def test_one_admin_is_part_of_the_application_and_runs_on_the_head_node() -> None:
    application = build_app(parse_config({"http": {"port": 9000}, "admin": {"host": "0.0.0.0"}}))
    admin = application._bound_deployment.init_kwargs["admin"]._bound_deployment
    assert admin.num_replicas == 1
    assert admin._replica_config.ray_actor_options["resources"] == {"node:__internal_head__": 0.001}
    settings, port, http, _ = admin.init_args
    assert (settings.host, port, http.port) == ("0.0.0.0", 9001, 9000)


def test_a_policy_that_cannot_be_made_is_refused_when_the_application_is_built() -> None:
    with pytest.raises(ConfigError, match=r"no routing policy 'random'.*prefix_aware"):
        build_app(parse_config({"models": [{"routing": "random"}]}))


def versions(**config: Any) -> dict[str, str]:
    """Of each deployment: what Serve restarts replicas for when it changes."""
    parsed = parse_config(config)
    gateway = build_app(parsed, progress_address=f"tcp://10.0.0.1:{next(_PORTS)}")._bound_deployment
    replicas = [application._bound_deployment for application in gateway.init_args[2].values()]
    return {deployment.name: deployment._version for deployment in (gateway, *replicas)}


_PORTS = count(5000)
A: dict[str, Any] = {"name": "a", "engine": {"device": "cpu", "num_threads": 1}}
B: dict[str, Any] = {"name": "b/c", "engine": {"device": "cpu", "num_threads": 1}}


def test_the_same_configuration_again_restarts_nothing() -> None:
    assert versions(models=[A, B]) == versions(models=[A, B])
    before, after = versions(models=[A, B]), versions(models=[B, A])
    assert {name: before[name] for name in before if name != "gateway"} == {
        name: after[name] for name in after if name != "gateway"
    }


@pytest.mark.parametrize(
    ("change", "restarted"),
    [
        ({"engine": {**A["engine"], "max_running_requests": 3}}, {"replica-a"}),
        ({"speculative": "ngram"}, {"replica-a", "gateway"}),
        ({"objectives": {"ttft_ms": 5}}, {"gateway"}),
        ({"fairness": {"window_ms": 5}}, {"gateway"}),
        ({"routing": "round_robin"}, {"gateway"}),
        ({"replicas": 3}, set()),
        ({"max_surge": 2}, set()),
        ({"max_ongoing_requests": 7}, set()),
        ({"autoscaling": {"min_replicas": 1, "max_replicas": 4}}, set()),
    ],
)
def test_only_what_a_change_is_about_restarts(change: dict[str, Any], restarted: set[str]) -> None:
    before, after = versions(models=[A, B]), versions(models=[{**A, **change}, B])
    assert {name for name in before if before[name] != after[name]} == restarted


def test_a_gateway_setting_restarts_gateways_only() -> None:
    before, after = versions(models=[A]), versions(models=[A], http={"max_body_bytes": 4096})
    assert {name for name in before if before[name] != after[name]} == {"gateway"}
    assert versions(models=[A], gateways=3) == before


@pytest.mark.parametrize(
    ("max_surge", "replicas", "percent"), [(0, 4, 0), (1, 1, 100), (1, 8, 12), (2, 8, 25), (9, 2, 100)]
)
def test_max_surge_in_the_percent_that_serve_rounds_up(max_surge: int, replicas: int, percent: int) -> None:
    model = {**A, "max_surge": max_surge, "replicas": replicas}
    gateway = build_app(parse_config({"models": [model]}))._bound_deployment
    config = gateway.init_args[2]["a"]._bound_deployment._deployment_config
    assert config.max_surge_percent == percent
    assert -(-percent * replicas // 100) == min(max_surge, replicas)
    assert gateway._deployment_config.max_surge_percent == 100


def test_names_of_deployments_tell_models_apart() -> None:
    names = [deployment_name(name) for name in ("a", "b/c", "b-c", "b:c")]
    assert names[0] == "replica-a"
    assert len(set(names)) == 4
