"""The latency policy keeps its goals with few replicas, and does not swing.

Measure of swinging: reversals, that is how often the target goes down after it last went up, or the other way. There
are none on a load that is even, at most two an hour on one that is as random as a Poisson process, and at most two for
each real change of the load.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from shoal.cluster.autoscaling.demand import MAX_BINS
from shoal.cluster.autoscaling.latency import ClusterSignals, Goals, ScalingState, target_replicas
from shoal.cluster.autoscaling.signals import ReplicaSignals

HOUR_S = 3600.0
GOALS = Goals(min_replicas=1, max_replicas=50, ttft_s=12.0, kv_usage=0.8, idle_timeout_s=300.0)
IDLE = ReplicaSignals(0.0, 1000.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


@given(load=st.floats(0.1, 8.0), start_s=st.floats(10.0, 300.0))
@settings(max_examples=5, deadline=None, phases=[Phase.generate])
def test_an_even_load_moves_nothing_once_it_is_met(fleet: Any, scaler: Any, load: float, start_s: float) -> None:
    prompts = [(k * 1.5 / load, 1.5) for k in range(int(2 * HOUR_S * load / 1.5))]
    outcome = fleet(scaler(GOALS), start_s=start_s).play(prompts, 2 * HOUR_S)
    assert outcome.reversals() <= 1  # up to what the first queue needs, and down from there
    assert outcome.reversals(after_s=HOUR_S) == 0
    assert load <= outcome.targets[-1][1] <= load + 3


@given(load=st.floats(0.2, 8.0), seed=st.integers(0, 1000), scv=st.floats(0.0, 3.0))
@settings(max_examples=5, deadline=None, phases=[Phase.generate])
def test_a_random_but_constant_load_is_met_without_swinging(
    fleet: Any, scaler: Any, poisson: Any, load: float, seed: int, scv: float
) -> None:
    hours = 3
    prompts = poisson([(hours * HOUR_S, load)], mean_s=1.5, scv=scv, seed=seed)
    outcome = fleet(scaler(GOALS), start_s=60.0).play(prompts, hours * HOUR_S)
    assert outcome.reversals(after_s=HOUR_S) <= 2 * (hours - 1)
    assert outcome.targets[-1][1] >= load


@given(
    loads=st.lists(st.floats(0.3, 10.0), min_size=2, max_size=4),
    start_s=st.floats(20.0, 180.0),
    seed=st.integers(0, 1000),
)
@settings(max_examples=5, deadline=None, phases=[Phase.generate])
def test_each_change_of_load_costs_at_most_two_reversals(
    fleet: Any, scaler: Any, poisson: Any, loads: list[float], start_s: float, seed: int
) -> None:
    prompts = poisson([(HOUR_S, load) for load in loads], mean_s=1.5, scv=1.0, seed=seed)
    hours = len(loads)
    outcome = fleet(scaler(GOALS), start_s=start_s).play(prompts, hours * HOUR_S)
    assert outcome.reversals() <= 2 * hours + 2 * hours  # two for each change, two an hour for what is random
    for hour, load in enumerate(loads, 1):
        (last,) = {replicas for since, replicas in outcome.targets if since == hour * HOUR_S - 10.0}
        assert load <= last <= 1.6 * load + 4


def test_a_growing_load_is_met_before_it_is_there(fleet: Any, scaler: Any, poisson: Any) -> None:
    minutes = [(60.0, 1.0 + 0.05 * minute) for minute in range(100)]
    prompts = poisson(minutes, mean_s=1.5, scv=1.0, seed=3)
    outcome = fleet(scaler(GOALS), start_s=60.0, replicas=3).play(prompts, 6000.0)
    assert outcome.share_within(GOALS.ttft_s) >= 0.99


@given(
    shares=st.lists(st.floats(0.0, 20.0), min_size=1, max_size=6),
    least=st.integers(0, 3),
    most=st.integers(3, 12),
    seed=st.integers(0, 1000),
)
@settings(max_examples=8, deadline=None, phases=[Phase.generate])
def test_targets_stay_in_bounds_and_go_down_in_small_steps_when_nothing_starts(
    fleet: Any, scaler: Any, poisson: Any, shares: list[float], least: int, most: int, seed: int
) -> None:
    goals = dataclasses.replace(GOALS, min_replicas=least, max_replicas=most)
    policy = scaler(goals)
    seen: list[tuple[int, int, int]] = []

    def decide(signals: ClusterSignals) -> int:
        # A fluid fleet has nobody to hold a request while it has no replica.
        target = max(1, policy(signals))
        seen.append((signals.target, target, len(signals.replicas)))
        return target

    prompts = poisson([(600.0, load) for load in shares], mean_s=1.5, scv=1.0, seed=seed)
    fleet(decide, start_s=60.0, replicas=max(1, least)).play(prompts, 600.0 * len(shares))
    for before, after, running in seen:
        assert max(1, least) <= after <= most
        if after < before:
            assert running == before
            assert before - after <= max(1, before // 4)


def test_an_idle_model_goes_to_zero_only_where_that_is_allowed() -> None:
    for least, expected in ((0, 0), (1, 1)):
        goals = dataclasses.replace(GOALS, min_replicas=least)
        state, target = ScalingState(), 1
        for now in range(0, 400, 5):
            replicas = {"a": IDLE} if target else {}
            decision, state = target_replicas(ClusterSignals(float(now), target, replicas), state, goals)
            assert decision.replicas == 1 or now >= GOALS.idle_timeout_s
            target = decision.replicas
        assert target == expected


def test_a_request_that_waits_brings_the_first_replica_at_once() -> None:
    goals = dataclasses.replace(GOALS, min_replicas=0)
    _, state = target_replicas(ClusterSignals(0.0, 0, {}), ScalingState(), goals)
    decision, state = target_replicas(ClusterSignals(1000.0, 0, {}), state, goals)
    assert decision.replicas == 0
    decision, _ = target_replicas(ClusterSignals(1002.0, 0, {}, num_queued=1.0), state, goals)
    assert decision.replicas == 1


def test_a_model_that_works_on_one_long_answer_is_not_idle() -> None:
    goals = dataclasses.replace(GOALS, min_replicas=0)
    state = ScalingState()
    answering = dataclasses.replace(IDLE, num_running=1.0)
    for now in range(0, 3600, 5):
        decision, state = target_replicas(ClusterSignals(float(now), 1, {"a": answering}), state, goals)
        assert decision.replicas == 1


@pytest.mark.parametrize("name", ["kv_usage", "slot_usage"])
def test_full_memory_or_slots_bring_replicas_without_any_queue(name: str) -> None:
    full = dataclasses.replace(IDLE, num_running=8.0, **{name: 0.95})
    decision, _ = target_replicas(ClusterSignals(0.0, 4, dict.fromkeys("abcd", full)), ScalingState(), GOALS)
    assert decision.replicas == math.ceil(4 * 0.95 / GOALS.kv_usage)
    assert decision.reason == "KV memory"


def test_replicas_that_hold_much_memory_are_not_given_up(fleet: Any, scaler: Any) -> None:
    policy = scaler(GOALS)
    outcome = fleet(policy, start_s=60.0, replicas=6, kv_usage=3.0).play([(5.0, 0.1)], HOUR_S)
    assert outcome.targets[-1][1] == math.ceil(3.0 / (GOALS.kv_usage * 0.9))


def test_it_learns_how_long_a_start_takes(fleet: Any, scaler: Any, poisson: Any) -> None:
    policy = scaler(GOALS)
    loads = [(1200.0, load) for load in (1.0, 6.0, 1.0, 6.0, 1.0, 6.0)]
    fleet(policy, start_s=200.0).play(poisson(loads, mean_s=1.5, scv=1.0, seed=1), 7200.0)
    assert 120.0 < policy.state.start_s < 210.0


def test_a_replica_that_dies_takes_no_work_out_of_the_account(fleet: Any, scaler: Any, poisson: Any) -> None:
    """Its counters go with it, and another one's begin at zero: neither may look like a change of the load."""
    policy = scaler(GOALS)
    one = dataclasses.replace(IDLE, prompts_total=1000.0, uncached_tokens_total=4e5, uncached_tokens_squared_total=2e8)
    policy(ClusterSignals(0.0, 2, {"a": one, "b": one}))
    policy(ClusterSignals(5.0, 2, {"a": one}))
    policy(ClusterSignals(10.0, 2, {"a": one, "c": IDLE}))
    assert policy.state.history.demand(0.4).load == 0.0


def test_the_first_look_takes_what_is_there_for_old() -> None:
    busy = dataclasses.replace(IDLE, prompts_total=1e6, uncached_tokens_total=1e9, uncached_tokens_squared_total=1e13)
    decision, state = target_replicas(ClusterSignals(0.0, 1, {"a": busy}), ScalingState(), GOALS)
    decision, state = target_replicas(ClusterSignals(5.0, 1, {"a": busy}), state, GOALS)
    assert decision.replicas == 1


def test_its_memory_is_bounded(fleet: Any, scaler: Any, poisson: Any) -> None:
    policy = scaler(GOALS)
    fleet(policy, start_s=60.0).play(poisson([(6 * HOUR_S, 1.0)], mean_s=1.0, scv=1.0, seed=0), 6 * HOUR_S)
    assert len(policy.state.history.bins) <= MAX_BINS
    assert len(policy.state.enough) < 60
    assert sys.getsizeof(policy.state.seen) < 10_000
