"""What a finished request tells of its time: spans that follow each other and add up."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.engine.memory.kv_manager import KVManager
from shoal.engine.plan import ContinuedRequest, NewRequest, StepPlan, StepResult
from shoal.engine.request import Request, RequestId, RequestOutput, SamplingParams
from shoal.engine.scheduling.scheduler import Scheduler
from shoal.engine.scheduling.waiting_queue import WaitingQueue
from shoal.engine.spans import MAX_SPANS, RankWork, Span, append_span, work_between

STEP_S = 0.1


class Replica:
    """A scheduler whose steps take STEP_S, on a clock of its own."""

    def __init__(self, *, num_blocks: int = 200, max_step_tokens: int = 64, max_running: int = 8, spacing: int = 1):
        self.now = 100.0
        self.scheduler = Scheduler(
            KVManager(num_blocks, 4, watermark=0.0),
            WaitingQueue("fcfs", 30.0),
            max_step_tokens=max_step_tokens,
            max_running_requests=max_running,
            max_model_len=(num_blocks - 1) * 4,
            eos_token_ids=(),
            spacing=spacing,
            clock=lambda: self.now,
        )
        self.work = (RankWork("pp0/tp0", 0, 0.0, 0.0), RankWork("pp1/tp0", 0, 0.0, 0.0))
        self.finished: dict[str, RequestOutput] = {}
        self.requests: dict[RequestId, Request] = {}

    def add(self, name: str, num_prompt: int, max_tokens: int = 4, fork_of: str | None = None) -> None:
        prompt_ids = tuple(random.Random(fork_of or name).choices(range(1, 999), k=num_prompt))
        request = Request(
            RequestId(name), prompt_ids, SamplingParams(max_tokens=max_tokens), seed=0, arrival_s=self.now,
            fork_of=RequestId(fork_of) if fork_of else None,
        )  # fmt: skip
        self.requests[request.request_id] = request
        self.scheduler.add(request)

    def step(self) -> StepPlan:
        plan = self.scheduler.plan()
        if plan.is_empty:
            return plan
        self.now += STEP_S
        first, second = self.work
        self.work = (
            RankWork(first.rank, first.num_steps + 1, first.compute_s + 0.06, first.wait_s),
            RankWork(second.rank, second.num_steps + 1, second.compute_s + 0.03, second.wait_s + 0.05),
        )
        entries: Sequence[NewRequest | ContinuedRequest] = (*plan.new, *plan.continued)
        sampled = {
            entry.request_id: (7,)
            for entry in entries
            if entry.num_computed + entry.num_new == self.requests[entry.request_id].num_known
        }
        for output in self.scheduler.commit(plan, StepResult(plan.step, sampled, ranks=self.work)):
            if output.finish_reason is not None:
                self.finished[output.request_id] = output
        return plan

    def drain(self) -> None:
        while self.scheduler.has_work:
            assert not self.step().is_empty

    def spans(self, name: str) -> tuple[Span, ...]:
        times = self.finished[name].times
        assert times is not None
        return times.spans


def kinds(spans: Sequence[Span]) -> list[str]:
    return [span.kind for span in spans]


def test_chunks_then_one_span_for_all_of_its_decoding() -> None:
    replica = Replica(max_step_tokens=16)
    replica.add("long", 40, max_tokens=11)
    replica.drain()
    queue, *chunks, decode = replica.spans("long")
    assert kinds([queue, *chunks, decode]) == ["queue", "prefill", "prefill", "prefill", "decode"]
    assert [chunk.num_tokens for chunk in chunks] == [16, 16, 8]
    assert [round(chunk.seconds, 6) for chunk in chunks] == [STEP_S] * 3
    assert (decode.num_tokens, decode.num_steps, decode.mean_batch) == (10, 10, 1.0)
    assert decode.seconds == pytest.approx(10 * STEP_S)
    assert [(w.rank, w.num_steps) for w in decode.ranks] == [("pp0/tp0", 10), ("pp1/tp0", 10)]
    assert decode.ranks[1].compute_s == pytest.approx(0.3)
    assert decode.ranks[1].wait_s == pytest.approx(0.5)


def test_what_was_found_in_the_prefix_cache_is_told_once() -> None:
    replica = Replica()
    replica.add("first", 40)
    replica.drain()
    replica.requests.clear()
    prompt_ids = tuple(random.Random("first").choices(range(1, 999), k=40))
    again = Request(RequestId("again"), prompt_ids, SamplingParams(max_tokens=4), seed=0, arrival_s=replica.now)
    replica.requests[again.request_id] = again
    replica.scheduler.add(again)
    replica.drain()
    _, chunk, _ = replica.spans("again")
    assert chunk.num_cached == 36
    assert chunk.num_tokens == 4


@pytest.mark.parametrize(
    ("options", "obstacle"),
    [({"max_running": 1}, "slots"), ({"num_blocks": 14}, "blocks"), ({"max_step_tokens": 40}, "tokens")],
)
def test_a_request_tells_what_it_waited_for(options: dict[str, Any], obstacle: str) -> None:
    replica = Replica(**options)
    replica.add("first", 40, max_tokens=5)
    replica.add("second", 20, max_tokens=2)
    replica.drain()
    queue = replica.spans("second")[0]
    assert queue.num_ahead == 1
    assert queue.seconds > 0
    assert max(queue.waits, key=lambda wait: wait[1])[0] == obstacle
    assert sum(seconds for _, seconds in queue.waits) == pytest.approx(queue.seconds)
    assert replica.scheduler.held_s[obstacle] == pytest.approx(queue.seconds)  # type: ignore[index]


def test_a_further_sample_waits_for_the_prompt() -> None:
    replica = Replica(max_step_tokens=16)
    replica.add("one", 40)
    replica.add("two", 40, fork_of="one")
    replica.drain()
    queue, *_ = replica.spans("two")
    assert dict(queue.waits)["prompt"] == pytest.approx(3 * STEP_S)


def test_a_preempted_request_tells_how_long_and_what_was_computed_again() -> None:
    replica = Replica(num_blocks=14, max_step_tokens=32)
    for index in range(3):
        replica.add(f"r{index}", 8, max_tokens=24)
    replica.drain()
    victims = [name for name, output in replica.finished.items() if output.times and output.times.num_preemptions]
    assert victims
    for name in victims:
        spans = replica.spans(name)
        times = replica.finished[name].times
        assert times is not None
        assert kinds(spans).count("preempted") == times.num_preemptions
        gone = next(span for span in spans if span.kind == "preempted")
        assert gone.seconds > 0
        assert "blocks" in dict(gone.waits)
        assert kinds(spans)[kinds(spans).index("preempted") + 1] == "recompute"


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 20)), min_size=1, max_size=12),
    st.sampled_from([14, 24, 200]),
    st.sampled_from([8, 16, 64]),
)
def test_spans_follow_each_other_and_count_every_token(
    sizes: list[tuple[int, int]], num_blocks: int, max_step_tokens: int
) -> None:
    replica = Replica(num_blocks=num_blocks, max_step_tokens=max_step_tokens, max_running=4)
    for index, (num_prompt, max_tokens) in enumerate(sizes):
        replica.add(f"r{index}", min(num_prompt, 20), max_tokens=max_tokens)
        if index % 3 == 0:
            replica.step()
    replica.drain()
    for name, output in replica.finished.items():
        times, spans = output.times, replica.spans(name)
        assert times is not None
        assert spans[0].kind == "queue"
        assert spans[0].start_s == times.arrival_s
        assert spans[-1].end_s == pytest.approx(times.finished_s)
        for before, after in itertools.pairwise(spans):
            assert before.end_s <= after.start_s + 1e-9
        computed = sum(span.num_tokens for span in spans if span.kind == "prefill")
        assert times.num_preemptions or computed + times.num_cached_tokens == times.num_prompt_tokens
        drawn_by_chunks = sum(span.kind in ("prefill", "recompute") for span in spans)
        decoded = sum(span.num_tokens for span in spans if span.kind == "decode")
        assert decoded + 1 <= times.num_output_tokens <= decoded + drawn_by_chunks or times.num_output_tokens == 1


def test_spans_stay_few_and_their_seconds_add_up() -> None:
    replica = Replica(num_blocks=600, max_step_tokens=8)
    replica.add("long", 2000, max_tokens=2)
    replica.drain()
    spans = replica.spans("long")
    chunks = [span for span in spans if span.kind == "prefill"]
    assert len(spans) <= MAX_SPANS + 1
    assert sum(chunk.num_tokens for chunk in chunks) == 2000
    assert sum(chunk.num_steps for chunk in chunks) == 250
    assert sum(chunk.seconds for chunk in chunks) == pytest.approx(250 * STEP_S)


def test_a_rank_that_told_nothing_meanwhile_is_left_out() -> None:
    before = (RankWork("pp0/tp0", 3, 1.0, 0.0), RankWork("pp1/tp0", 3, 1.0, 0.5))
    after = (RankWork("pp0/tp0", 5, 1.5, 0.25), before[1])
    assert work_between(before, after) == (RankWork("pp0/tp0", 2, 0.5, 0.25),)
    assert work_between(after, after) == ()


def test_beams_tell_one_story(make_harness: Callable[..., Any]) -> None:
    harness = make_harness(num_blocks=100)
    params = {"n": 2, "best_of": 4, "use_beam_search": True, "temperature": 0.0}
    harness.add("beam", tuple(range(1, 20)), 6, params=params, hypothesis_ids=(RequestId("beam"), RequestId("b2")))
    harness.drain()
    spans = harness.finished["beam"].times.spans
    assert kinds(spans)[:2] == ["queue", "prefill"]
    assert kinds(spans)[2:] in ([], ["decode"])


def test_what_is_past_the_bound_joins_its_kind() -> None:
    spans = [Span("prefill", 0.0, 1.0, 1.0, num_tokens=3, num_steps=1, mean_batch=2.0)] * MAX_SPANS
    append_span(spans, Span("prefill", 5.0, 7.0, 2.0, num_tokens=4, num_steps=3, mean_batch=4.0))
    append_span(spans, Span("decode", 7.0, 8.0, 1.0))
    assert len(spans) == MAX_SPANS + 1
    joined = spans[MAX_SPANS - 1]
    assert (joined.start_s, joined.end_s, joined.seconds, joined.num_tokens) == (0.0, 7.0, 3.0, 7)
    assert joined.mean_batch == 3.5
