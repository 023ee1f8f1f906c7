"""The latency policy as Ray Serve's controller makes and calls it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from ray.serve._private.common import DeploymentID, ReplicaID, TimeStampedValue
from ray.serve.autoscaling_policy import _apply_autoscaling_config
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from shoal.cluster.app import scaling_options
from shoal.cluster.autoscaling.signals import ReplicaSignals
from shoal.cluster.config import ModelSettings, parse_config
from shoal.engine.config import ConfigError

IDLE = ReplicaSignals(0.0, 1000.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
FULL = dataclasses.replace(IDLE, kv_usage=1.0, num_running=8.0)
DEPLOYMENT = DeploymentID("replica-0-tiny", "shoal")


def model(**autoscaling: Any) -> ModelSettings:
    return parse_config({"models": [{"autoscaling": {"max_replicas": 8, **autoscaling}}]}).models[0]


def config_of(settings: ModelSettings) -> AutoscalingConfig:
    config: AutoscalingConfig = scaling_options(settings)["autoscaling_config"]
    return config


def made_by_serve(config: AutoscalingConfig) -> Any:
    """The policy as the controller gets it, pickled, with what Serve does around it."""
    policy = AutoscalingPolicy.from_serialized_policy_def(
        config.policy.model_dump(), config.policy.get_serialized_policy_def()
    )
    return _apply_autoscaling_config(policy.get_policy()(**policy.policy_kwargs))


def context(config: AutoscalingConfig, now: float, target: int, *replicas: ReplicaSignals | None) -> AutoscalingContext:
    """None is a replica that has reported nothing yet."""
    ids = [ReplicaID(f"r{number}", DEPLOYMENT) for number in range(len(replicas))]
    raw: dict[str, dict[ReplicaID, list[TimeStampedValue]]] = {}
    for replica, one in zip(ids, replicas, strict=True):
        for name, value in (one.stats() if one is not None else {}).items():
            raw.setdefault(name, {})[replica] = [TimeStampedValue(now - 1, -1.0), TimeStampedValue(now, value)]
    return AutoscalingContext(
        deployment_id=DEPLOYMENT,
        deployment_name=DEPLOYMENT.name,
        app_name=DEPLOYMENT.app_name,
        current_num_replicas=len(ids),
        target_num_replicas=target,
        running_replicas=ids,
        total_num_requests=0.0,
        total_queued_requests=0.0,
        aggregated_metrics=None,
        raw_metrics=raw,
        capacity_adjusted_min_replicas=config.min_replicas,
        capacity_adjusted_max_replicas=config.max_replicas,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=now,
        config=config,
    )


def test_the_policys_decision_is_serves_at_once() -> None:
    config = config_of(model())
    decide = made_by_serve(config)
    assert decide(context(config, 0.0, 2, FULL, FULL))[0] == 3


def test_between_two_looks_the_target_stays() -> None:
    config = config_of(model())
    decide = made_by_serve(config)
    assert decide(context(config, 0.0, 2, IDLE, IDLE))[0] == 2
    assert decide(context(config, 0.1, 2, FULL, FULL))[0] == 2
    assert decide(context(config, 60.0, 2, FULL, FULL))[0] == 3


def test_a_replica_that_has_reported_nothing_yet_counts_as_starting() -> None:
    config = config_of(model(min_replicas=0, idle_timeout=5))
    decide = made_by_serve(config)
    for now in range(0, 600, 3):
        busy = dataclasses.replace(IDLE, num_running=1.0)
        assert decide(context(config, float(now), 2, busy, None))[0] == 2


def test_an_idle_model_goes_one_step_at_a_time_to_zero() -> None:
    config = config_of(model(min_replicas=0, idle_timeout=30))
    decide = made_by_serve(config)
    targets, target = [], 2
    for now in range(0, 60, 3):
        target = decide(context(config, float(now), target, *[IDLE] * target))[0]
        targets.append(target)
    assert targets[:10] == [2] * 10
    assert targets[10:12] == [1, 0]


def test_the_objective_is_the_target_where_no_other_is_given() -> None:
    objective = {"ttft_ms": 700}
    asked = parse_config({"models": [{"objectives": objective, "autoscaling": {"max_replicas": 2}}]}).models[0]
    assert config_of(asked).policy.policy_kwargs["ttft_s"] == 0.7
    own = {"max_replicas": 2, "target_ttft_ms": 300}
    assert parse_config({"models": [{"objectives": objective, "autoscaling": own}]}).models[0].target_ttft_s == 0.3
    assert model().target_ttft_s == 2.0


def test_the_plain_policy_is_serves_own() -> None:
    config = config_of(model(policy="ongoing_requests", target_ongoing_requests=5))
    assert config.policy.is_default_policy_function()
    assert config.target_ongoing_requests == 5


def test_it_begins_with_so_many_replicas() -> None:
    assert config_of(model(min_replicas=0)).initial_replicas == 1
    assert config_of(model(min_replicas=3)).initial_replicas == 3


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"autoscaling": {"min_replicas": 3, "max_replicas": 2}}, "2 is less than min_replicas 3"),
        ({"replicas": 5, "autoscaling": {"max_replicas": 4}}, "replicas 5 to begin with are more than max_replicas 4"),
        ({"autoscaling": {}}, r"autoscaling\.max_replicas"),
    ],
)
def test_bounds_that_contradict_each_other_are_refused(keys: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse_config({"models": [keys]})


def test_stats_survive_the_way_through_serve() -> None:
    assert ReplicaSignals.from_stats(FULL.stats()) == FULL
    with pytest.raises(KeyError, match="kv_usage"):
        ReplicaSignals.from_stats({name: 0.0 for name in FULL.stats() if name != "kv_usage"})
