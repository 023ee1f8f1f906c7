from __future__ import annotations

from collections.abc import Callable

import pytest

from shoal.cluster.autoscaling.latency import ClusterSignals
from shoal.cluster.autoscaling.scaler import DOWN_DELAY_S, LOOK_BACK_S, UP_DELAY_S, OngoingRequestsScaler
from shoal.cluster.autoscaling.signals import ReplicaSignals

PERIOD_S = 10.0
TARGET = 4.0
IDLE_S = 200.0


def replica(num_running: float) -> ReplicaSignals:
    return ReplicaSignals(0.0, 1000.0, 0.0, 0.0, 0.0, 0.0, 0.0, num_running, 0.0, 0.0)


def play(
    ongoing: Callable[[float], float], until_s: float, *, replicas: int, least: int = 1
) -> list[tuple[float, int]]:
    """When the number of replicas changed, and to what; replicas start in no time."""
    scaler = OngoingRequestsScaler(least, 10, target=TARGET, idle_timeout_s=IDLE_S)
    changes = [(0.0, replicas)]
    for now in (n * PERIOD_S for n in range(int(until_s / PERIOD_S))):
        count = changes[-1][1]
        running = {f"replica-{n}": replica(ongoing(now) / count) for n in range(count)}
        target = scaler(ClusterSignals(now, count, running, num_queued=0.0 if count else ongoing(now)))
        if target != count:
            changes.append((now, target))
    return changes


def test_so_many_ongoing_requests_for_each_replica() -> None:
    assert play(lambda _: 22.0, 1200.0, replicas=2) == [(0.0, 2), (UP_DELAY_S, 6)]
    assert play(lambda _: 22.0, 1200.0, replicas=9) == [(0.0, 9), (DOWN_DELAY_S, 6)]
    assert play(lambda _: 400.0, 1200.0, replicas=9) == [(0.0, 9), (UP_DELAY_S, 10)]


def test_a_moments_peak_or_calm_moves_nothing() -> None:
    assert play(lambda now: 40.0 if now % 300 == 0 else 6.0, 3000.0, replicas=2) == [(0.0, 2)]
    assert play(lambda now: 20.0 if now % 300 == 0 else 2.0, 3000.0, replicas=2) == [(0.0, 2)]


def test_the_last_replica_goes_when_idle_and_comes_back_at_once() -> None:
    changes = play(lambda now: 1.0 if now >= 1500.0 else 0.0, 2000.0, replicas=3, least=0)
    assert changes == [(0.0, 3), (DOWN_DELAY_S, 1), (DOWN_DELAY_S + IDLE_S + PERIOD_S, 0), (1500.0, 1)]


def test_a_load_that_grows_is_seen_after_the_look_back_and_the_delay() -> None:
    ((_, _), (at_s, replicas), *_) = play(lambda now: 4.0 if now < 1000.0 else 40.0, 1200.0, replicas=1)
    assert 1000.0 + UP_DELAY_S <= at_s <= 1000.0 + UP_DELAY_S + LOOK_BACK_S
    assert replicas == pytest.approx(10)
