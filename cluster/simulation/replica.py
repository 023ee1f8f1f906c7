"""One simulated replica: the engine's own scheduler and block manager on a clock that a step-time model moves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shoal.cluster.autoscaling.signals import PromptCounter, ReplicaSignals
from shoal.cluster.simulation.profile import HardwareProfile
from shoal.engine.load import RATE_MEMORY_S, EngineLoad, RateMeter
from shoal.engine.memory.kv_events import KVEvent
from shoal.engine.memory.kv_manager import KVManager
from shoal.engine.plan import ContinuedRequest, NewRequest, StepPlan, StepResult
from shoal.engine.request import Request, RequestId, RequestOutput
from shoal.engine.scheduling.scheduler import Scheduler
from shoal.engine.scheduling.waiting_queue import WaitingQueue
from shoal.engine.step_time import work_of

WATERMARK = 0.01  # as EngineOptions has it


@dataclass(slots=True)
class Busy:
    """What a replica is doing: one planned step, or a number of steps that are alike but for growing contexts."""

    started_s: float
    plan: StepPlan | None
    num_steps: int
    first_s: float  # seconds of the first of them
    growth_s: float  # by which each takes longer than the one before

    def seconds(self, num_steps: int) -> float:
        return num_steps * self.first_s + self.growth_s * num_steps * (num_steps - 1) / 2

    def steps_until(self, elapsed_s: float) -> int:
        """Steps that are over, or in flight, after so many seconds: at least one, all at most."""
        low, high = 1, self.num_steps
        while low < high:
            middle = (low + high) // 2
            if self.seconds(middle) < elapsed_s:
                low = middle + 1
            else:
                high = middle
        return low


class SimulatedReplica:
    """Plans a step when it has work, is busy for as long as the model says, and commits it then.

    A request that comes while steps run waits for the end of the one in flight, as in the engine.
    """

    def __init__(self, key: str, profile: HardwareProfile, block_size: int, clock: Callable[[], float]) -> None:
        self.key = key
        self._profile = profile
        self._time = profile.step_time
        self._kv = KVManager(
            max(2, profile.kv_tokens // block_size + 1), block_size, watermark=WATERMARK, record_events=True
        )
        self._scheduler = Scheduler(
            self._kv,
            WaitingQueue("shortest_first", ageing_s=1.0),
            max_step_tokens=profile.max_step_tokens,
            max_running_requests=profile.max_running_requests,
            max_model_len=2**31,
            eos_token_ids=(),
            clock=clock,
        )
        self._clock = clock
        self._prompts = PromptCounter()
        self._finished = RateMeter(RATE_MEMORY_S)
        self._requests: dict[RequestId, Request] = {}
        self._inbox: list[Request] = []  # came while steps run
        self._busy: Busy | None = None
        self.ends_s = math.inf  # when the steps it has begun are over

    @property
    def num_open(self) -> int:
        return len(self._requests)

    @property
    def is_busy(self) -> bool:
        return self._busy is not None

    def can_hold(self, num_tokens: int) -> bool:
        """Whether a request of so many tokens fits at all."""
        return num_tokens <= self._kv.num_usable_blocks * self._kv.block_size

    def add(self, request: Request, now: float) -> None:
        self._requests[request.request_id] = request
        busy = self._busy
        if busy is None:
            self._scheduler.add(request)
            return
        self._inbox.append(request)
        if busy.num_steps > 1:
            busy.num_steps = busy.steps_until(now - busy.started_s)
            self.ends_s = busy.started_s + busy.seconds(busy.num_steps)

    def begin(self, now: float, slowdown: float = 1.0) -> None:
        """Start the next step, if there is anything to do. `slowdown`: how much longer everything takes just now."""
        assert self._busy is None
        num_steps = self._scheduler.most_alike_steps()
        if num_steps > 1:
            work = self._scheduler.next_work()
            first = self._time.seconds(*work) * slowdown
            growth = self._time.per_context_token * (work.num_prefill + work.num_decode) * slowdown
            self._busy = Busy(now, None, num_steps, first, growth)
        else:
            plan = self._scheduler.plan()
            if plan.is_empty:
                self.ends_s = math.inf
                return
            self._busy = Busy(now, plan, 1, self._time.seconds(*work_of(plan)) * slowdown, 0.0)
        self.ends_s = now + self._busy.seconds(self._busy.num_steps)

    def end(self) -> Sequence[RequestOutput]:
        """What the steps gave that are over now. Leaves the replica free to begin the next."""
        busy, self._busy = self._busy, None
        self.ends_s = math.inf
        assert busy is not None
        outputs: Sequence[RequestOutput] = ()
        if busy.plan is None:
            self._scheduler.leap(busy.num_steps)
        else:
            outputs = self._scheduler.commit(busy.plan, self._result(busy.plan))
            for output in outputs:
                request = self._requests[output.request_id]
                if len(request.output_ids) == 1:
                    self._prompts.observe(len(request.prompt_ids) - output.num_cached_tokens)
                if output.finish_reason is not None:
                    del self._requests[output.request_id]
        for request in self._inbox:
            self._scheduler.add(request)
        self._inbox.clear()
        return outputs

    def load(self) -> EngineLoad:
        """What a real replica would report just now."""
        return self._scheduler.load(self._time, self._finished.read(self._scheduler.counters.finished, self._clock()))

    def signals(self) -> ReplicaSignals:
        """What a real replica would tell the autoscaler just now."""
        return ReplicaSignals.of(self.load(), self._prompts)

    def take_events(self) -> list[KVEvent]:
        return self._kv.take_events()

    def _result(self, plan: StepPlan) -> StepResult:
        requests = self._requests
        entries: tuple[NewRequest | ContinuedRequest, ...] = (*plan.new, *plan.continued)
        return StepResult(
            plan.step,
            {
                entry.request_id: (0,)
                for entry in entries
                if entry.num_computed + entry.num_new == requests[entry.request_id].num_known
            },
        )
