from __future__ import annotations

import random
from typing import Any

from shoal.cluster.autoscaling.demand import BIN_S, MAX_BINS, Arrivals, History


def history(loads: list[float]) -> History:
    past = History()
    for load in loads:
        past = past.add(Arrivals(BIN_S, BIN_S * load))
    return past


def test_a_constant_load_is_averaged_over_all_that_is_known() -> None:
    chance = random.Random(1)
    loads = [4.0 + chance.choice((-1.0, 1.0)) for _ in range(MAX_BINS)]
    demand = history(loads).demand(1.0)
    assert abs(demand.load - sum(loads) / MAX_BINS) < 1e-9
    assert demand.growth_per_s == 0.0


def test_a_step_is_seen_within_half_a_minute_and_is_no_growth() -> None:
    demand = history([2.0] * 150 + [8.0] * 3).demand(0.5)
    assert demand.load == 8.0
    demand = history([2.0] * 150 + [8.0] * 12).demand(0.5)
    assert demand.load == 8.0
    assert demand.growth_per_s == 0.0


def test_a_steep_ramp_is_growth() -> None:
    demand = history([5.0] * 50 + [5.0 + 2.0 * k for k in range(1, 9)]).demand(0.1)
    assert 0.05 < demand.growth_per_s < 0.3  # 0.2 less the doubt


def test_rare_prompts_do_not_make_an_empty_window_certain() -> None:
    """One prompt of a second every two minutes: the half minutes without one tell nothing."""
    loads = [0.1 if index % 12 == 0 else 0.0 for index in range(150)]
    demand = history(loads).demand(1.0)
    assert 0.005 < demand.load < 0.02


def test_a_load_that_ends_is_believed() -> None:
    assert history([5.0] * 100 + [0.0] * 6).demand(0.3).load == 0.0


def test_memory_is_bounded_and_short_looks_are_put_together() -> None:
    past = History()
    for _ in range(5 * 10 * MAX_BINS):
        past = past.add(Arrivals(1.0, 0.5))
    assert len(past.bins) == MAX_BINS
    assert past.demand(1.0).load == 0.5


def test_nothing_known_is_no_load(fleet: Any) -> None:
    assert History().demand(1.0) == (0.0, 0.0, 0.0)
