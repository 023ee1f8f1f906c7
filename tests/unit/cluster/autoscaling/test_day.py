"""A whole day with a peak of ten times the night, against an oracle that knows it beforehand.

Prompts of 3 s, some 200,000 of them: few, so that the load is harder to tell from chance than with many short ones.
"""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from shoal.cluster.autoscaling.latency import Goals
from shoal.cluster.simulation.day import DAY_S, DayCurve, Schedule, arrivals, oracle_schedule, random_bursts

TTFT_S = 30.0
MEAN_S = 3.0


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_a_day_keeps_the_objective_for_little_more_than_the_oracle_pays(fleet: Any, scaler: Any, seed: int) -> None:
    num_bursts = 4
    curve = DayCurve(0.4, 10.0, random_bursts(num_bursts, seconds=300.0, factor=1.5, seed=seed))
    chance = random.Random(seed)
    sigma = math.sqrt(math.log(2.0))
    prompts = [(at_s, MEAN_S * chance.lognormvariate(-sigma * sigma / 2, sigma)) for at_s in arrivals(curve, chance)]

    def play(schedule: Schedule) -> Any:
        decide = lambda signals: schedule(signals.now_s)  # noqa: E731
        return fleet(decide, start_s=0.0, replicas=schedule(0.0)).play(prompts, DAY_S)

    best = play(oracle_schedule(prompts, lambda schedule: play(schedule).share_within(TTFT_S), steps=8))
    goals = Goals(min_replicas=1, max_replicas=100, ttft_s=TTFT_S, kv_usage=0.8, idle_timeout_s=600.0)
    outcome = fleet(scaler(goals), start_s=60.0).play(prompts, DAY_S)
    assert outcome.share_within(TTFT_S) >= 0.99
    assert outcome.replica_s <= 1.2 * best.replica_s
    assert outcome.reversals() <= 2 * (2 * num_bursts + 1) + 2 * 24
