"""A fleet in fluid terms: prompts wait in one line for the replica that is free first."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise

import pytest

from shoal.cluster.autoscaling.latency import ClusterSignals, Goals, ScalingState, target_replicas
from shoal.cluster.autoscaling.signals import ReplicaSignals

TOKENS_PER_S = 1000.0
DECISION_S = 10.0


@dataclass
class FluidReplica:
    """`free_s`: when it will have computed what it has been given."""

    key: str
    asked_s: float
    ready_s: float
    free_s: float
    prompts: int = 0
    tokens: float = 0.0
    squares: float = 0.0

    def take(self, at_s: float, seconds: float) -> float:
        """A prompt of so many seconds; answers its time to the first token."""
        self.free_s = max(self.free_s, at_s) + seconds
        self.prompts += 1
        self.tokens += seconds * TOKENS_PER_S
        self.squares += (seconds * TOKENS_PER_S) ** 2
        return self.free_s - at_s

    def signals(self, now: float, kv_usage: float) -> ReplicaSignals:
        backlog_s = max(0.0, self.free_s - now)
        mean_s = self.tokens / self.prompts / TOKENS_PER_S if self.prompts else 0.0
        return ReplicaSignals(
            prefill_backlog_tokens=backlog_s * TOKENS_PER_S,
            prefill_tokens_per_s=TOKENS_PER_S,
            prompts_total=self.prompts,
            uncached_tokens_total=self.tokens - backlog_s * TOKENS_PER_S,
            uncached_tokens_squared_total=self.squares,
            kv_usage=kv_usage,
            slot_usage=0.0,
            num_running=float(backlog_s > 0),
            num_waiting=0.0,
            predicted_ttft_s=backlog_s + mean_s,
        )


@dataclass
class Outcome:
    ttft_s: list[float] = field(default_factory=list)
    replica_s: float = 0.0
    targets: list[tuple[float, int]] = field(default_factory=list)  # from when on, and how many

    def share_within(self, ttft_s: float) -> float:
        return sum(one <= ttft_s for one in self.ttft_s) / len(self.ttft_s)

    def reversals(self, after_s: float = 0.0) -> int:
        """How often the target turned round: went down after it had gone up last, or the other way."""
        counts = [replicas for since, replicas in self.targets if since >= after_s]
        directions = [b > a for a, b in pairwise(counts) if a != b]
        return sum(a != b for a, b in pairwise(directions))


Prompts = Iterable[tuple[float, float]]  # arrival, seconds of one replica
Decide = Callable[[ClusterSignals], int]


class Fleet:
    """Replicas that take `start_s` to start and finish what they have when they go."""

    def __init__(self, decide: Decide, *, start_s: float, replicas: int = 1, kv_usage: float = 0.0) -> None:
        self._decide = decide
        self._start_s = start_s
        self._kv_usage = kv_usage  # of all replicas' memory together, in replicas
        self._numbers = count()
        self._replicas: list[FluidReplica] = []
        self._line: list[tuple[float, str, FluidReplica]] = []
        self._outcome = Outcome()
        for _ in range(replicas):
            self._add(0.0, 0.0)

    def play(self, prompts: Prompts, until_s: float) -> Outcome:
        now = 0.0
        for at_s, seconds in (*prompts, (until_s, 0.0)):
            while now <= at_s:
                self._resize(now)
                now += DECISION_S
            if at_s < until_s:
                _, key, replica = self._line[0]
                self._outcome.ttft_s.append(replica.take(at_s, seconds))
                heapq.heapreplace(self._line, (replica.free_s, key, replica))
        self._outcome.replica_s += sum(max(until_s, one.free_s) - one.asked_s for one in self._replicas)
        return self._outcome

    def _resize(self, now: float) -> None:
        running = [one for one in self._replicas if one.ready_s <= now]
        usage = self._kv_usage / max(1, len(running))
        signals = ClusterSignals(now, len(self._replicas), {one.key: one.signals(now, usage) for one in running})
        target = self._decide(signals)
        self._outcome.targets.append((now, target))
        while len(self._replicas) < target:
            self._add(now, now + self._start_s)
        while len(self._replicas) > target:
            _, _, idlest = heapq.heappop(self._line)
            self._replicas.remove(idlest)
            self._outcome.replica_s += max(now, idlest.free_s) - idlest.asked_s

    def _add(self, asked_s: float, ready_s: float) -> None:
        replica = FluidReplica(f"replica-{next(self._numbers)}", asked_s, ready_s, ready_s)
        self._replicas.append(replica)
        heapq.heappush(self._line, (replica.free_s, replica.key, replica))


class Scaler:
    """The latency policy with its state."""

    def __init__(self, goals: Goals) -> None:
        self._goals = goals
        self.state = ScalingState()
        self.reasons: list[str] = []

    def __call__(self, signals: ClusterSignals) -> int:
        decision, self.state = target_replicas(signals, self.state, self._goals)
        if decision.replicas != signals.target:
            self.reasons.append(decision.reason)
        return decision.replicas


def _poisson(
    loads: Sequence[tuple[float, float]], *, mean_s: float, scv: float, seed: int
) -> list[tuple[float, float]]:
    chance = random.Random(seed)
    sigma = math.sqrt(math.log1p(scv))
    prompts, begin_s = [], 0.0
    for seconds, load in loads:
        at_s = begin_s
        while load > 0 and (at_s := at_s + chance.expovariate(load / mean_s)) < begin_s + seconds:
            prompts.append((at_s, mean_s * math.exp(chance.gauss(-sigma * sigma / 2, sigma))))
        begin_s += seconds
    return prompts


@pytest.fixture(scope="session")
def fleet() -> type[Fleet]:
    return Fleet


@pytest.fixture(scope="session")
def scaler() -> type[Scaler]:
    return Scaler


@pytest.fixture(scope="session")
def poisson() -> Callable[..., list[tuple[float, float]]]:
    """Prompts at random for (seconds, load in replicas) after (seconds, load)."""
    return _poisson
