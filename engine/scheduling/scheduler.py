"""Continuous batching with one rule: every step, computed tokens catch up with known tokens under one token budget.

Iteration-level scheduling (Orca, Yu et al. 2022) with stall-free chunked prefill (Sarathi-Serve, Agrawal et al. 2024,
arXiv 2403.02310): requests that decode first, the rest of the budget to prompts in the policy's order. There is no
prefill phase and no decode phase; chunks, cached prefixes, forks and preemption all come down to where `num_computed`
stands.

Steps are planned while earlier ones are in flight. The one thing that a plan cannot know then is a token that is being
sampled: a request that waits for one is planned again `spacing` steps later at the earliest, with the token left open
for the ranks to fill in. With as many steps as pipeline stages in between, no stage waits for another.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import cast

from shoal.engine.load import MAX_PREFILLS, EngineLoad
from shoal.engine.memory.kv_manager import KVManager
from shoal.engine.plan import ContinuedRequest, NewRequest, StepPlan, StepResult
from shoal.engine.request import (
    NO_DRAFTS,
    BlockId,
    DraftCounts,
    FinishReason,
    Request,
    RequestId,
    RequestOutput,
    RequestTimes,
    TokenLogprobs,
)
from shoal.engine.scheduling.beam_search import BeamGroup
from shoal.engine.scheduling.span_recorder import SpanRecorder
from shoal.engine.scheduling.waiting_queue import OrderKey, WaitingQueue
from shoal.engine.spans import Obstacle, Span
from shoal.engine.speculation.speculator import Speculator
from shoal.engine.step_time import StepTime, StepWork

# A NamedTuple's own constructor is a Python function; these two are called for every request in every step.
_continued = cast(Callable[[tuple[object, ...]], ContinuedRequest], partial(tuple.__new__, ContinuedRequest))
_output = cast(Callable[[tuple[object, ...]], RequestOutput], partial(tuple.__new__, RequestOutput))


LEAP_TOKEN = 0


@dataclass(slots=True)
class SchedulerCounters:
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    preemptions: int = 0
    finished: int = 0
    drafts: DraftCounts = NO_DRAFTS


@dataclass(slots=True)
class Admission:
    """New requests of a plan that is being made."""

    budget: int  # tokens that the step has left, for running prompts as well
    most: int  # requests that may be new
    is_over: bool = False
    obstacle: Obstacle | None = None  # what the first in turn lacked
    new: list[NewRequest] = field(default_factory=list)
    copies: list[tuple[BlockId, BlockId]] = field(default_factory=list)


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
        speculator: Speculator | None = None,
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
        self._speculator = speculator
        self._clock = clock
        self._running: dict[RequestId, Request] = {}  # in order of admission
        self._forks: dict[RequestId, list[Request]] = {}  # by the request whose prompt they wait for
        self._beams: dict[RequestId, BeamGroup] = {}  # by each of its requests, and the one that it began with
        # Requests that run and have blocks, but that the ranks do not know: forked beams, with what is to be copied.
        self._born: dict[RequestId, tuple[tuple[BlockId, BlockId], ...]] = {}
        self._forgotten: list[RequestId] = []  # the ranks still hold these
        self._step = 0
        self._retired_step = 0
        self._recorder = SpanRecorder(clock, spacing)
        self._last_draft_step = 0  # the last step that verifies drafts, or lets them be made
        self.counters = SchedulerCounters()

    # -- requests in and out -----------------------------------------------------------------------------------

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + self.num_forks

    @property
    def num_forks(self) -> int:
        """Of those that wait, samples that wait for the prompt that another one computes."""
        return sum(map(len, self._forks.values()))

    @property
    def held_s(self) -> dict[Obstacle, float]:
        """See `SpanRecorder.held_s`."""
        return self._recorder.held_s

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._forks) or len(self._waiting) > 0

    def add(self, request: Request) -> None:
        params, num_prompt = request.params, len(request.prompt_ids)
        wanted = num_prompt + params.max_tokens if params.max_tokens is not None else self._max_model_len
        request.max_known = min(wanted, self._max_model_len)
        request.end_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos_token_ids)
        if params.use_beam_search:
            self._beams[request.request_id] = BeamGroup(request)
        source = self._find(request.fork_of) if request.fork_of is not None else None
        if source is not None and source.first_token_s is None:
            self._waiting.arrive(request, num_tokens=1)
            self._forks.setdefault(source.request_id, []).append(request)
        else:
            request.num_planned = self._kv.refresh_cached(request)
            self._waiting.arrive(request, request.num_remaining)
            self._recorder.wait(request, len(self._waiting), len(self._running))
            self._waiting.push(request)

    def _find(self, request_id: RequestId) -> Request | None:
        return self._running.get(request_id) or self._waiting.get(request_id)

    def abort(self, request_id: RequestId) -> Request | None:
        """Forget a request wherever it is. Its blocks are free at once, or when the step in flight retires."""
        if (group := self._beams.get(request_id)) is not None:
            return self._abort_beams(group)
        request = self._running.pop(request_id, None)
        if request is not None:
            self._leave(request)
        else:
            request = self._waiting.remove(request_id) or self._remove_fork(request_id)
        if request is not None:
            self._wake_forks(request_id)
            self._forget_drafts(request)
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
            request.num_planned = self._kv.refresh_cached(request)
            self._recorder.wait(request, len(self._waiting), len(self._running), is_fork=True)
            self._waiting.push(request)

    # -- plan --------------------------------------------------------------------------------------------------

    def plan(self) -> StepPlan:
        """What the next step computes: a token of every request that has but one to compute, then prompts, running or
        new, as far as the budget goes.

        The plan is empty where all that could be computed is in flight already, or waits for tokens to guess from.
        """
        if self._waits_for_tokens():
            return StepPlan(self._step)
        self._step += 1
        self._recorder.begin_plan()
        num_preemptions = self.counters.preemptions
        most = self._fair_share()
        entries, chunked = self._plan_decoding(self._step - self._spacing, most)
        num_decode = len(entries) + self._add_drafts(entries)
        admission = Admission(self._max_step_tokens - num_decode, most - len(entries))
        # Blocks that a preemption freed are for those who ran short, not for the victim again.
        if self.counters.preemptions > num_preemptions:
            admission.is_over, admission.obstacle = True, "blocks"
        num_tokens = num_decode + self._plan_prompts(chunked, entries, admission)
        born, copies = self._introduce(entries) if num_tokens else ((), ())
        plan = StepPlan(
            step=self._step,
            new=(*born, *admission.new),
            continued=tuple(entries.values()),
            finished=tuple(self._forgotten),
            copies=(*copies, *admission.copies),
            num_tokens=num_tokens,
        )
        self._recorder.end_plan(0 if plan.is_empty else self._step, admission.obstacle if self._waiting else None)
        if plan.is_empty:
            self._step -= 1
            if self._beams and self.counters.preemptions == num_preemptions:
                self._make_room()
        else:
            self._forgotten.clear()
        return plan

    def _waits_for_tokens(self) -> bool:
        """Whether the next plan should know the tokens of all steps that are not in other pipeline stages meanwhile."""
        if self._speculator is None or self._retired_step > self._step - self._spacing:
            return False
        return self._last_draft_step > self._retired_step or self._speculator.wants_tokens

    def _fair_share(self) -> int:
        """Requests that one step may decode or admit: dealt over as many steps as there are stages, so that none of
        them runs dry.
        """
        if self._spacing == 1:
            return self._max_running
        return -(-min(len(self._running) + len(self._waiting), self._max_running) // self._spacing)

    def _plan_decoding(self, latest: int, most: int) -> tuple[dict[RequestId, ContinuedRequest], list[Request]]:
        """Entries of requests with one token to compute, `most` at most, and the requests that have more. A request
        whose token is being sampled by a step after `latest` has to wait for it.
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
        return entries, self._in_turn(chunked)

    def _add_drafts(self, entries: dict[RequestId, ContinuedRequest]) -> int:
        """Let requests that decode have drafts verified, and new ones made, where that pays; the answer is the tokens.

        Drafts take blocks that are to spare, and preempt nobody.
        """
        if self._speculator is None:
            return 0
        requests = [
            self._running[entry.request_id]
            for entry in entries.values()
            if not entry.num_pending and entry.request_id not in self._beams
        ]
        drafts = self._speculator.choose(requests, len(entries), self._max_step_tokens - len(entries))
        num_to_draft = self._speculator.choose_rounds(requests)
        num_tokens = 0
        for request_id in {**drafts, **num_to_draft}:
            request, entry = self._running[request_id], entries[request_id]
            start, draft_ids = request.num_planned, drafts.get(request_id, ())
            self._kv.grow_to_spare(request, start + len(draft_ids) + num_to_draft.get(request_id, 0))
            draft_ids = draft_ids[: request.num_slots - start]
            num_tokens += len(draft_ids)
            entries[request_id] = entry._replace(
                num_new=entry.num_new + len(draft_ids),
                new_block_ids=entry.new_block_ids + self._kv.take_unsent(request_id),
                draft_ids=draft_ids,
                num_to_draft=num_to_draft.get(request_id, 0),
            )
            self._last_draft_step = self._step
        return num_tokens

    def _forget_drafts(self, request: Request) -> None:
        if self._speculator is not None:
            self._speculator.forget(request)

    def _in_turn(self, chunked: list[Request]) -> list[Request]:
        """Running requests that are not through with their prompts, as the policy has them."""
        return sorted(chunked, key=self._waiting.key) if self._waiting.is_shortest_first else chunked

    def _plan_prompts(
        self, chunked: list[Request], entries: dict[RequestId, ContinuedRequest], admission: Admission
    ) -> int:
        """Spend the budget on prompts, each as much as it can use; the answer is the tokens."""
        budget = admission.budget
        for request in chunked:
            if self._waiting.is_shortest_first:
                self._admit(admission, before=self._waiting.key(request))
            num_new = min(request.num_remaining, admission.budget)
            if num_new > 0 and self._continue(request, num_new, entries):
                admission.budget -= num_new
        self._admit(admission)
        return budget - admission.budget

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
        entries[request_id] = _continued((request_id, start, num_new, tokens, new_blocks, expected - known, (), 0))
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
        request.num_computed = request.num_slots = 0
        request.num_planned = self._kv.refresh_cached(request)
        request.num_preemptions += 1
        self.counters.preemptions += 1
        self._recorder.preempt(request, len(self._waiting), len(self._running))
        if not self._has_reported(request):
            self._waiting.push(request)

    def _leave(self, request: Request) -> None:
        if self._born.pop(request.request_id, None) is None:
            self._forgotten.append(request.request_id)
        after_step = request.last_step if self._is_in_flight(request) else None
        self._kv.release(request.request_id, after_step=after_step)

    def _is_in_flight(self, request: Request) -> bool:
        return request.last_step > self._retired_step

    def _admit(self, admission: Admission, before: OrderKey | None = None) -> None:
        """Start waiting requests in their order, those with a key below `before` if that is given, until there is no
        budget, no room, or nobody left.
        """
        while not admission.is_over:
            request = self._waiting.peek()
            if request is not None and before is not None and self._waiting.key(request) >= before:
                return
            if request is None:
                admission.is_over = True
                return
            admission.obstacle = self._obstacle(request, admission)
            copies = self._place(request) if admission.obstacle is None else None
            if copies is None:
                admission.is_over = True
                admission.obstacle = admission.obstacle or "blocks"
                return
            admission.copies.extend(copies)
            admission.new.append(self._start(request, admission.budget))
            admission.budget -= admission.new[-1].num_new

    def _obstacle(self, request: Request, admission: Admission) -> Obstacle | None:
        """What keeps a waiting request from starting, blocks apart."""
        if admission.budget <= 0:
            return "tokens"
        if len(admission.new) >= admission.most or len(self._running) >= self._max_running:
            return "slots"
        if self._beams and not self._has_place(request):
            return "slots"
        # Preempted: its last step is not over yet.
        return "step" if self._is_in_flight(request) else None

    def _start(self, request: Request, budget: int) -> NewRequest:
        """From waiting, with its blocks in place, to running; its first chunk is at most `budget`."""
        self._waiting.pop()
        self._running[request.request_id] = request
        num_new = min(request.num_known - request.num_computed, budget)
        self._recorder.admit(request)
        if request.admitted_s is None:
            request.admitted_s = self._clock()
            request.num_cached_tokens = request.num_computed
            self.counters.prompt_tokens += len(request.prompt_ids)
            self.counters.cached_tokens += request.num_computed
        request.num_sent = request.num_known
        request.last_step = self._step
        request.num_planned = request.num_computed + num_new
        request.num_expected = request.num_known + (request.num_planned == request.num_known)
        return NewRequest(
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
        self._recorder.end_step(plan, result)
        outputs = [
            self._advance(new.request_id, new.num_computed + new.num_new, new.num_new, (), result) for new in plan.new
        ]
        for request_id, num_computed, num_new, _, _, _, draft_ids, _ in plan.continued:
            outputs.append(self._advance(request_id, num_computed + num_new, num_new, draft_ids, result))
        sampled = [output for output in outputs if output is not None]
        for group in dict.fromkeys(self._beams.values()):
            if group.is_complete:
                sampled += self._go_on(group)
        self.counters.generation_tokens += sum([len(output.token_ids) for output in sampled])
        if self._speculator is not None:
            for output in sampled:
                self.counters.drafts = self.counters.drafts.plus(output)
            for request_id, draft_ids in result.draft_ids.items():
                if (request := self._find(request_id)) is not None:  # it has neither ended nor been aborted meanwhile
                    self._speculator.take_guesses(request, draft_ids)
        return sampled

    def _advance(
        self, request_id: RequestId, end: int, num_new: int, draft_ids: tuple[int, ...], result: StepResult
    ) -> RequestOutput | None:
        """Positions up to `end` are computed now, `num_new` of them new and the last of them guesses; take in what was
        sampled.
        """
        request = running = self._running.get(request_id)
        if request is None:
            request = self._waiting.get(request_id)  # preempted while the step ran: its tokens count
            if request is None:
                return None  # finished or aborted meanwhile
        token_ids = result.token_ids.get(request_id, ())
        is_beam = request_id in self._beams
        if token_ids and not is_beam:
            if request.mark is None:
                self._recorder.computed(request, end - num_new, num_new, has_token=True)
                if request.first_token_s is None:
                    request.first_token_s = self._clock()
                    self._wake_forks(request_id)
            output_ids, count = request.output_ids, 0
            for token in token_ids:  # in place: a call costs 256 times a step
                count += 1
                output_ids.append(token)
                request.num_known = known = request.num_known + 1
                if token in request.end_ids and len(output_ids) >= request.params.min_tokens:
                    request.finish_reason = FinishReason.STOP
                elif known >= request.max_known:
                    request.finish_reason = FinishReason.LENGTH
                else:
                    continue
                token_ids = token_ids[:count]
                break
            if self._speculator is not None:
                self._speculator.observe(request, token_ids)
                if draft_ids:
                    request.trace.num_accepted += len(token_ids) - 1
        if running is not None:
            if draft_ids:
                # What was rejected, or comes after the end, has no KV; its slots are for the tokens to come.
                end = request.num_planned = request.num_known - 1
                request.num_expected = request.num_known
            request.num_computed = end
            if num_new > 1 or end % self._kv.block_size == 0:
                self._kv.commit(running)
        elif draft_ids:
            self._waiting.expect(request, request.num_known)
        if not token_ids:
            if running is not None and request.mark is None:
                self._recorder.computed(request, end - num_new, num_new, has_token=False)
            return None
        if is_beam:
            if request.mark is None:
                self._recorder.computed(request, end - num_new, num_new, has_token=True)
            return self._report(request, result.logprobs[request_id][0])
        logprobs = result.logprobs.get(request_id, ())[: len(token_ids)] if result.logprobs else ()
        if request.finish_reason is None:
            return _output(
                (request_id, token_ids, logprobs, None, request.num_cached_tokens, None, None, len(draft_ids))
            )
        return RequestOutput(
            request_id,
            token_ids,
            logprobs,
            request.finish_reason,
            request.num_cached_tokens,
            times=self._finish(request),
            num_drafted=len(draft_ids),
        )

    def _finish(self, request: Request) -> RequestTimes:
        if self._running.pop(request.request_id, None) is not None:
            self._leave(request)
        else:
            self._waiting.remove(request.request_id)
        self._forget_drafts(request)
        self.counters.finished += 1
        return self._times(request)

    def _times(self, request: Request) -> RequestTimes:
        now = self._clock()
        return request_times(request, now, self._recorder.finish(request, now))

    # -- beam search -------------------------------------------------------------------------------------------

    def _report(self, request: Request, logprobs: TokenLogprobs) -> RequestOutput | None:
        """A beam knows what may follow. The first one tells outside that the prompt is computed."""
        self._beams[request.request_id].report(request.request_id, logprobs)
        self._waiting.remove(request.request_id)  # preempted meanwhile: it waits for the others now
        if request.first_token_s is not None:
            return None
        request.first_token_s = self._clock()
        self._wake_forks(request.request_id)
        return RequestOutput(request.request_id, (), num_cached_tokens=request.num_cached_tokens)

    def _has_place(self, request: Request) -> bool:
        """Whether the places that searches under way may yet need for their beams leave one for this request, or, if it
        begins a search, for all beams of that. A beam without a place would hold up the others.
        """
        own = self._beams.get(request.request_id)
        if not self._running or (own is not None and own.is_started):
            return True
        groups = dict.fromkeys(group for group in self._beams.values() if group.is_started)
        num_beams = sum([request_id in self._running for group in groups for request_id in group.request_ids])
        num_taken = len(self._running) - num_beams + sum([group.root.params.width for group in groups])
        return num_taken + (1 if own is None else request.params.width) <= self._max_running

    def _has_reported(self, request: Request) -> bool:
        """Whether it is a beam that waits for others."""
        group = self._beams.get(request.request_id)
        return group is not None and group.has_reported(request.request_id)

    def _go_on(self, group: BeamGroup) -> list[RequestOutput]:
        """A token more for beams that have all reported, or the results if it was the last."""
        offspring = group.advance()
        for request in offspring.gone:
            self._drop_beam(request, group)
        if group.search.is_over:
            return self._finish_beams(group)
        for fork, parent in offspring.forks:
            self._beams[fork.request_id] = group
            self._place_fork(fork, parent)
        for heir in offspring.heirs:
            if heir.request_id not in self._running:
                self._queue_beam(heir)
        return []

    def _place_fork(self, fork: Request, parent: Request) -> None:
        """Onto the blocks of the beam that it comes from, if those are there and one more is, and into the queue if
        not.
        """
        copies = None
        if parent.request_id in self._running and len(self._running) < self._max_running:
            copies = self._kv.fork(fork, parent.request_id, is_growth=True)
        if copies is None:
            self._queue_beam(fork)
        else:
            self._running[fork.request_id] = fork
            self._born[fork.request_id] = copies

    def _queue_beam(self, request: Request) -> None:
        """A beam without blocks has a token to compute."""
        request.num_computed = 0
        request.num_planned = self._kv.refresh_cached(request)
        if not request.trace.is_waiting:
            self._recorder.wait(request, len(self._waiting), len(self._running))
        self._waiting.push(request)

    def _introduce(
        self, entries: dict[RequestId, ContinuedRequest]
    ) -> tuple[list[NewRequest], list[tuple[BlockId, BlockId]]]:
        """Take forked beams out of the entries, for the ranks have to be told all of them. Copies are made at once, for
        those that are not planned yet too: later the beam that they come from may have lost its blocks.
        """
        copies = [pair for pairs in self._born.values() for pair in pairs]
        new = []
        for request_id in tuple(self._born):
            entry = entries.pop(request_id, None)
            if entry is None:
                self._born[request_id] = ()
                continue
            del self._born[request_id]
            request = self._running[request_id]
            new.append(
                NewRequest(
                    request_id,
                    entry.new_token_ids,
                    len(request.prompt_ids),
                    entry.num_computed,
                    entry.num_new,
                    entry.new_block_ids + self._kv.take_unsent(request_id),
                    request.params,
                    request.seed,
                    request.stream,
                )
            )
        return new, copies

    def _make_room(self) -> None:
        """If nothing is in flight and nothing could be planned, all that run are beams that wait for one that finds no
        room. The last of them in turn gives up its blocks: what it reported stays, so that the others get on.
        """
        if self._running and self._retired_step == self._step:
            self._preempt(max(self._running.values(), key=self._waiting.key))

    def _drop_beam(self, request: Request, group: BeamGroup) -> None:
        if self._running.pop(request.request_id, None) is not None:
            self._leave(request)
        else:
            self._waiting.remove(request.request_id)
        if request is not group.root:
            self._beams.pop(request.request_id, None)

    def _end_beams(self, group: BeamGroup, reason: FinishReason) -> None:
        for request in group.requests:
            self._drop_beam(request, group)
        del self._beams[group.root.request_id]
        group.root.finish_reason = reason

    def _finish_beams(self, group: BeamGroup) -> list[RequestOutput]:
        root = group.root
        root.num_preemptions = group.num_preemptions
        times = self._times(root)
        outputs = []
        for request_id, hypothesis in zip(root.result_ids, group.search.finished, strict=False):
            token_ids, logprobs = hypothesis.tokens()
            outputs.append(
                RequestOutput(
                    request_id,
                    token_ids,
                    logprobs if root.params.logprobs is not None else (),
                    FinishReason.STOP if token_ids[-1] in root.end_ids else FinishReason.LENGTH,
                    root.num_cached_tokens,
                    times=replace(times, num_output_tokens=len(token_ids)),
                )
            )
        assert len(outputs) == root.params.n, (len(outputs), root.params)
        self._end_beams(group, FinishReason.STOP)
        self.counters.finished += len(outputs)
        return outputs

    def _abort_beams(self, group: BeamGroup) -> Request:
        self._end_beams(group, FinishReason.ABORT)
        self._wake_forks(group.root.request_id)
        self.counters.finished += 1
        return group.root

    # -- many steps at once ------------------------------------------------------------------------------------

    def most_alike_steps(self) -> int:
        """How many steps from now on do the same to the same requests: a token to each that decodes, and the rest of
        the budget to one prompt, which they do not finish. 0 where the next step is of another kind. For simulation:
        `leap` takes them at once.
        """
        decoding, prompt, budget = self._alike()
        if (
            self._speculator is not None
            or self._spacing > 1
            or self._retired_step != self._step
            or not self._kv.can_leap
            or not self._running
        ):
            return 0
        if any(request.mark is None or LEAP_TOKEN in request.end_ids for request in decoding):
            return 0
        if not self._stays_closed(prompt, budget):
            return 0
        limits = [request.max_known - request.num_known - 1 for request in decoding]
        if prompt is not None:
            limits.append((prompt.num_remaining - 1) // budget)
        return self._kv.most_growth(decoding, min(limits))

    def next_work(self) -> StepWork:
        """Of the first of the alike steps. Each has as many context tokens more as the one before it has tokens."""
        decoding, prompt, budget = self._alike()
        num_context = sum([request.num_computed for request in decoding])
        if prompt is None:
            return StepWork(0, len(decoding), num_context)
        return StepWork(budget, len(decoding), num_context + prompt.num_computed)

    def leap(self, num_steps: int) -> list[RequestOutput]:
        """Take `num_steps` steps, at most `most_alike_steps()`, with all that as many plans and commits would do where
        every token drawn is LEAP_TOKEN.
        """
        assert 0 < num_steps <= self.most_alike_steps(), num_steps
        decoding, prompt, budget = self._alike()
        for request in decoding:
            request.output_ids.extend([LEAP_TOKEN] * num_steps)
            request.num_known += num_steps
        self._kv.advance(decoding, prompt, budget, num_steps)
        self._step += num_steps
        self._retired_step = self._step
        self._forgotten.clear()
        for request in decoding:
            request.num_planned = request.num_sent = request.num_computed
            request.num_expected = request.num_known
            request.last_step = self._step
        self._recorder.leap(num_steps, len(decoding) + (prompt is not None))
        if prompt is not None:
            num_tokens = prompt.num_computed - prompt.num_planned
            self._recorder.computed(prompt, prompt.num_planned, num_tokens, has_token=False)
            prompt.num_planned = prompt.num_computed
            prompt.last_step = self._step
        self.counters.generation_tokens += num_steps * len(decoding)
        token_ids = (LEAP_TOKEN,) * num_steps
        return [
            _output((each.request_id, token_ids, (), None, each.num_cached_tokens, None, None, 0)) for each in decoding
        ]

    def _alike(self) -> tuple[list[Request], Request | None, int]:
        """Requests that decode in the next step, the prompt that is first in turn, and the budget that it has; None if
        there is none.
        """
        decoding = [request for request in self._running.values() if request.num_remaining == 1]
        prompts = self._in_turn([request for request in self._running.values() if request.num_remaining > 1])
        budget = self._max_step_tokens - len(decoding)
        return decoding, prompts[0] if prompts and budget else None, budget

    def _stays_closed(self, prompt: Request | None, budget: int) -> bool:
        """Whether no waiting request can be admitted, now or after any number of alike steps."""
        head = self._waiting.peek()
        if head is None or budget == 0 or len(self._running) >= self._max_running:
            return True
        if prompt is not None:  # it uses all the budget, and comes no later in turn as it goes on
            is_before = self._waiting.is_shortest_first and self._waiting.key(head) < self._waiting.key(prompt)
            if not is_before:
                return True
        return head.fork_of is None and self._kv.stays_out(head, self._running.values())

    # -- what is to be done ------------------------------------------------------------------------------------

    def load(self, step_time: StepTime | None, finished_per_s: float) -> EngineLoad:
        """All that a router wants to know, and what others have measured. O(requests)."""
        prefills, more_prefill_tokens = self._prefills()
        running = self._running.values()
        return EngineLoad(
            prefills=prefills,
            more_prefill_tokens=more_prefill_tokens,
            num_running=self.num_running,
            max_running_requests=self._max_running,
            num_waiting=self.num_waiting,
            num_waiting_tokens=self._waiting.num_tokens,
            num_decoding=sum([request.is_prompt_computed for request in running]),
            num_context_tokens=sum([request.num_computed for request in running]),
            num_free_blocks=self._kv.num_free_blocks,
            num_empty_blocks=self._kv.num_empty_blocks,
            num_blocks=self._kv.num_usable_blocks,
            block_size=self._kv.block_size,
            max_step_tokens=self._max_step_tokens,
            step_time=step_time,
            finished_per_s=finished_per_s,
        )

    def _prefills(self) -> tuple[tuple[tuple[RequestId, int], ...], int]:
        """`EngineLoad.prefills` and `more_prefill_tokens`. Steps in flight are still to be done."""
        key = self._waiting.key
        running = self._in_turn([r for r in self._running.values() if r.num_computed < len(r.prompt_ids)])
        waiting = heapq.nsmallest(MAX_PREFILLS, self._waiting, key=key)
        ordered = heapq.merge(running, waiting, key=key) if self._waiting.is_shortest_first else running + waiting
        forks = [fork for forks in self._forks.values() for fork in forks]
        listed = [(request.request_id, self._num_left(request)) for request in ordered]
        listed += [(fork.request_id, 1) for fork in forks]
        total = sum(map(self._num_left, running)) + self._waiting.num_tokens + len(forks)
        first = tuple(listed[:MAX_PREFILLS])
        return first, total - sum([num_tokens for _, num_tokens in first])

    def _num_left(self, request: Request) -> int:
        """Tokens to compute. A waiting request will find some in the cache."""
        is_running = request.request_id in self._running
        return request.num_known - request.num_computed if is_running else request.num_remaining

    def check(self) -> None:
        """Assert what must hold between steps (a self-audit, run when idle)."""
        self._kv.check()
        assert all(self._kv.holds(request_id) for request_id in self._running)
        assert all(each.num_computed < each.num_known or self._has_reported(each) for each in self._running.values())
        if not self.has_work and self._retired_step == self._step:
            assert self._kv.num_free_blocks == self._kv.num_usable_blocks


def request_times(request: Request, now: float, spans: tuple[Span, ...] = ()) -> RequestTimes:
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
        spans=spans,
    )
