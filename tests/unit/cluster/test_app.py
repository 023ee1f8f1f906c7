"""What Serve is told about the place of a replica, and about the way to it."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.cluster.app import build_app, num_cpus
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
    settings, port, http = admin.init_args
    assert (settings.host, port, http.port) == ("0.0.0.0", 9001, 9000)


def test_a_policy_that_cannot_be_made_is_refused_when_the_application_is_built() -> None:
    with pytest.raises(ConfigError, match=r"no routing policy 'random'.*prefix_aware"):
        build_app(parse_config({"models": [{"routing": "random"}]}))
