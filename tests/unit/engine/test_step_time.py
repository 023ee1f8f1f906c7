"""What a step costs is learned from steps alone."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.engine.step_time import MIN_STEPS, StepTime, StepTimeFit, StepWork, solve


def steps(rng: random.Random, count: int) -> list[StepWork]:
    """Of a busy engine: some decode, some bring prompts, contexts grow and shrink."""
    works = []
    for _ in range(count):
        num_decode = rng.randrange(1, 200)
        num_prefill = rng.choice([0, 0, rng.randrange(1, 8192)])
        works.append(StepWork(num_prefill, num_decode, num_decode * rng.randrange(100, 8000)))
    return works


COEFFICIENTS = st.builds(
    StepTime, st.floats(1e-3, 2e-2), st.floats(1e-5, 1e-3), st.floats(1e-5, 1e-3), st.floats(1e-9, 1e-7)
)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**9), COEFFICIENTS)
def test_noisy_steps_give_their_coefficients_back(seed: int, truth: StepTime) -> None:
    rng, fit = random.Random(seed), StepTimeFit()
    for work in steps(rng, 600):
        fit.add(work, truth.seconds(*work) * rng.uniform(0.9, 1.1))
    learned = fit.estimate()
    assert learned is not None
    for work in steps(rng, 50):
        assert learned.seconds(*work) == pytest.approx(truth.seconds(*work), rel=0.08)


def test_without_noise_each_coefficient_is_found() -> None:
    truth, fit = StepTime(5e-3, 1e-4, 3e-5, 2e-8), StepTimeFit()
    for work in steps(random.Random(1), 600):
        fit.add(work, truth.seconds(*work))
    learned = fit.estimate()
    assert learned is not None
    assert learned.base == pytest.approx(truth.base, rel=0.02)
    assert learned.per_prefill_token == pytest.approx(truth.per_prefill_token, rel=0.02)
    assert learned.per_decode_token == pytest.approx(truth.per_decode_token, rel=0.02)
    assert learned.per_context_token == pytest.approx(truth.per_context_token, rel=0.02)


def test_nothing_is_said_of_too_few_steps() -> None:
    fit = StepTimeFit()
    for _ in range(MIN_STEPS - 1):
        fit.add(StepWork(0, 1, 10), 0.01)
    assert fit.estimate() is None


def test_steps_of_one_kind_are_all_base() -> None:
    fit = StepTimeFit()
    for _ in range(100):
        fit.add(StepWork(0, 8, 4000), 0.012)
    learned = fit.estimate()
    assert learned is not None
    assert learned.base == pytest.approx(0.012)
    assert learned.seconds(0, 16, 8000) == pytest.approx(0.012)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 8192), st.integers(0, 256), st.integers(0, 10**6), st.floats(1e-6, 10.0)),
                min_size=MIN_STEPS, max_size=80))  # fmt: skip
def test_no_step_is_ever_predicted_to_take_less_than_nothing(seen: list[tuple[int, int, int, float]]) -> None:
    fit = StepTimeFit()
    for *work, seconds in seen:
        fit.add(StepWork(*work), seconds)
    learned = fit.estimate()
    assert learned is not None
    assert min(learned.base, learned.per_prefill_token, learned.per_decode_token, learned.per_context_token) >= 0.0


@pytest.mark.parametrize("at", [0, 100])
def test_a_hiccup_hardly_shows(at: int) -> None:
    rng = random.Random(2)
    truth, fit = StepTime(5e-3, 1e-4, 3e-5, 2e-8), StepTimeFit()
    for index, work in enumerate(steps(rng, 200)):
        fit.add(work, truth.seconds(*work) * (50 if index == at else 1))
    learned = fit.estimate()
    assert learned is not None
    for work in steps(rng, 50):
        assert learned.seconds(*work) == pytest.approx(truth.seconds(*work), rel=0.05)


def test_a_lasting_change_is_followed() -> None:
    rng = random.Random(3)
    truth, fit = StepTime(5e-3, 1e-4, 3e-5, 2e-8), StepTimeFit()
    for index, work in enumerate(steps(rng, 4000)):
        fit.add(work, truth.seconds(*work) * (10 if index >= 500 else 1))
    learned = fit.estimate()
    assert learned is not None
    for work in steps(rng, 50):
        assert learned.seconds(*work) == pytest.approx(10 * truth.seconds(*work), rel=0.1)


def test_equations_are_solved() -> None:
    assert solve([[4.0, 1.0, 0.0], [1.0, 3.0, 1.0], [0.0, 1.0, 2.0]], [6.0, 10.0, 8.0]) == pytest.approx(
        [1.0, 2.0, 3.0]
    )
