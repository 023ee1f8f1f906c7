"""What a simulation answers: every request and every replica, as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shoal.cluster.simulation.trace import TracedRequest


@dataclass(frozen=True, slots=True)
class Objectives:
    """What a request should keep; None asks for nothing."""

    ttft_s: float | None = None  # from the arrival to the first token
    tpot_s: float | None = None  # from one token to the next, on average

    def are_met_by(self, served: Served) -> bool:
        if served.is_rejected or (self.ttft_s is not None and served.ttft_s > self.ttft_s):
            return False
        tpot = served.tpot_s
        return self.tpot_s is None or tpot is None or tpot <= self.tpot_s


@dataclass(frozen=True, slots=True)
class Served:
    """One request of the trace and what became of it."""

    arrival_s: float
    num_prompt: int
    num_output: int
    ttft_s: float  # from the arrival to the first token
    finished_s: float
    num_cached: int  # prompt tokens that were not computed
    replica: int | None  # a number in SimulationResult.replicas; None: rejected
    is_rejected: bool = False

    @classmethod
    def refused(cls, traced: TracedRequest) -> Served:
        return cls(
            arrival_s=traced.arrival_s,
            num_prompt=traced.num_prompt,
            num_output=0,
            ttft_s=0.0,
            finished_s=traced.arrival_s,
            num_cached=0,
            replica=None,
            is_rejected=True,
        )

    @property
    def tpot_s(self) -> float | None:
        """Seconds per generated token after the first; None if there is none."""
        if self.num_output < 2:
            return None
        return (self.finished_s - self.arrival_s - self.ttft_s) / (self.num_output - 1)


@dataclass(slots=True)
class ReplicaTime:
    """When a replica was paid for, its start-up included."""

    started_s: float
    stopped_s: float | None  # None: it runs

    @property
    def seconds(self) -> float:
        assert self.stopped_s is not None, self
        return self.stopped_s - self.started_s


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """Requests in the order of their ends."""

    requests: Sequence[Served]
    replicas: Sequence[ReplicaTime]
    wall_s: float  # that the simulation took
    span_s: float  # simulated: from the first arrival until the last request was over
