"""A day made by seed, quiet at night and busy at noon, with sharp bursts; and the fewest replicas that would do for it.

Requests come as a Poisson process whose rate changes, made by thinning (Lewis and Shedler, 1979).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Final

from shoal.cluster.simulation.trace import Trace, TracedRequest
from shoal.engine.memory.kv_layout import blocks_needed

DAY_S: Final = 86_400.0
_RISE_S: Final = 30.0
_FALL_S: Final = 60.0
_LEAST_MARGIN: Final = -1.0  # bursts may wait for calmer minutes
_MOST_MARGIN: Final = 8.0


@dataclass(frozen=True, slots=True)
class Burst:
    """From `begin_s` on, for `seconds`, requests come `factor` times as often; up and down within a minute."""

    begin_s: float
    seconds: float
    factor: float

    def factor_at(self, at_s: float) -> float:
        since, until = at_s - self.begin_s, self.begin_s + self.seconds - at_s
        share = min(1.0, since / _RISE_S, until / _FALL_S)
        return 1.0 + (self.factor - 1.0) * max(0.0, share)


@dataclass(frozen=True, slots=True)
class DayCurve:
    """Requests a second: a cosine from midnight to noon and back, `peak` times higher at noon, times its bursts."""

    night_per_s: float
    peak: float
    bursts: tuple[Burst, ...] = ()
    seconds: float = DAY_S

    def __call__(self, at_s: float) -> float:
        noon = (1.0 - math.cos(2.0 * math.pi * at_s / self.seconds)) / 2.0
        rate = self.night_per_s * (1.0 + (self.peak - 1.0) * noon)
        return rate * math.prod(burst.factor_at(at_s) for burst in self.bursts)

    @property
    def highest(self) -> float:
        """No rate is above it."""
        return self.night_per_s * self.peak * math.prod(max(1.0, burst.factor) for burst in self.bursts)


def random_bursts(num: int, *, seconds: float, factor: float, seed: int, day_s: float = DAY_S) -> tuple[Burst, ...]:
    """Bursts at random times, one in each equal part of the day."""
    chance, part = random.Random(seed), day_s / max(1, num)
    return tuple(
        Burst(index * part + chance.uniform(0.0, max(0.0, part - seconds)), seconds, factor) for index in range(num)
    )


def arrivals(curve: DayCurve, chance: random.Random) -> Iterator[float]:
    """Seconds at which requests come, of the whole day."""
    at, highest = 0.0, curve.highest
    while True:
        at += chance.expovariate(highest)
        if at >= curve.seconds:
            return
        if chance.random() * highest < curve(at):
            yield at


@dataclass(frozen=True, slots=True)
class Lengths:
    """Token counts with a heavy tail: lognormal, with this median and sigma (of the logarithm), and cut off."""

    median: float
    sigma: float
    most: int

    def draw(self, chance: random.Random) -> int:
        return max(1, min(self.most, round(self.median * math.exp(chance.gauss(0.0, self.sigma)))))


# About those of Azure's 2023 conversation trace (Patel et al., arXiv 2311.18677): medians of 1,020 and 129 tokens.
PROMPTS: Final = Lengths(1020.0, 1.0, 16_384)
OUTPUTS: Final = Lengths(129.0, 0.8, 2_048)


def day_trace(
    curve: DayCurve,
    *,
    prompts: Lengths = PROMPTS,
    outputs: Lengths = OUTPUTS,
    like: Trace | None = None,
    turns: float = 1.0,
    think_s: float = 60.0,
    block_tokens: int = 64,
    seed: int = 0,
) -> Trace:
    """A day of requests. `like`: take each request's lengths from this trace, at random, instead of drawing them.

    turns: mean number of requests of a conversation, each of which begins with the prompt and answer before it and
    comes `think_s` after it on average; 1 means that no two requests share anything. Conversations that reach the
    longest prompt end there.
    """
    chance = random.Random(seed)
    pairs = [(one.num_prompt, one.num_output) for one in like.requests] if like is not None else None
    most = max(one for one, _ in pairs) if pairs else prompts.most

    def lengths() -> tuple[int, int]:
        return chance.choice(pairs) if pairs else (prompts.draw(chance), outputs.draw(chance))

    requests: list[TracedRequest] = []
    unused = count()
    first = DayCurve(curve.night_per_s / turns, curve.peak, curve.bursts, curve.seconds)
    for number, begin_s in enumerate(arrivals(first, chance)):
        at_s, known, blocks = begin_s, 0, list[int]()
        while at_s < curve.seconds:
            num_new, num_output = lengths()
            num_prompt = known + num_new
            if known and num_prompt > most:
                break
            blocks += (next(unused) for _ in range(blocks_needed(num_prompt, block_tokens) - len(blocks)))
            requests.append(TracedRequest(at_s, num_prompt, num_output, tuple(blocks), f"session-{number}"))
            del blocks[num_prompt // block_tokens :]  # the last one goes on with the answer
            known = num_prompt + num_output
            if chance.random() * turns < 1.0:
                break
            at_s += chance.expovariate(1.0 / think_s)
    requests.sort(key=lambda request: request.arrival_s)
    return Trace("day", requests, block_tokens)


@dataclass(frozen=True, slots=True)
class Schedule:
    """Replicas in each interval of a day."""

    interval_s: float
    replicas: Sequence[int]

    def __call__(self, at_s: float) -> int:
        return self.replicas[min(int(at_s / self.interval_s), len(self.replicas) - 1)]

    @property
    def replica_hours(self) -> float:
        return sum(self.replicas) * self.interval_s / 3600


def oracle_schedule(
    work: Sequence[tuple[float, float]],
    share_kept: Callable[[Schedule], float],
    *,
    interval_s: float = 60.0,
    share: float = 0.99,
    steps: int = 10,
) -> Schedule:
    """The fewest replica-hours that keep the objective for `share` of requests, for one who knows the day beforehand
    and whose replicas start in no time.

    work: (arrival, seconds of one replica) of each request. share_kept: of the requests under a schedule, as a
    simulation tells. An interval gets its load and a margin in proportion to the load's square root (Halfin and Whitt,
    1981), rounded up; the least margin that will do is found by bisection. Raises ValueError if none will.
    """
    last = max(at_s for at_s, _ in work)
    loads = [0.0] * (int(last / interval_s) + 1)
    for at_s, seconds in work:
        loads[int(at_s / interval_s)] += seconds / interval_s

    def schedule(margin: float) -> Schedule:
        return Schedule(interval_s, [max(1, math.ceil(load + margin * math.sqrt(load))) for load in loads])

    low, high = _LEAST_MARGIN, _MOST_MARGIN
    if share_kept(schedule(high)) < share:
        raise ValueError(f"no number of replicas keeps the objective for {share:.0%} of these requests")
    for _ in range(steps):
        middle = (low + high) / 2
        if share_kept(schedule(middle)) >= share:
            high = middle
        else:
            low = middle
    return schedule(high)
