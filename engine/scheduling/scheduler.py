"""Continuous batching with one rule: every step, computed tokens catch up with known tokens under one token budget.

Iteration-level scheduling (Orca, Yu et al. 2022) with stall-free chunked prefill (Sarathi-Serve, Agrawal et al. 2024,
arXiv 2403.02310): running requests first, the rest of the budget to prompts. There is no prefill phase and no decode
phase; chunks, cached prefixes, forks and preemption all come down to where `num_computed` stands.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

from shoal.engine.memory.kv_manager import KVManager
from shoal.engine.plan import ContinuedRequest, NewRequest, StepPlan, StepResult
from shoal.engine.request import BlockId, FinishReason, Request, RequestId, RequestOutput, RequestTimes
from shoal.engine.scheduling.waiting_queue import WaitingQueue

# A NamedTuple's own constructor is a Python function; these two are called for every request in every step.
_continued = cast(Callable[[tuple[object, ...]], ContinuedRequest], partial(tuple.__new__, ContinuedRequest))
_output = cast(Callable[[tuple[object, ...]], RequestOutput], partial(tuple.__new__, RequestOutput))


@dataclass(slots=True)
class SchedulerCounters:
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    preemptions: int = 0
    finished: int = 0


class Scheduler:
    """Queues, budget and block tables of one replica. Not thread-safe: one thread plans and commits.

    A request is never dropped: it waits, runs, is preempted and waits again with all it has (tokens, seed, penalties),
    and ends with a finish reason.
    """

    def __init__(
        self,
        kv: KVManager,
        queue: WaitingQueue,
        *,
        max_step_tokens: int,
        max_running_requests: int,
        max_model_len: int,
        eos_token_ids: tuple[int, ...],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert max_step_tokens >= max_running_requests, "every running request needs a token a step"
        self._kv = kv
        self._waiting = queue
        self._max_step_tokens = max_step_tokens
        self._max_running = max_running_requests
        self._max_model_len = max_model_len
        self._eos_token_ids = frozenset(eos_token_ids)
        self._clock = clock
        self._running: dict[RequestId, Request] = {}  # in order of admission
        self._forks: dict[RequestId, list[Request]] = {}  # by the request whose prompt they wait for
        self._forgotten: list[RequestId] = []  # the ranks still hold these
        self._step = 0
        self._retired_step = 0
        self.counters = SchedulerCounters()

    # -- requests in and out -----------------------------------------------------------------------------------

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + sum(map(len, self._forks.values()))

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._forks) or len(self._waiting) > 0

    def add(self, request: Request) -> None:
        params, num_prompt = request.params, len(request.prompt_ids)
        wanted = num_prompt + params.max_tokens if params.max_tokens is not None else self._max_model_len
        request.max_known = min(wanted, self._max_model_len)
        request.end_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos_token_ids)
        source = self._find(request.fork_of) if request.fork_of is not None else None
        if source is not None and source.first_token_s is None:
            self._forks.setdefault(source.request_id, []).append(request)
        else:
            self._waiting.push(request)

    def _find(self, request_id: RequestId) -> Request | None:
        return self._running.get(request_id) or self._waiting.get(request_id)

    def abort(self, request_id: RequestId) -> Request | None:
        """Forget a request wherever it is. Its blocks are free at once, or when the step in flight retires."""
        request = self._running.pop(request_id, None)
        if request is not None:
            self._leave(request)
        else:
            request = self._waiting.remove(request_id) or self._remove_fork(request_id)
        if request is not None:
            self._wake_forks(request_id)
            request.finish_reason = FinishReason.ABORT
            self.counters.finished += 1
        return request

    def _remove_fork(self, request_id: RequestId) -> Request | None:
        for source, forks in self._forks.items():
            for request in forks:
                if request.request_id == request_id:
                    forks.remove(request)
                    if not forks:
                        del self._forks[source]
                    return request
        return None

    def _wake_forks(self, source: RequestId) -> None:
        for request in self._forks.pop(source, ()):
            self._waiting.push(request)

    # -- plan --------------------------------------------------------------------------------------------------

    def plan(self) -> StepPlan:
        """What the next step computes. Running requests first, one-token ones before chunks, then new ones."""
        self._step += 1
        num_preemptions = self.counters.preemptions
        continued = self._plan_running()
        num_tokens = sum([entry.num_new for entry in continued.values()])
        # Blocks that a preemption freed are for those who ran short, not for the victim again.
        has_room = self.counters.preemptions == num_preemptions
        new, copies = self._admit(self._max_step_tokens - num_tokens) if has_room else ([], [])
        plan = StepPlan(
            step=self._step,
            new=tuple(new),
            continued=tuple(continued.values()),
            finished=tuple(self._forgotten),
            copies=tuple(copies),
            num_tokens=num_tokens + sum([entry.num_new for entry in new]),
        )
        if not plan.is_empty:
            self._forgotten.clear()
        return plan

    def _plan_running(self) -> dict[RequestId, ContinuedRequest]:
        entries: dict[RequestId, ContinuedRequest] = {}
        chunked = []
        budget = self._max_step_tokens
        for request in tuple(self._running.values()):
            if request.num_known - request.num_computed > 1:
                chunked.append(request)
            elif self._continue(request, 1, entries):
                budget -= 1
        for request in chunked:
            # A preemption may have taken back tokens that were planned: never more than the budget either way.
            num_new = min(request.num_known - request.num_computed, budget)
            if num_new > 0 and self._continue(request, num_new, entries):
                budget -= num_new
        return entries

    def _continue(self, request: Request, num_new: int, entries: dict[RequestId, ContinuedRequest]) -> bool:
        """Plan `num_new` tokens of a running request, preempting others for blocks if need be."""
        request_id, start = request.request_id, request.num_computed
        if request_id not in self._running:
            return False  # preempted for another one just now
        new_blocks: tuple[BlockId, ...] = ()
        if start + num_new > request.num_slots:
            while not self._kv.grow(request, start + num_new):
                victim = max(self._running.values(), key=self._waiting.key)
                entries.pop(victim.request_id, None)
                self._preempt(victim)
                if victim is request:
                    return False
            new_blocks = self._kv.take_unsent(request_id)
        request.last_step = self._step
        entries[request_id] = _continued((request_id, start, num_new, request.take_unsent(), new_blocks))
        return True

    def _preempt(self, request: Request) -> None:
        """Back to the queue with everything but its KV; most of that is found in the prefix cache again, if it
        lasts.
        """
        del self._running[request.request_id]
        self._leave(request)
        request.num_computed = 0
        request.num_preemptions += 1
        self.counters.preemptions += 1
        self._waiting.push(request)

    def _leave(self, request: Request) -> None:
        self._forgotten.append(request.request_id)
        is_in_flight = request.last_step > self._retired_step
        self._kv.release(request.request_id, after_step=request.last_step if is_in_flight else None)

    def _admit(self, budget: int) -> tuple[list[NewRequest], list[tuple[BlockId, BlockId]]]:
        admitted: list[NewRequest] = []
        copies: list[tuple[BlockId, BlockId]] = []
        while budget > 0 and len(self._running) < self._max_running:
            request = self._waiting.peek()
            if request is None:
                break
            forked = self._place(request)
            if forked is None:
                break
            copies.extend(forked)
            self._waiting.pop()
            self._running[request.request_id] = request
            num_new = min(request.num_known - request.num_computed, budget)
            budget -= num_new
            if request.admitted_s is None:
                request.admitted_s = self._clock()
                request.num_cached_tokens = request.num_computed
                self.counters.prompt_tokens += len(request.prompt_ids)
                self.counters.cached_tokens += request.num_computed
            request.num_sent = request.num_known
            request.last_step = self._step
            admitted.append(
                NewRequest(
                    request.request_id,
                    request.known_ids(0, request.num_known),
                    len(request.prompt_ids),
                    request.num_computed,
                    num_new,
                    self._kv.take_unsent(request.request_id),
                    request.params,
                    request.seed,
                    request.stream,
                )
            )
        return admitted, copies

    def _place(self, request: Request) -> tuple[tuple[BlockId, BlockId], ...] | None:
        """Give the request its blocks; None if there are too few. Answers the copies that the ranks must make."""
        source = self._running.get(request.fork_of) if request.fork_of is not None else None
        if source is not None and not request.output_ids and self._kv.can_fork(request, source):
            return self._kv.fork(request, source.request_id)
        return () if self._kv.admit(request, is_alone=not self._running) else None

    # -- commit ------------------------------------------------------------------------------------------------

    def commit(self, plan: StepPlan, result: StepResult) -> list[RequestOutput]:
        """Take in what a step did: advance, append sampled tokens, finish what is done."""
        assert plan.step == result.step, (plan.step, result.step)
        self._retired_step = plan.step
        self._kv.retire(plan.step)
        outputs = [
            self._advance(new.request_id, new.num_computed + new.num_new, new.num_new, result) for new in plan.new
        ]
        for request_id, num_computed, num_new, _, _ in plan.continued:
            outputs.append(self._advance(request_id, num_computed + num_new, num_new, result))
        sampled = [output for output in outputs if output is not None]
        self.counters.generation_tokens += sum([len(output.token_ids) for output in sampled])
        return sampled

    def _advance(self, request_id: RequestId, end: int, num_new: int, result: StepResult) -> RequestOutput | None:
        """Positions up to `end` are computed now, `num_new` of them new; take in what was sampled after them."""
        request = self._running.get(request_id)
        if request is None:
            return None  # aborted while the step ran
        request.num_computed = end
        if num_new > 1 or end % self._kv.block_size == 0:
            self._kv.commit(request)
        token_ids = result.token_ids.get(request_id)
        if not token_ids:
            return None
        logprobs = result.logprobs.get(request_id, ()) if result.logprobs else ()
        if request.first_token_s is None:
            request.first_token_s = self._clock()
            self._wake_forks(request_id)
        for count, token in enumerate(token_ids, start=1):
            request.output_ids.append(token)
            request.num_known = known = request.num_known + 1
            if token in request.end_ids and len(request.output_ids) >= request.params.min_tokens:
                request.finish_reason = FinishReason.STOP
            elif known >= request.max_known:
                request.finish_reason = FinishReason.LENGTH
            else:
                continue
            times = self._finish(request)
            return RequestOutput(
                request_id,
                token_ids[:count],
                logprobs[:count],
                request.finish_reason,
                request.num_cached_tokens,
                times=times,
            )
        return _output((request_id, token_ids, logprobs, None, request.num_cached_tokens, None, None))

    def _finish(self, request: Request) -> RequestTimes:
        del self._running[request.request_id]
        self._leave(request)
        self.counters.finished += 1
        return request_times(request, self._clock())

    def check(self) -> None:
        """Assert what must hold between steps (a self-audit, run when idle)."""
        self._kv.check()
        assert all(self._kv.holds(request_id) for request_id in self._running)
        assert all(request.num_computed < request.num_known for request in self._running.values())
        if not self.has_work and self._retired_step == self._step:
            assert self._kv.num_free_blocks == self._kv.num_usable_blocks


def request_times(request: Request, now: float) -> RequestTimes:
    return RequestTimes(
        arrival_s=request.arrival_s,
        admitted_s=request.admitted_s,
        first_token_s=request.first_token_s,
        finished_s=now,
        num_prompt_tokens=len(request.prompt_ids),
        num_output_tokens=len(request.output_ids),
        num_cached_tokens=request.num_cached_tokens,
        num_preemptions=request.num_preemptions,
        max_tokens=request.params.max_tokens,
    )
