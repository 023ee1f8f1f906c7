"""Replays a trace: arrivals, the router, replicas on simulated clocks, and the autoscaler, event by event.

The router, the scheduler, the block manager and the autoscaling policy are the ones that serve; only the device and
the network are replaced, by a step-time model. Steps that are alike are taken many at a time.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count

from shoal.cluster.autoscaling.latency import ClusterSignals
from shoal.cluster.routing.cost import Estimate
from shoal.cluster.routing.policies import Policy
from shoal.cluster.routing.router import Router
from shoal.cluster.simulation.profile import HardwareProfile
from shoal.cluster.simulation.replica import SimulatedReplica
from shoal.cluster.simulation.result import Objectives, ReplicaTime, Served, SimulationResult
from shoal.cluster.simulation.trace import Trace, TracedRequest
from shoal.engine.memory.kv_events import BlocksRemoved, BlocksStored
from shoal.engine.request import BlockHash, Request, RequestId, RequestOutput, SamplingParams

SCALING_PERIOD_S = 10.0

NextRequest = Callable[[Served], TracedRequest | None]
Autoscaler = Callable[[ClusterSignals], int]


@dataclass(slots=True)
class _Open:
    """A request that is being served."""

    traced: TracedRequest
    replica: int
    first_token_s: float | None = None
    num_cached: int = 0


@dataclass(slots=True)
class _Member:
    """A replica of the fleet, from its start until it has drained."""

    number: int
    replica: SimulatedReplica
    time: ReplicaTime
    slot: int | None = None  # in the router's index, while it takes requests
    is_ready: bool = False


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
        autoscaler: Autoscaler | None = None,
        next_request: NextRequest | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._trace = trace if profile.block_tokens is None else trace.in_blocks_of(profile.block_tokens)
        self._profile = profile
        self._objectives = objectives or Objectives()
        self._has_admission = has_admission
        self._autoscaler = autoscaler
        self._next_request = next_request
        self._on_progress = on_progress
        self._now = 0.0
        self._router = Router(policy, clock=lambda: self._now)
        self._members: list[_Member] = []  # by number, those that are gone included
        self._open: dict[str, _Open] = {}
        self._waiting: list[TracedRequest] = []  # for the first replica
        self._served: list[Served] = []
        self._num_left = 0  # requests that have not ended
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        for _ in range(num_replicas):
            self._make_ready(self._start())

    def run(self) -> SimulationResult:
        start = time.perf_counter()
        self._num_left = len(self._trace.requests)
        for request in self._trace.requests:
            self._at(request.arrival_s, partial(self._arrive, request))
        if self._autoscaler is not None:
            self._at(0.0, self._scale)
        while self._num_left:
            self._now, _, action = heapq.heappop(self._events)
            action()
        for member in self._members:
            if member.time.stopped_s is None:
                member.time.stopped_s = max(self._now, member.time.started_s)
        times = [member.time for member in self._members]
        return SimulationResult(self._served, times, time.perf_counter() - start, self._now)

    def _at(self, when: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), action))

    # -- replicas ----------------------------------------------------------------------------------------------

    def _start(self) -> _Member:
        number = len(self._members)
        replica = SimulatedReplica(f"replica-{number}", self._profile, self._trace.block_tokens, lambda: self._now)
        self._members.append(_Member(number, replica, ReplicaTime(self._now, None)))
        return self._members[-1]

    def _make_ready(self, member: _Member) -> None:
        if member.time.stopped_s is not None:
            return
        member.is_ready = True
        member.slot = self._router.add(member.replica.key).slot
        self._router.report(member.replica.key, member.replica.load())
        waiting, self._waiting = self._waiting, []
        for traced in waiting:
            self._route(traced)

    def _scale(self) -> None:
        """Ask the autoscaler, and start or drain replicas."""
        assert self._autoscaler is not None
        up = [member for member in self._members if member.slot is not None]
        starting = [member for member in self._members if not member.is_ready and member.time.stopped_s is None]
        signals = {member.replica.key: member.replica.signals() for member in up}
        wanted = self._autoscaler(ClusterSignals(self._now, len(up) + len(starting), signals, len(self._waiting)))
        for _ in range(wanted - len(up) - len(starting)):
            self._at(self._now + self._profile.start_s, partial(self._make_ready, self._start()))
        leaving = starting[::-1] + sorted(up, key=lambda member: member.replica.num_open)
        for member in leaving[: max(0, len(up) + len(starting) - wanted)]:
            self._drain(member)
        self._at(self._now + SCALING_PERIOD_S, self._scale)

    def _drain(self, member: _Member) -> None:
        """It gets no more requests and stops after its last."""
        if member.slot is not None:
            self._router.remove(member.replica.key)
            self._router.index.close(member.slot)
            member.slot = None
        if not member.replica.num_open:
            member.time.stopped_s = self._now

    def _begin(self, member: _Member) -> None:
        replica = member.replica
        replica.begin(self._now, self._slowdown())
        if replica.is_busy:
            self._at(replica.ends_s, partial(self._end, member, replica.ends_s))
        if member.slot is not None:
            self._router.report(replica.key, replica.load())

    def _slowdown(self) -> float:
        """Replicas that share a machine slow each other down once they are more than it has room for."""
        room = self._profile.concurrent_replicas
        if room is None:
            return 1.0
        return max(1.0, (1 + sum(member.replica.is_busy for member in self._members)) / room)

    def _end(self, member: _Member, when: float) -> None:
        """Steps are over, unless their end was moved when a request came."""
        replica = member.replica
        if when != replica.ends_s:
            return
        for output in replica.end():
            self._take(output)
        events = replica.take_events()
        if member.slot is not None:
            for event in events:
                if isinstance(event, BlocksStored):
                    self._router.index.store(member.slot, event.block_hashes)
                elif isinstance(event, BlocksRemoved):
                    self._router.index.remove(member.slot, event.block_hashes)
        elif not replica.num_open:
            member.time.stopped_s = self._now
        self._begin(member)

    # -- requests ----------------------------------------------------------------------------------------------

    def _arrive(self, traced: TracedRequest) -> None:
        if self._router.keys:
            self._route(traced)
        else:
            self._waiting.append(traced)

    def _route(self, traced: TracedRequest) -> None:
        number = next(self._order)
        block_size = self._trace.block_tokens
        hashes = [BlockHash(block.to_bytes(16, "big")) for block in traced.block_ids]
        # Nothing looks at these tokens where hashes are given; the last one tells generated blocks apart.
        prompt_ids = (0,) * (traced.num_prompt - 1) + (number,)
        decision = self._router.decide(
            self._router.describe(
                str(number),
                prompt_ids,
                block_size=block_size,
                max_tokens=traced.num_output,
                session=traced.session,
                block_hashes=hashes,
            )
        )
        assert decision is not None, "no replica"
        member = self._members[int(decision.target.key.removeprefix("replica-"))]
        if not member.replica.can_hold(traced.num_prompt + traced.num_output) or self._is_hopeless(decision.best):
            self._finish(Served.refused(traced))
            return
        self._router.reserve(decision)
        self._open[str(number)] = _Open(traced, member.number)
        request = Request(
            RequestId(str(number)),
            prompt_ids,
            SamplingParams(max_tokens=traced.num_output, ignore_eos=True),
            seed=0,
            arrival_s=self._now,
            block_hashes=hashes[: traced.num_prompt // block_size],
        )
        member.replica.add(request, self._now)
        if member.replica.is_busy:
            self._at(member.replica.ends_s, partial(self._end, member, member.replica.ends_s))
        else:
            self._begin(member)

    def _is_hopeless(self, estimate: Estimate) -> bool:
        objective = self._objectives.ttft_s
        return self._has_admission and objective is not None and estimate.ttft_s > objective

    def _take(self, output: RequestOutput) -> None:
        """Note a request's first output; the whole of it with the last."""
        one = self._open[output.request_id]
        if one.first_token_s is None:
            one.first_token_s = self._now
            one.num_cached = output.num_cached_tokens
            self._router.settle(output.request_id)
        if output.finish_reason is None:
            return
        del self._open[output.request_id]
        self._router.finish(one.traced.num_output)
        self._finish(
            Served(
                arrival_s=one.traced.arrival_s,
                ttft_s=one.first_token_s - one.traced.arrival_s + self._profile.request_s,
                finished_s=self._now + self._profile.request_s,
                num_prompt=one.traced.num_prompt,
                num_output=one.traced.num_output,
                num_cached=one.num_cached,
                replica=one.replica,
            )
        )

    def _finish(self, served: Served) -> None:
        self._served.append(served)
        self._num_left -= 1
        follower = self._next_request(served) if self._next_request is not None else None
        if follower is not None:
            self._num_left += 1
            self._at(follower.arrival_s, partial(self._arrive, follower))
        if self._on_progress is not None and len(self._served) % 500 == 0:
            self._on_progress(len(self._served), len(self._served) + self._num_left)


def simulate(
    trace: Trace,
    profile: HardwareProfile,
    policy: Policy,
    num_replicas: int,
    *,
    objectives: Objectives | None = None,
    has_admission: bool = False,
    autoscaler: Autoscaler | None = None,
    next_request: NextRequest | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> SimulationResult:
    """Replay `trace` on `num_replicas` replicas of `profile`, which `autoscaler` may change every SCALING_PERIOD_S.

    has_admission: requests that are predicted to miss their objective for the first token are refused. next_request:
    what a client asks when it has its answer, for closed loops. Raises ConfigError for blocks that do not fit.
    """
    return Simulation(
        trace,
        profile,
        policy,
        num_replicas,
        objectives=objectives,
        has_admission=has_admission,
        autoscaler=autoscaler,
        next_request=next_request,
        on_progress=on_progress,
    ).run()
