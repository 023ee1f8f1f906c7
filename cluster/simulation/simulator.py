"""Replays a trace: arrivals, the router, replicas on simulated clocks, and the autoscaler, event by event.

The router, the scheduler, the block manager and the autoscaling policy are the ones that serve; only the device and
the network are replaced, by a step-time model. Steps that are alike are taken many at a time.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

from shoal.cluster.routing.policies import Policy
from shoal.cluster.routing.router import Router
from shoal.cluster.simulation.profile import HardwareProfile
from shoal.cluster.simulation.replica import SimulatedReplica
from shoal.cluster.simulation.result import Objectives, ReplicaTime, Served, SimulationResult
from shoal.cluster.simulation.trace import Trace, TracedRequest
from shoal.engine.memory.kv_events import BlocksRemoved, BlocksStored
from shoal.engine.request import BlockHash, Request, RequestId, RequestOutput, SamplingParams

DEFAULT_BLOCK_SIZE = 512

NextRequest = Callable[[Served], TracedRequest | None]


@dataclass(slots=True)
class _Open:
    """A request that is being served."""

    traced: TracedRequest
    replica: int
    first_token_s: float = 0.0
    num_cached: int = 0


@dataclass(slots=True)
class _Fleet:
    """Replicas by number, those that are gone included."""

    replicas: list[SimulatedReplica] = field(default_factory=list)
    times: list[ReplicaTime] = field(default_factory=list)
    draining: set[int] = field(default_factory=set)


class Simulation:
    """One run. `run` answers when every request has ended."""

    def __init__(
        self,
        trace: Trace,
        profile: HardwareProfile,
        policy: Policy,
        num_replicas: int,
        *,
        objectives: Objectives | None = None,
        has_admission: bool = False,
        next_request: NextRequest | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._trace = trace
        self._profile = profile
        self._objectives = objectives or Objectives()
        self._has_admission = has_admission
        self._next_request = next_request
        self._on_progress = on_progress
        self._block_size = profile.block_tokens or trace.block_tokens or DEFAULT_BLOCK_SIZE
        self._now = 0.0
        self._router = Router(policy, clock=lambda: self._now)
        self._replicas: list[SimulatedReplica] = []
        self._times: list[ReplicaTime] = []
        self._slots: list[int] = []
        self._open: dict[str, _Open] = {}
        self._served: list[Served] = []
        self._events: list[tuple[float, int, int]] = []  # (when, order, replica whose steps end then)
        self._order = count()
        self._number = count()
        for _ in range(num_replicas):
            self._start_replica()

    def run(self) -> SimulationResult:
        start = time.perf_counter()
        arrivals = [(request.arrival_s, next(self._order), request) for request in self._trace.requests]
        heapq.heapify(arrivals)
        total = len(arrivals)
        while arrivals or self._events:
            if arrivals and (not self._events or arrivals[0][0] <= self._events[0][0]):
                self._now, _, request = heapq.heappop(arrivals)
                self._arrive(request)
                continue
            at, _, number = heapq.heappop(self._events)
            replica = self._replicas[number]
            if at != replica.ends_s:
                continue  # its end was moved when a request came
            self._now = at
            for served in self._finish(number, replica):
                follower = self._next_request(served) if self._next_request is not None else None
                if follower is not None:
                    total += 1
                    heapq.heappush(arrivals, (follower.arrival_s, next(self._order), follower))
                if self._on_progress is not None and len(self._served) % 500 == 0:
                    self._on_progress(len(self._served), total)
        for times in self._times:
            times.stopped_s = max(self._now, times.started_s) if times.stopped_s is None else times.stopped_s
        return SimulationResult(self._served, self._times, time.perf_counter() - start, self._now)

    # -- replicas ----------------------------------------------------------------------------------------------

    def _start_replica(self) -> None:
        number = len(self._replicas)
        replica = SimulatedReplica(f"replica-{number}", self._profile, self._block_size, lambda: self._now)
        self._replicas.append(replica)
        self._times.append(ReplicaTime(self._now, None))
        target = self._router.add(replica.key)
        self._slots.append(target.slot)
        self._router.report(replica.key, replica.load())

    def _begin(self, number: int, replica: SimulatedReplica) -> None:
        replica.begin(self._now, self._slowdown())
        if replica.is_busy:
            heapq.heappush(self._events, (replica.ends_s, next(self._order), number))
        self._router.report(replica.key, replica.load())

    def _slowdown(self) -> float:
        """Replicas that share a machine slow each other down once they are more than it has room for."""
        room = self._profile.concurrent_replicas
        if room is None:
            return 1.0
        return max(1.0, (1 + sum(replica.is_busy for replica in self._replicas)) / room)

    def _finish(self, number: int, replica: SimulatedReplica) -> list[Served]:
        ended = [served for output in replica.end() if (served := self._take(output)) is not None]
        slot, index = self._slots[number], self._router.index
        for event in replica.take_events():
            if isinstance(event, BlocksStored):
                index.store(slot, event.block_hashes)
            elif isinstance(event, BlocksRemoved):
                index.remove(slot, event.block_hashes)
        self._begin(number, replica)
        return ended

    # -- requests ----------------------------------------------------------------------------------------------

    def _arrive(self, traced: TracedRequest) -> None:
        request_id = str(next(self._number))
        hashes = [BlockHash(block.to_bytes(16, "big")) for block in traced.block_ids]
        # Nothing looks at these tokens where hashes are given; the last one tells generated blocks apart.
        prompt_ids = (0,) * (traced.num_prompt - 1) + (int(request_id) + 1,)
        routed = self._router.describe(
            request_id,
            prompt_ids,
            block_size=self._block_size,
            max_tokens=traced.num_output,
            session=traced.session,
            block_hashes=hashes,
        )
        decision = self._router.decide(routed)
        assert decision is not None, "no replica"
        number = int(decision.target.key.removeprefix("replica-"))
        replica = self._replicas[number]
        if not replica.can_hold(traced.num_prompt + traced.num_output) or self._is_hopeless(decision.best.ttft_s):
            self._served.append(Served.refused(traced))
            return
        self._router.reserve(decision)
        self._open[request_id] = _Open(traced, number)
        full = traced.num_prompt // self._block_size
        request = Request(
            RequestId(request_id),
            prompt_ids,
            SamplingParams(max_tokens=traced.num_output, ignore_eos=True),
            seed=0,
            arrival_s=self._now,
            block_hashes=hashes[:full],
        )
        replica.add(request, self._now)
        if replica.is_busy:
            heapq.heappush(self._events, (replica.ends_s, next(self._order), number))
        else:
            self._begin(number, replica)

    def _is_hopeless(self, ttft_s: float) -> bool:
        objective = self._objectives.ttft_s
        return self._has_admission and objective is not None and ttft_s > objective

    def _take(self, output: RequestOutput) -> Served | None:
        """Note a request's first output; the whole of it with the last."""
        one = self._open[output.request_id]
        if not one.first_token_s:
            one.first_token_s = self._now
            one.num_cached = output.num_cached_tokens
            self._router.settle(output.request_id)
        if output.finish_reason is None:
            return None
        del self._open[output.request_id]
        self._router.finish(one.traced.num_output)
        served = Served(
            arrival_s=one.traced.arrival_s,
            ttft_s=one.first_token_s - one.traced.arrival_s + self._profile.request_s,
            finished_s=self._now + self._profile.request_s,
            num_prompt=one.traced.num_prompt,
            num_output=one.traced.num_output,
            num_cached=one.num_cached,
            replica=one.replica,
        )
        self._served.append(served)
        return served


def simulate(
    trace: Trace,
    profile: HardwareProfile,
    policy: Policy,
    num_replicas: int,
    *,
    objectives: Objectives | None = None,
    has_admission: bool = False,
    next_request: NextRequest | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> SimulationResult:
    """Replay `trace` on `num_replicas` replicas of `profile`. See Simulation."""
    return Simulation(
        trace,
        profile,
        policy,
        num_replicas,
        objectives=objectives,
        has_admission=has_admission,
        next_request=next_request,
        on_progress=on_progress,
    ).run()
