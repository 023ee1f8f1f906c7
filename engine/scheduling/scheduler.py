"""Continuous batching with one rule: every step, computed tokens catch up with known tokens under one token budget.

Iteration-level scheduling (Orca, Yu et al. 2022) with stall-free chunked prefill (Sarathi-Serve, Agrawal et al. 2024,
arXiv 2403.02310): running requests first, the rest of the budget to prompts. There is no prefill phase and no decode
phase; chunks, cached prefixes, forks and preemption all come down to where `num_computed` stands.

Steps are planned while earlier ones are in flight. The one thing that a plan cannot know then is a token that is being
sampled: a request that waits for one is planned again `spacing` steps later at the earliest, with the token left open
for the ranks to fill in. With as many steps as pipeline stages in between, no stage waits for another.
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
        spacing: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert max_step_tokens >= max_running_requests, "every running request needs a token a step"
        self._kv = kv
        self._waiting = queue
        self._max_step_tokens = max_step_tokens
        self._max_running = max_running_requests
        self._max_model_len = max_model_len
        self._eos_token_ids = frozenset(eos_token_ids)
        self._spacing = spacing
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
        """What the next step computes. Running requests first, one-token ones before chunks, then new ones.

        The plan is empty where all that could be computed is in flight already.
        """
        self._step += 1
        num_preemptions = self.counters.preemptions
        most = self._fair_share()
        continued, num_decoding, num_tokens = self._plan_running(self._step - self._spacing, most)
        # Blocks that a preemption freed are for those who ran short, not for the victim again.
        has_room = self.counters.preemptions == num_preemptions
        new, copies = self._admit(self._max_step_tokens - num_tokens, most - num_decoding) if has_room else ([], [])
        plan = StepPlan(
            step=self._step,
            new=tuple(new),
            continued=tuple(continued.values()),
            finished=tuple(self._forgotten),
            copies=tuple(copies),
            num_tokens=num_tokens + sum([entry.num_new for entry in new]),
        )
        if plan.is_empty:
            self._step -= 1
        else:
            self._forgotten.clear()
        return plan

    def _fair_share(self) -> int:
        """Requests that one step may decode or admit: dealt over as many steps as there are stages, so that none of
        them runs dry.
        """
        if self._spacing == 1:
            return self._max_running
        return -(-min(len(self._running) + len(self._waiting), self._max_running) // self._spacing)

    def _plan_running(self, latest: int, most: int) -> tuple[dict[RequestId, ContinuedRequest], int, int]:
        """Entries, how many requests were let decode, `most` at most, and the tokens of all entries. A request whose
        token is being sampled by a step after `latest` has to wait for it.
        """
        entries: dict[RequestId, ContinuedRequest] = {}
        chunked = []
        num_decoding = 0
        for request in tuple(self._running.values()):
            expected = request.num_expected
            if expected - request.num_planned > 1:
                chunked.append(request)
            elif expected > request.num_known and (request.last_step > latest or expected >= request.max_known):
                continue  # waits for a token, or for its last one
            elif num_decoding < most and self._continue(request, 1, entries):
                num_decoding += 1
        budget = self._max_step_tokens - num_decoding
        for request in chunked:
            # A preemption may have taken back tokens that were planned: never more than the budget either way.
            num_new = min(request.num_expected - request.num_planned, budget)
            if num_new > 0 and self._continue(request, num_new, entries):
                budget -= num_new
        num_tokens = sum([entry.num_new for entry in entries.values()]) if chunked else len(entries)
        return entries, num_decoding, num_tokens

    def _continue(self, request: Request, num_new: int, entries: dict[RequestId, ContinuedRequest]) -> bool:
        """Plan `num_new` tokens of a running request, preempting others for blocks if need be."""
        request_id, start, expected = request.request_id, request.num_planned, request.num_expected
        new_blocks: tuple[BlockId, ...] = ()
        end = start + num_new
        if end > request.num_slots:
            if request_id not in self._running:
                return False  # preempted for another one just now, which has left it no slots
            while not self._kv.grow(request, end):
                if self._kv.num_deferred_blocks:
                    return False  # blocks are on their way back: wait for the step that still uses them
                victim = max(self._running.values(), key=self._waiting.key)
                if (planned := entries.pop(victim.request_id, None)) is not None:
                    self._unplan(victim, planned)
                self._preempt(victim)
                if victim is request:
                    return False
            new_blocks = self._kv.take_unsent(request_id)
        known, sent = request.num_known, request.num_sent
        # The short way is for a request that decodes: 256 calls a step.
        tokens = (request.output_ids[-1],) if sent + 1 == known else request.known_ids(sent, known)
        entries[request_id] = _continued((request_id, start, num_new, tokens, new_blocks, expected - known))
        request.num_sent = expected
        request.last_step = self._step
        request.num_planned = end
        if end == expected:
            request.num_expected = end + 1
        return True

    def _unplan(self, request: Request, planned: ContinuedRequest) -> None:
        request.num_expected = request.num_known + planned.num_pending
        request.last_step = self._step - 1  # at most: which of the steps in flight was its last does not matter

    def _preempt(self, request: Request) -> None:
        """Back to the queue with everything but its KV; most of that is found in the prefix cache again, if it
        lasts.
        """
        del self._running[request.request_id]
        self._leave(request)
        request.num_computed = request.num_planned = request.num_slots = 0
        request.num_preemptions += 1
        self.counters.preemptions += 1
        self._waiting.push(request)

    def _leave(self, request: Request) -> None:
        self._forgotten.append(request.request_id)
        after_step = request.last_step if self._is_in_flight(request) else None
        self._kv.release(request.request_id, after_step=after_step)

    def _is_in_flight(self, request: Request) -> bool:
        return request.last_step > self._retired_step

    def _admit(self, budget: int, most: int) -> tuple[list[NewRequest], list[tuple[BlockId, BlockId]]]:
        admitted: list[NewRequest] = []
        copies: list[tuple[BlockId, BlockId]] = []
        while budget > 0 and len(admitted) < most and len(self._running) < self._max_running:
            request = self._waiting.peek()
            if request is None or self._is_in_flight(request):  # preempted: its last step is not over yet
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
            request.num_planned = request.num_computed + num_new
            request.num_expected = request.num_known + (request.num_planned == request.num_known)
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
        for request_id, num_computed, num_new, _, _, _ in plan.continued:
            outputs.append(self._advance(request_id, num_computed + num_new, num_new, result))
        sampled = [output for output in outputs if output is not None]
        self.counters.generation_tokens += sum([len(output.token_ids) for output in sampled])
        return sampled

    def _advance(self, request_id: RequestId, end: int, num_new: int, result: StepResult) -> RequestOutput | None:
        """Positions up to `end` are computed now, `num_new` of them new; take in what was sampled after them."""
        request = self._running.get(request_id)
        if request is not None:
            request.num_computed = end
            if num_new > 1 or end % self._kv.block_size == 0:
                self._kv.commit(request)
        else:
            request = self._waiting.get(request_id)  # preempted while the step ran: its token counts
            if request is None:
                return None  # finished or aborted meanwhile
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
        if self._running.pop(request.request_id, None) is not None:
            self._leave(request)
        else:
            self._waiting.remove(request.request_id)
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
