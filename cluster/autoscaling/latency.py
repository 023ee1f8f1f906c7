"""Target replicas from predicted times to first token, KV pressure and the growth of queues. A pure function.

Up at once, to what the coming load needs. Down only to what would have been enough all through the time that a start
takes: a replica that is given up too early is missed for so long.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

from shoal.cluster.autoscaling.demand import Arrivals, Demand, History
from shoal.cluster.autoscaling.signals import ReplicaSignals
from shoal.cluster.autoscaling.staffing import PromptTimes, replicas_needed

FIRST_START_S: Final = 60.0  # assumed until a replica was seen to start
SETTLE_S: Final = 60.0  # beyond a start, until its effect is seen
LATE_SHARE: Final = 0.01  # of requests: an objective is kept for 99 % of them
# Standard errors by which the load may be more than estimated before a replica goes. None are added for going up, so
# that there is a band between the two in which the estimate's noise moves nothing.
_DOWN_SIGMAS: Final = 2.0
_SURE_SIGMAS: Final = 1.0  # by which the load of the last seconds has to be above what is believed
_DOWN_KV_USAGE: Final = 0.9  # of the target: fuller than that, no replica goes
_LARGEST_STEP_DOWN: Final = 0.25  # of the replicas
_KV_MEMORY_S: Final = 30.0
_PROMPT_MEMORY: Final = 2000.0  # prompts
_START_MEMORY: Final = 0.3  # weight of the newest start


@dataclass(frozen=True, slots=True)
class Goals:
    """What the number of replicas is to keep. `max_replicas` is at least 1, and at least `min_replicas`."""

    min_replicas: int
    max_replicas: int
    ttft_s: float
    kv_usage: float
    idle_timeout_s: float  # until the last replica goes, where min_replicas is 0


@dataclass(frozen=True, slots=True)
class ClusterSignals:
    """A model's replicas at one moment. `target`: how many are asked for, those that start included."""

    now_s: float
    target: int
    replicas: Mapping[str, ReplicaSignals]  # those that run
    num_queued: float = 0.0  # requests that wait in gateways for a replica


class Counters(NamedTuple):
    """What was seen of one replica the last time."""

    arrived_tokens: float
    prompts: float
    computed_tokens: float
    computed_tokens_squared: float

    @classmethod
    def of(cls, one: ReplicaSignals) -> Counters:
        return cls(one.arrived_tokens, one.prompts_total, one.uncached_tokens_total, one.uncached_tokens_squared_total)


class PromptSums(NamedTuple):
    """Of the prompts of late: how many, and the seconds that they kept a replica."""

    prompts: float = 0.0
    seconds: float = 0.0
    squares: float = 0.0

    def add(self, prompts: float, seconds: float, squares: float) -> PromptSums:
        kept = max(0.0, 1.0 - prompts / _PROMPT_MEMORY)
        return PromptSums(self.prompts * kept + prompts, self.seconds * kept + seconds, self.squares * kept + squares)

    @property
    def times(self) -> PromptTimes:
        if self.prompts <= 0 or self.seconds <= 0:
            return PromptTimes(0.0, 0.0)
        mean = self.seconds / self.prompts
        return PromptTimes(mean, max(0.0, self.squares / self.prompts / mean**2 - 1.0))

    @property
    def grain_s(self) -> float:
        return self.squares / self.seconds if self.seconds > 0 else 0.0


class Need(NamedTuple):
    """Replicas, and what for."""

    replicas: int
    reason: str


@dataclass(frozen=True, slots=True)
class ScalingState:
    """What is remembered from one decision to the next."""

    seen_s: float | None = None  # None: nothing was seen yet
    seen: Mapping[str, Counters] = field(default_factory=dict)
    num_queued: float = 0.0
    history: History = field(default_factory=History)
    prompts: PromptSums = field(default_factory=PromptSums)
    kv_usage: float = 0.0  # sum over the replicas, smoothed
    active_s: float = 0.0  # when there was anything to do
    lowered_s: float = -math.inf  # when the target last went down
    start_s: float = FIRST_START_S
    asked: tuple[tuple[float, int], ...] = ()  # when, and up to how many replicas that do not all run yet
    enough: tuple[tuple[float, int], ...] = ()  # when, and the replicas that it would have been safe to go down to


class Decision(NamedTuple):
    replicas: int
    reason: str


def target_replicas(signals: ClusterSignals, state: ScalingState, goals: Goals) -> tuple[Decision, ScalingState]:
    """How many replicas there should be from now on, and why. To be asked every few seconds."""
    state = _observe(signals, state)
    if _is_idle(signals, state, goals):
        return _move(signals, state, Decision(0, "idle"))
    prompts, demand = state.prompts.times, state.history.demand(state.prompts.grain_s)
    least = max(1, goals.min_replicas)
    needs = (
        Need(least, "minimum"),
        _for_latency(demand, prompts, state, goals),
        _for_backlog(signals, demand, prompts, state, goals),
        _for_kv(state, goals.kv_usage),
    )
    need = max(needs, key=lambda one: one.replicas)
    careful = max(
        need.replicas,
        _for_latency(demand, prompts, state, goals, sigmas=_DOWN_SIGMAS).replicas,
        _for_kv(state, goals.kv_usage * _DOWN_KV_USAGE).replicas,
    )
    state = _remember_enough(state, signals.now_s, careful)
    if need.replicas > signals.target:
        return _move(signals, state, Decision(min(need.replicas, goals.max_replicas), need.reason))
    return _move(signals, state, _lower(signals, state, least))


