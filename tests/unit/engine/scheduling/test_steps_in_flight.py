"""Steps are planned while earlier ones run: what may overlap, what may not, and what it costs."""

from __future__ import annotations

from collections import Counter

import pytest

from shoal.engine.plan import StepPlan
from shoal.engine.request import RequestId

SHAPES = [(stages, is_async) for stages in (1, 2, 3, 4) for is_async in (False, True)]


def prompt(seed: int, length: int) -> tuple[int, ...]:
    return tuple(1 + (seed * 131 + i * 17) % 900 for i in range(length))


class Recorder:
    """Keeps what was in flight at each submit of a harness's executor."""

    def __init__(self, harness) -> None:
        self.overlaps: list[tuple[StepPlan, ...]] = []
        executor, submit = harness.executor, harness.executor.submit

        def recorded(plan: StepPlan) -> None:
            submit(plan)
            self.overlaps.append(tuple(executor.in_flight))

        executor.submit = recorded


def sampled(plan: StepPlan) -> set[RequestId]:
    return {entry.request_id for entry in (*plan.new, *plan.continued)}


@pytest.mark.parametrize(("stages", "is_async"), SHAPES)
def test_busy_stages_all_have_a_step_and_one_waits(make_harness, stages, is_async):
    harness = make_harness(pipeline_parallel=stages, async_scheduling=is_async, num_blocks=400)
    recorder = Recorder(harness)
    for i in range(12):
        harness.add(f"r{i}", prompt(i, 6), max_tokens=20)
    harness.drain()
    assert max(map(len, recorder.overlaps)) == stages + is_async
    decoding = recorder.overlaps[3 * stages : -3 * stages]
    assert Counter(map(len, decoding)).most_common(1)[0][0] == stages + is_async


@pytest.mark.parametrize(("stages", "is_async"), SHAPES)
def test_requests_are_dealt_evenly_over_the_stages(make_harness, expected, stages, is_async):
    harness = make_harness(pipeline_parallel=stages, async_scheduling=is_async, num_blocks=400, max_step_tokens=64)
    for i in range(12):
        harness.add(f"r{i}", prompt(i, 4), max_tokens=30)
    harness.drain()
    sizes = [len(sampled(plan)) for plan in harness.executor.plans]
    assert max(sizes[: -2 * stages]) == min(sizes[: -2 * stages]) == 12 // stages
    for i in range(12):
        assert harness.outputs[f"r{i}"] == expected(prompt(i, 4), 30)


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_a_token_that_is_not_known_yet_has_passed_every_stage(make_harness, stages):
    harness = make_harness(pipeline_parallel=stages, async_scheduling=True, num_blocks=400)
    for i in range(7):
        harness.add(f"r{i}", prompt(i, 9), max_tokens=15)
    harness.drain()
    last: dict[RequestId, int] = {}
    num_pending = 0
    for plan in harness.executor.plans:
        for entry in plan.continued:
            if entry.num_pending:
                num_pending += 1
                assert plan.step - last[entry.request_id] >= stages
                assert entry.new_token_ids == ()
        last.update(dict.fromkeys(sampled(plan), plan.step))
    assert num_pending > 40


def test_without_async_scheduling_every_token_is_known(make_harness):
    harness = make_harness(pipeline_parallel=3, async_scheduling=False)
    for i in range(7):
        harness.add(f"r{i}", prompt(i, 9), max_tokens=15)
    harness.drain()
    assert not any(entry.num_pending for plan in harness.executor.plans for entry in plan.continued)


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_chunks_of_one_prompt_follow_each_other_through_the_stages(make_harness, stages):
    harness = make_harness(
        pipeline_parallel=stages, async_scheduling=False, max_step_tokens=8, max_running_requests=2, num_blocks=64
    )
    recorder = Recorder(harness)
    harness.add("long", prompt(0, 48), max_tokens=1)
    harness.drain()
    assert len(harness.executor.plans) == 6
    assert max(map(len, recorder.overlaps)) == stages


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_a_length_limit_wastes_no_step_and_a_stop_token_at_most_one(make_harness, expected, stages):
    answer = expected(prompt(0, 5), 10)
    for params, most in (({}, 10), ({"stop_token_ids": (answer[5],)}, 6 + 1)):
        harness = make_harness(pipeline_parallel=stages, async_scheduling=True)
        harness.add("r", prompt(0, 5), max_tokens=10, params=params)
        harness.drain()
        assert harness.outputs["r"] == answer[: 6 if params else 10]
        assert len(harness.executor.plans) <= most


def test_blocks_that_a_step_in_flight_may_write_are_nobodys(make_harness, expected):
    answer = expected(prompt(0, 5), 10)
    harness = make_harness(async_scheduling=True, block_size=2)
    harness.add("r", prompt(0, 5), max_tokens=10, params={"stop_token_ids": (answer[5],)})
    while "r" not in harness.finished:
        harness.step()
    held = set(harness.executor.tables["r"])
    assert harness.executor.in_flight, "the step after the stop token was planned already"
    assert held.isdisjoint(harness.core._kv._pool.free_blocks())
    harness.step()
    assert held <= set(harness.core._kv._pool.free_blocks())
    assert not harness.core.has_work


def test_a_request_preempted_in_flight_keeps_the_token_of_that_step(make_harness, expected):
    for at in range(3, 12):
        harness = make_harness(async_scheduling=True, max_running_requests=1)
        request = harness.add("a", prompt(1, 11), max_tokens=10)
        for _ in range(at):
            harness.step()
        if request.is_finished:
            break
        harness.core._scheduler._preempt(request)
        harness.drain()
        assert harness.outputs["a"] == expected(prompt(1, 11), 10)
    assert at > 8


def test_running_out_of_blocks_preempts_one_request_not_all(make_harness, expected):
    harness = make_harness(
        num_blocks=14, block_size=2, async_scheduling=True, max_running_requests=4, watermark=0.0, max_model_len=24
    )
    for i in range(4):
        harness.add(f"r{i}", prompt(i, 4), max_tokens=8)
    while not harness.core.stats().preemptions_total:
        harness.step()
    for _ in range(2):
        harness.step()
    assert harness.core.stats().preemptions_total <= 2
    harness.drain()
    for i in range(4):
        assert harness.outputs[f"r{i}"] == expected(prompt(i, 4), 8)
