"""How much work comes, in replicas: what has arrived lately, how sure that is, and whether it grows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

BIN_S: Final = 10.0
MAX_BINS: Final = 96  # 16 minutes at most
_SHORTEST_BINS: Final = 3
_GROWTH_SIGMAS: Final = 2.0
_SIGMAS: Final = 3.0  # by which estimates differ before they count as different


class Arrivals(NamedTuple):
    """Work that came in some seconds, as seconds of one replica."""

    seconds: float
    work_s: float

    @property
    def load(self) -> float:
        return self.work_s / self.seconds if self.seconds > 0 else 0.0


class Demand(NamedTuple):
    """`load` is the replica-seconds of work that come a second now, `error` its standard error, and `growth_per_s` its
    slope as far as that is beyond doubt.
    """

    load: float
    error: float
    growth_per_s: float


@dataclass(frozen=True, slots=True)
class History:
    """Arrivals in bins of at least BIN_S, oldest first; the last one is being filled."""

    bins: tuple[Arrivals, ...] = ()

    def add(self, arrivals: Arrivals) -> History:
        if self.bins and self.bins[-1].seconds < BIN_S:
            return History((*self.bins[:-1], _sum((self.bins[-1], arrivals))))
        return History((*self.bins, arrivals)[-MAX_BINS:])

    def latest(self, grain_s: float) -> Demand:
        """Of the shortest time that tells anything."""
        window = _sum(self.bins[-_SHORTEST_BINS:])
        return Demand(window.load, _error(window, grain_s), 0.0)

    def demand(self, grain_s: float) -> Demand:
        """The mean over the longest time in which the load has not measurably changed, and how it grows within it.

        Lepski's method (On a problem of adaptive estimation in Gaussian white noise, 1991): windows double as long as
        their means agree with those of all shorter ones within the errors. Work comes in grains: a compound Poisson sum
        has a variance of itself times `grain_s`, the mean square of a prompt's seconds over their mean.
        """
        chosen: tuple[Arrivals, ...] = ()
        low, high = -math.inf, math.inf
        for bins in self._windows():
            window = _sum(bins)
            if not low <= window.load <= high:
                break
            chosen, error = bins, _error(window, grain_s)
            low, high = max(low, window.load - _SIGMAS * error), min(high, window.load + _SIGMAS * error)
        window = _sum(chosen)
        growth = _growth(chosen, grain_s)
        return Demand(window.load + growth * window.seconds / 2, _error(window, grain_s), growth)

    def _windows(self) -> Iterator[tuple[Arrivals, ...]]:
        """The newest bins, ever more of them."""
        size = _SHORTEST_BINS
        while size < len(self.bins):
            yield self.bins[-size:]
            size *= 2
        yield self.bins


def _sum(bins: tuple[Arrivals, ...]) -> Arrivals:
    return Arrivals(sum(one.seconds for one in bins), sum(one.work_s for one in bins))


def _error(arrivals: Arrivals, grain_s: float) -> float:
    """Standard error of the load. One grain more than came, so that an empty window does not pass for certain."""
    if arrivals.seconds <= 0:
        return 0.0
    return math.sqrt((max(0.0, arrivals.work_s) + grain_s) * grain_s) / arrivals.seconds


def _growth(bins: tuple[Arrivals, ...], grain_s: float) -> float:
    """How much more load a second the newer half has than the older one, less two standard errors of that."""
    half = len(bins) // 2
    older, newer = _sum(bins[:half]), _sum(bins[half:])
    if older.seconds <= 0 or newer.seconds <= 0:
        return 0.0
    doubt = math.hypot(_error(older, grain_s), _error(newer, grain_s))
    return max(0.0, (newer.load - older.load - _GROWTH_SIGMAS * doubt) / ((older.seconds + newer.seconds) / 2))
