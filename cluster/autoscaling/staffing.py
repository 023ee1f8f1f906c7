"""How many replicas a load needs so that few requests wait past the objective. Queueing theory, pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Final, NamedTuple

_NUM_QUANTILES: Final = 20


class PromptTimes(NamedTuple):
    """Seconds that prompts keep a replica, and the squared coefficient of variation of these."""

    mean_s: float
    scv: float

    def quantiles(self) -> Sequence[float]:
        """Of a lognormal distribution with these moments: prompt lengths have a heavy tail."""
        if self.scv <= 0:
            return (self.mean_s,)
        sigma = math.sqrt(math.log1p(self.scv))
        middle = math.log(self.mean_s) - sigma * sigma / 2
        normal = NormalDist(middle, sigma)
        return [math.exp(normal.inv_cdf((k + 0.5) / _NUM_QUANTILES)) for k in range(_NUM_QUANTILES)]


def replicas_needed(load: float, prompts: PromptTimes, ttft_s: float, late_share: float, most: int) -> int:
    """The fewest replicas, up to `most`, with which at most `late_share` of requests get their first token later than
    `ttft_s`. `load`: replica-seconds of work that come a second.

    Prompts that take longer than that by themselves are left out: no number of replicas makes them faster.
    """
    if load <= 0 or prompts.mean_s <= 0:
        return 0
    slack = [ttft_s - own_s for own_s in prompts.quantiles() if own_s < ttft_s]
    if not slack:
        slack = [prompts.mean_s]  # out of reach; waiting should not double it
    low, high = math.floor(load), most  # too few, enough
    while high - low > 1:
        middle = (low + high) // 2
        if _late_share(middle, load, prompts, slack) <= late_share:
            high = middle
        else:
            low = middle
    return high


def _late_share(replicas: int, load: float, prompts: PromptTimes, slack: Sequence[float]) -> float:
    """Share of requests that wait longer than their slack, in seconds.

    M/G/n: Erlang's chance to wait at all, and a wait whose mean is that of M/M/n times (1 + scv) / 2 (Allen and
    Cunneen; Whitt, Approximations for the GI/G/m queue, 1993) with an exponential tail.
    """
    if replicas <= load:
        return 1.0
    rate = 2 * (replicas - load) / (prompts.mean_s * (1 + prompts.scv))
    return waiting_share(replicas, load) * sum(math.exp(-rate * s) for s in slack) / len(slack)


def waiting_share(replicas: int, load: float) -> float:
    """Erlang's C: the share of arrivals that find all replicas busy. `load` is below `replicas`."""
    blocked = 1.0
    for n in range(1, replicas + 1):
        blocked = load * blocked / (n + load * blocked)
    return blocked / (1 - load / replicas * (1 - blocked))