def _for_latency(
    demand: Demand, prompts: PromptTimes, state: ScalingState, goals: Goals, *, sigmas: float = 0.0
) -> Need:
    load = demand.load + demand.growth_per_s * state.start_s + sigmas * demand.error
    return Need(replicas_needed(load, prompts, goals.ttft_s, LATE_SHARE, goals.max_replicas), "time to first token")


def _for_backlog(
    signals: ClusterSignals, demand: Demand, prompts: PromptTimes, state: ScalingState, goals: Goals
) -> Need:
    """Enough to work off, in the time of a start, what will wait too long by then: for the load of the last seconds,
    before it is known to last.
    """
    running = len(signals.replicas)
    waiting_s = signals.num_queued * prompts.mean_s
    waiting_s += sum(max(0.0, one.predicted_ttft_s - prompts.mean_s) for one in signals.replicas.values())
    latest = state.history.latest(state.prompts.grain_s)
    load = max(demand.load, latest.load - _SURE_SIGMAS * latest.error)
    growing_s = max(0.0, load - running) * state.start_s
    late_s = waiting_s + growing_s - running * goals.ttft_s
    if late_s <= 0:
        return Need(min(1, math.ceil(signals.num_queued)), "queue")
    return Need(math.ceil(load + late_s / max(state.start_s, goals.ttft_s)), "queue")


def _for_kv(state: ScalingState, usage: float) -> Need:
    return Need(math.ceil(state.kv_usage / usage), "KV memory")


def _lower(signals: ClusterSignals, state: ScalingState, least: int) -> Decision:
    """One step of bounded size, at most."""
    target, now = signals.target, signals.now_s
    window_s = state.start_s + SETTLE_S
    enough = max(max(replicas for _, replicas in state.enough), least)
    is_starting = len(signals.replicas) < target
    has_watched = now - state.enough[0][0] >= window_s and now - state.lowered_s >= SETTLE_S
    if enough >= target or is_starting or not has_watched:
        return Decision(max(target, least), "steady")
    return Decision(max(enough, target - max(1, int(target * _LARGEST_STEP_DOWN))), "less load")


def _is_idle(signals: ClusterSignals, state: ScalingState, goals: Goals) -> bool:
    return goals.min_replicas == 0 and signals.now_s - state.active_s >= goals.idle_timeout_s


def _move(signals: ClusterSignals, state: ScalingState, decision: Decision) -> tuple[Decision, ScalingState]:
    if decision.replicas > signals.target:
        state = replace(state, asked=(*state.asked, (signals.now_s, decision.replicas)))
    elif decision.replicas < signals.target:
        state = replace(state, asked=(), lowered_s=signals.now_s)
    return decision, state


def _remember_enough(state: ScalingState, now: float, replicas: int) -> ScalingState:
    """Keep the window and the one entry before it that tells that the window is full."""
    since = now - state.start_s - SETTLE_S
    recent = [one for one in state.enough if one[0] > since]
    before = [one for one in state.enough if one[0] <= since][-1:]
    return replace(state, enough=(*before, *recent, (now, replicas)))


def _observe(signals: ClusterSignals, state: ScalingState) -> ScalingState:
    """Take in what has come since the last time."""
    now, replicas = signals.now_s, signals.replicas
    is_first = state.seen_s is None
    seconds = 0.0 if state.seen_s is None else now - state.seen_s
    work_s, prompts = 0.0, state.prompts
    known = [one.prefill_tokens_per_s for one in replicas.values() if one.prefill_tokens_per_s > 0]
    typical = sum(known) / len(known) if known else 0.0
    for key, one in replicas.items():
        rate = one.prefill_tokens_per_s or typical
        if is_first or rate <= 0:
            continue
        counters = Counters.of(one)
        new = Counters(*(a - b for a, b in zip(counters, state.seen.get(key, (0.0,) * len(counters)), strict=True)))
        work_s += new.arrived_tokens / rate
        prompts = prompts.add(new.prompts, new.computed_tokens / rate, new.computed_tokens_squared / rate**2)
    work_s += (signals.num_queued - state.num_queued) * prompts.times.mean_s
    busy = signals.num_queued + sum(one.num_running + one.num_waiting for one in replicas.values())
    usage = sum(max(one.kv_usage, one.slot_usage) for one in replicas.values())
    weight = 1.0 - math.exp(-seconds / _KV_MEMORY_S)
    history = state.history.add(Arrivals(seconds, work_s)) if seconds > 0 else state.history
    state = replace(
        state,
        seen_s=now,
        seen={key: Counters.of(one) for key, one in replicas.items()},
        num_queued=signals.num_queued,
        history=history,
        prompts=prompts,
        kv_usage=usage if is_first else state.kv_usage + weight * (usage - state.kv_usage),
        active_s=now if is_first or busy > 0 or work_s > 0 else state.active_s,
    )
    return _learn_start(state, now, len(replicas))


def _learn_start(state: ScalingState, now: float, running: int) -> ScalingState:
    """Each time that as many run as were asked for once, it is known how long that took."""
    start_s = state.start_s
    waiting = state.asked
    while waiting and running >= waiting[0][1]:
        took_s = now - waiting[0][0]
        start_s += _START_MEMORY * (took_s - start_s)
        waiting = waiting[1:]
    return replace(state, start_s=start_s, asked=waiting)
