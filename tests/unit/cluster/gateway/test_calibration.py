"""Predictions that drift are corrected, and nothing that was learned stays for ever."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.cluster.gateway.calibration import MAX_ERROR, MIN_ERROR, QUANTILE, Calibration, DrainRate

seconds = st.floats(0, 100)
outcomes = st.lists(st.tuples(seconds, seconds), max_size=300)


def test_without_experience_a_prediction_is_taken_as_it_is() -> None:
    assert Calibration().correct(0.7, 0.0) == 0.7


@given(factor=st.floats(0.4, 3.0), noise=st.floats(0.0, 0.3), seed=st.integers(0, 2**32))
def test_nearly_all_measured_times_stay_within_the_corrected_ones(factor: float, noise: float, seed: int) -> None:
    numbers = random.Random(seed)
    calibration = Calibration()
    num_within, num_asked = 0, 0
    for number in range(600):
        now = 0.05 * number
        predicted_s = numbers.uniform(0.9, 1.0)
        measured_s = predicted_s * factor * math.exp(noise * numbers.gauss(0, 1) - noise)
        if number >= 200:
            num_asked += 1
            num_within += measured_s <= calibration.correct(predicted_s, now) * (1 + 1e-9)
        calibration.learn(predicted_s, measured_s, now)
    assert num_within / num_asked >= QUANTILE - 0.05


@given(factor=st.floats(0.3, 4.9))
def test_a_steady_error_is_corrected_exactly(factor: float) -> None:
    calibration = Calibration()
    for number in range(200):
        calibration.learn(0.8, 0.8 * factor, 0.01 * number)
    assert calibration.correct(0.8, 2.0) == pytest.approx(0.8 * factor)


def test_a_fixed_delay_of_small_predictions_does_not_look_like_a_large_factor() -> None:
    calibration = Calibration()
    for number in range(100):
        predicted_s = 0.002 if number % 2 else 1.0
        calibration.learn(predicted_s, predicted_s + 0.05, 0.01 * number)
    assert calibration.correct(1.0, 1.0) < 1.15


@given(history=outcomes, predicted_s=seconds)
def test_the_correction_is_bounded_whatever_happened(history: list[tuple[float, float]], predicted_s: float) -> None:
    calibration = Calibration()
    for number, (predicted, measured) in enumerate(history):
        calibration.learn(predicted, measured, 0.01 * number)
    corrected_s = calibration.correct(predicted_s, 0.01 * len(history))
    assert predicted_s * (1 + MIN_ERROR) <= corrected_s <= predicted_s * (1 + MAX_ERROR)


@given(history=outcomes)
def test_asking_teaches_nothing(history: list[tuple[float, float]]) -> None:
    calibration = Calibration()
    for predicted, measured in history:
        calibration.learn(predicted, measured, 0.0)
    answers = {calibration.correct(1.0, 0.0) for _ in range(10)}
    assert len(answers) == 1


@given(history=outcomes)
def test_after_a_silence_the_past_is_forgotten(history: list[tuple[float, float]]) -> None:
    calibration = Calibration()
    for predicted, measured in history:
        calibration.learn(predicted, measured, 0.0)
    assert calibration.correct(1.0, 31.0) == 1.0


@given(history=outcomes)
def test_after_a_bad_time_good_predictions_are_believed_again(history: list[tuple[float, float]]) -> None:
    calibration = Calibration()
    for predicted, measured in history:
        calibration.learn(predicted, measured, 0.0)
    for number in range(128):
        calibration.learn(1.0, 1.0, 0.01 * number)
    assert calibration.correct(1.0, 1.28) == pytest.approx(1.0)


def test_a_drain_rate_starts_with_the_replicas_and_becomes_what_is_measured() -> None:
    drain = DrainRate()
    assert drain.rate(4) == 4.0
    for _ in range(1000):
        drain.add(0.05, 0.1)
    assert drain.rate(4) == pytest.approx(0.5, rel=0.9)
    assert 0.5 < drain.rate(1) < 0.7


@given(st.lists(st.tuples(seconds, seconds), max_size=50), st.integers(1, 1000))
def test_a_drain_rate_is_always_positive(parts: list[tuple[float, float]], num_replicas: int) -> None:
    drain = DrainRate()
    for work_s, busy_s in parts:
        drain.add(work_s, busy_s)
    assert 0 < drain.rate(num_replicas) < math.inf
