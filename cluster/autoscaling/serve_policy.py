"""The latency policy as Ray Serve's controller calls it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

from shoal.cluster.autoscaling.latency import ClusterSignals, Goals, ScalingState, target_replicas
from shoal.cluster.autoscaling.signals import ReplicaSignals

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

log = logging.getLogger(__name__)

DECISION_PERIOD_S: Final = 2.0


class LatencyPolicy:
    """A policy for `ray.serve.config.AutoscalingPolicy`, to which these arguments are its `policy_kwargs`.

    The deployment's own delays have to be 0, and its replicas need `record_autoscaling_stats`, which gives the values
    of ReplicaSignals.stats(). Serve asks ten times a second and takes the bounds from its own configuration.
    """

    def __init__(self, *, ttft_s: float, kv_usage: float, idle_timeout_s: float) -> None:
        self._ttft_s = ttft_s
        self._kv_usage = kv_usage
        self._idle_timeout_s = idle_timeout_s
        self._state = ScalingState()

    def __call__(self, ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """The number of replicas, and no state: it stays here."""
        now = ctx.current_time
        assert now is not None, ctx
        if self._state.seen_s is not None and now - self._state.seen_s < DECISION_PERIOD_S:
            return ctx.target_num_replicas, {}
        goals = Goals(
            ctx.capacity_adjusted_min_replicas,
            ctx.capacity_adjusted_max_replicas,
            self._ttft_s,
            self._kv_usage,
            self._idle_timeout_s,
        )
        signals = ClusterSignals(now, ctx.target_num_replicas, _replicas(ctx), ctx.total_queued_requests)
        decision, self._state = target_replicas(signals, self._state, goals)
        if decision.replicas != ctx.target_num_replicas:
            log.info("%s: %d replicas: %s", ctx.deployment_name, decision.replicas, decision.reason)
        return decision.replicas, {}


def _replicas(ctx: AutoscalingContext) -> dict[str, ReplicaSignals]:
    """The last that was heard of each running replica; one that has said nothing yet counts as starting."""
    newest: dict[str, dict[str, float]] = {}
    for name, by_replica in (ctx.raw_metrics or {}).items():
        for replica, series in by_replica.items():
            if series:
                newest.setdefault(replica.unique_id, {})[name] = series[-1].value
    return {key: ReplicaSignals.from_stats(stats) for key, stats in newest.items() if "prompts_total" in stats}
