from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.cluster.autoscaling.staffing import PromptTimes, replicas_needed, waiting_share


@pytest.mark.parametrize(("replicas", "load", "share"), [(1, 0.5, 0.5), (2, 1.0, 1 / 3), (3, 2.0, 4 / 9)])
def test_the_share_that_waits_is_erlangs(replicas: int, load: float, share: float) -> None:
    assert waiting_share(replicas, load) == pytest.approx(share)


@given(
    load=st.floats(0.01, 60.0),
    mean_s=st.floats(0.01, 5.0),
    scv=st.floats(0.0, 5.0),
    ttft_s=st.floats(0.1, 30.0),
)
def test_more_work_or_less_patience_never_needs_fewer(load: float, mean_s: float, scv: float, ttft_s: float) -> None:
    prompts = PromptTimes(mean_s, scv)
    needed = replicas_needed(load, prompts, ttft_s, 0.01, 200)
    assert needed > load
    assert needed <= replicas_needed(load * 1.2, prompts, ttft_s, 0.01, 200)
    assert needed <= replicas_needed(load, prompts, ttft_s, 0.001, 200)


def test_large_fleets_run_fuller() -> None:
    prompts = PromptTimes(0.5, 1.0)
    fullness = [load / replicas_needed(load, prompts, 2.0, 0.01, 1000) for load in (1.0, 5.0, 25.0, 125.0)]
    assert fullness == sorted(fullness)


def test_an_objective_out_of_reach_does_not_take_the_whole_cluster() -> None:
    assert replicas_needed(4.0, PromptTimes(3.0, 0.2), 0.1, 0.01, 1000) <= 8


def test_no_work_needs_nobody_and_too_much_all() -> None:
    assert replicas_needed(0.0, PromptTimes(1.0, 1.0), 2.0, 0.01, 10) == 0
    assert replicas_needed(30.0, PromptTimes(1.0, 1.0), 2.0, 0.01, 10) == 10


@pytest.mark.parametrize(
    ("load", "mean_s", "scv", "ttft_s"), [(1.5, 0.4, 1.0, 3.0), (6.0, 0.4, 1.0, 3.0), (3, 1, 0.3, 6)]
)
def test_so_many_replicas_keep_the_objective(
    fleet: Any, poisson: Any, load: float, mean_s: float, scv: float, ttft_s: float
) -> None:
    needed = replicas_needed(load, PromptTimes(mean_s, scv), ttft_s, 0.01, 100)
    prompts = poisson([(20_000.0, load)], mean_s=mean_s, scv=scv, seed=5)
    reachable = sum(seconds < ttft_s for _, seconds in prompts) / len(prompts)
    kept = fleet(lambda _: needed, start_s=0.0, replicas=needed).play(prompts, 20_000.0).share_within(ttft_s)
    assert kept >= reachable - 0.01
    few = int(load)
    lost = fleet(lambda _: few, start_s=0.0, replicas=few).play(prompts, 20_000.0).share_within(ttft_s)
    assert lost < reachable - 0.01
