"""The autoscaling policies as something to ask every few seconds: what was seen stays in here."""

from __future__ import annotations

import math
from collections import deque
from statistics import fmean
from typing import Final

from shoal.cluster.autoscaling.latency import ClusterSignals, Goals, ScalingState, target_replicas

UP_DELAY_S: Final = 30.0  # Ray Serve's own
DOWN_DELAY_S: Final = 600.0
LOOK_BACK_S: Final = 30.0


class LatencyScaler:
    """The latency policy (`target_replicas`) and what it remembers."""

    def __init__(self, goals: Goals) -> None:
        self._goals = goals
        self._state = ScalingState()

    def __call__(self, signals: ClusterSignals) -> int:
        decision, self._state = target_replicas(signals, self._state, self._goals)
        return decision.replicas


class OngoingRequestsScaler:
    """Ray Serve's own policy: `target` ongoing requests for each replica, on average over LOOK_BACK_S.

    It moves once that asked for more replicas all through UP_DELAY_S, or for fewer all through DOWN_DELAY_S, and from
    one to none after `idle_timeout_s`. `max_replicas` is at least 1, and at least `min_replicas`.
    """

    def __init__(self, min_replicas: int, max_replicas: int, *, target: float, idle_timeout_s: float) -> None:
        self._min_replicas = min_replicas
        self._max_replicas = max_replicas
        self._target = target
        self._idle_timeout_s = idle_timeout_s
        self._ongoing: deque[tuple[float, float]] = deque()
        self._direction = 0
        self._since_s = 0.0  # when it began to ask for that direction

    def __call__(self, signals: ClusterSignals) -> int:
        now, target = signals.now_s, signals.target
        if not signals.replicas:
            return max(target, min(1, math.ceil(signals.num_queued)))
        wanted = max(self._min_replicas, min(self._max_replicas, math.ceil(self._average(signals) / self._target)))
        if target > 1:
            wanted = max(1, wanted)
        direction = (wanted > target) - (wanted < target)
        if direction != self._direction:
            self._direction, self._since_s = direction, now
        down_s = DOWN_DELAY_S if wanted else self._idle_timeout_s
        if direction == 0 or now - self._since_s < (UP_DELAY_S if direction > 0 else down_s):
            return target
        self._direction = 0
        return wanted

    def _average(self, signals: ClusterSignals) -> float:
        ongoing = signals.num_queued + sum(one.num_running + one.num_waiting for one in signals.replicas.values())
        self._ongoing.append((signals.now_s, ongoing))
        while signals.now_s - self._ongoing[0][0] >= LOOK_BACK_S:
            self._ongoing.popleft()
        return fmean(number for _, number in self._ongoing)
