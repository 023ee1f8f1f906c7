"""A calibrated profile is the device's: all kinds of steps are timed, hiccups do not count, no rate is negative."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.cluster.simulation.calibrate import (
    Limits,
    Scene,
    Timing,
    calibrate,
    fit,
    merged,
    non_negative_least_squares,
    scenes,
)
from shoal.engine.config import ConfigError
from shoal.engine.step_time import StepTime, StepWork

LIMITS = Limits(kv_tokens=20_000, max_model_len=4096, max_step_tokens=1024, max_running_requests=64)
KNOWN = StepTime(base=0.01, per_prefill_token=1e-3, per_decode_token=2e-3, per_context_token=1e-6)

limits = st.builds(
    Limits,
    kv_tokens=st.integers(32, 10**6),
    max_model_len=st.integers(2, 10**5),
    max_step_tokens=st.integers(1, 8192),
    max_running_requests=st.integers(1, 512),
)


@given(limits)
def test_no_scene_is_more_than_the_engine_takes(given_limits: Limits) -> None:
    for scene in scenes(given_limits):
        assert 1 <= scene.num_requests <= given_limits.max_running_requests
        assert scene.num_prompt >= 1
        assert scene.num_new >= 1
        assert scene.num_prompt + scene.num_new <= given_limits.max_model_len
        assert scene.num_requests * (scene.num_prompt + scene.num_new) <= given_limits.kv_tokens


def test_the_scenes_reach_the_ends_of_what_the_engine_takes() -> None:
    found = scenes(LIMITS)
    assert {1, LIMITS.max_running_requests} <= {scene.num_requests for scene in found}
    lengths = {scene.num_prompt for scene in found}
    assert min(lengths) <= LIMITS.max_step_tokens / 64
    assert max(lengths) > LIMITS.max_step_tokens  # a chunk that has a context
    assert len(set(found)) == len(found)


def test_a_hiccup_in_one_repeat_does_not_count() -> None:
    quiet = [Timing(StepWork(64, 0, 0), 0.1), Timing(StepWork(0, 1, 64), 0.02)]
    disturbed = [quiet[0], Timing(StepWork(0, 1, 64), 5.0)]
    assert merged([quiet, disturbed, quiet]) == quiet


def simulated_steps(scene: Scene) -> list[StepWork]:
    """What a scheduler would make of a scene: its prompts in whole steps, one after the other, then decoding."""
    steps = []
    for number in range(scene.num_requests):
        for start in range(0, scene.num_prompt, LIMITS.max_step_tokens):
            chunk = min(LIMITS.max_step_tokens, scene.num_prompt - start)
            steps.append(StepWork(chunk, number, start + number * scene.num_prompt))
    context = scene.num_requests * scene.num_prompt
    return [*steps, *(StepWork(0, scene.num_requests, context + k) for k in range(scene.num_new - 1))]


@pytest.mark.parametrize("known", [KNOWN, StepTime(1e-4, 1.25e-4, 0.0, 0.0), StepTime(0.008, 1e-4, 0.0, 2e-8)])
def test_known_rates_are_found_behind_noise_and_hiccups(known: StepTime) -> None:
    chance = random.Random(7)

    def run(scene: Scene, seed: int) -> list[Timing]:
        hiccup = chance.random() < 0.1
        return [
            Timing(work, known.seconds(*work) * chance.gauss(1, 0.02) * (20 if hiccup else 1))
            for work in simulated_steps(scene)
        ]

    told: list[tuple[int, int]] = []
    found = calibrate(LIMITS, run, on_progress=lambda done, total: told.append((done, total)))
    step = LIMITS.max_step_tokens
    for work in (StepWork(step, 0, 0), StepWork(0, 1, 1000), StepWork(0, 64, 20_000), StepWork(step // 2, 32, 10_000)):
        assert found.step_time.seconds(*work) == pytest.approx(known.seconds(*work), rel=0.08)
    assert found.median_error < 0.05
    assert told[-1] == (len(told), len(told))


numbers = st.floats(0, 100)


@given(st.lists(st.tuples(numbers, numbers, numbers, st.floats(-10, 100), st.floats(0.1, 1)), min_size=1, max_size=20))
def test_least_squares_are_least_and_nothing_is_below_zero(drawn: list[tuple[float, ...]]) -> None:
    """The optimum of a convex problem: no small change of one value makes it better."""
    rows = [row[:3] for row in drawn]
    wanted, weights = [row[3] for row in drawn], [row[4] for row in drawn]

    def loss(x: list[float]) -> float:
        return sum(
            weight * (sum(a * b for a, b in zip(row, x, strict=True)) - value) ** 2
            for row, value, weight in zip(rows, wanted, weights, strict=True)
        )

    x = non_negative_least_squares(rows, wanted, weights)
    assert min(x) >= 0
    least = loss(x)
    for i in range(len(x)):
        for change in (1e-3, -1e-3):
            if x[i] + change >= 0:
                moved = [value + change * (i == j) for j, value in enumerate(x)]
                assert loss(moved) >= least - 1e-4 * (1 + least)


def test_the_fit_tells_how_far_it_is_off() -> None:
    exact = fit([Timing(work, KNOWN.seconds(*work)) for work in simulated_steps(Scene(4, 1000, 5))])
    assert exact.median_error < 1e-6
    assert exact.r2 == pytest.approx(1.0)
    bent = fit([Timing(StepWork(tokens, 0, 0), tokens**1.5) for tokens in (10, 100, 1000, 10_000)])
    assert 0.1 < bent.median_error <= bent.p90_error


def test_an_engine_without_room_for_any_scene_is_refused() -> None:
    with pytest.raises(ConfigError, match="raise max_model_len"):
        calibrate(Limits(64, 3, 64, 4), lambda scene, seed: [], on_progress=lambda done, total: None)


def test_nothing_to_fit_is_an_error() -> None:
    with pytest.raises(ValueError, match="no step"):
        fit([])
