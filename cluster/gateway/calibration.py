"""What predictions are worth, learned from what came of them."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from math import ceil
from typing import Final

QUANTILE: Final = 0.98
MIN_ERROR: Final = -0.75
MAX_ERROR: Final = 4.0
_MAX_SAMPLES: Final = 128
_MEMORY_S: Final = 30.0
_MEAN_MEMORY: Final = 0.05  # weight of the newest prediction in their mean
_RATE_MEMORY_S: Final = 10.0
_RATE_PRIOR_S: Final = 1.0


class Calibration:
    """The seconds that a share of QUANTILE of the requests will stay within, from seconds that were predicted.

    A prediction is enlarged by that quantile of the relative errors of the last requests: as split conformal prediction
    does it (Vovk et al., "Algorithmic Learning in a Random World", 2005), of a window, as times change. Errors of small
    predictions are taken relative to the mean prediction, so that a fixed delay does not look like a large factor.

    It cannot wind up: the error is bounded, only what was measured teaches, and what was is soon forgotten.
    """

    def __init__(self) -> None:
        self._errors: deque[tuple[float, float]] = deque()  # (when learned, relative error), oldest first
        self._sorted: list[float] = []
        self._mean_s = 0.0  # of predictions

    def correct(self, predicted_s: float, now: float) -> float:
        self._forget(now)
        if not self._sorted:
            return predicted_s
        return predicted_s * (1.0 + self._sorted[ceil(QUANTILE * len(self._sorted)) - 1])

    def learn(self, predicted_s: float, measured_s: float, now: float) -> None:
        """What was predicted, before correction, took `measured_s`."""
        self._mean_s += (predicted_s - self._mean_s) * (_MEAN_MEMORY if self._mean_s else 1.0)
        scale_s = max(predicted_s, self._mean_s)
        if scale_s <= 0.0:
            return
        error = min(max((measured_s - predicted_s) / scale_s, MIN_ERROR), MAX_ERROR)
        self._errors.append((now, error))
        insort(self._sorted, error)
        self._forget(now)

    def _forget(self, now: float) -> None:
        while self._errors and (len(self._errors) > _MAX_SAMPLES or self._errors[0][0] <= now - _MEMORY_S):
            _, error = self._errors.popleft()
            del self._sorted[bisect_left(self._sorted, error)]


class DrainRate:
    """Seconds of predicted computing that leave a waiting queue in a second: about 1 for each replica where prompts are
    what takes the time, less where finished requests must make room.
    """

    def __init__(self) -> None:
        self._work_s = 0.0
        self._busy_s = 0.0

    def add(self, work_s: float, busy_s: float) -> None:
        """So much left in `busy_s` seconds in which there was always something waiting."""
        self._work_s += work_s
        self._busy_s += busy_s
        if self._busy_s > _RATE_MEMORY_S:
            self._work_s /= 2
            self._busy_s /= 2

    def rate(self, num_replicas: int) -> float:
        """Always positive: until it has been measured, that many replicas at full speed."""
        return (self._work_s + num_replicas * _RATE_PRIOR_S) / (self._busy_s + _RATE_PRIOR_S)
