"""Who goes first under the default policy, and how far that may go."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.engine.request import RequestId
from shoal.engine.scheduling.waiting_queue import OVERTAKE


def prompt(seed: int, length: int) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(1, 997) for _ in range(length))


def order_of_first_tokens(harness) -> list[str]:
    order: list[str] = []
    while harness.core.has_work:
        order += [output.request_id for output in harness.step() if output.request_id not in order]
    return order


def test_a_short_prompt_passes_a_long_one_that_waits_and_one_that_runs(make_harness):
    harness = make_harness(num_blocks=400, max_step_tokens=16, max_running_requests=8)
    harness.add("runs", prompt(1, 200))
    harness.step()
    harness.add("waits", prompt(2, 200))
    harness.add("short", prompt(3, 10))
    assert order_of_first_tokens(harness) == ["short", "runs", "waits"]


def test_a_cached_prompt_is_a_short_one(make_harness):
    harness = make_harness(num_blocks=400, max_step_tokens=16, max_running_requests=8)
    harness.add("before", prompt(1, 200), max_tokens=1)
    harness.drain()
    harness.add("new", prompt(2, 100))
    harness.add("cached", prompt(1, 200))
    assert order_of_first_tokens(harness) == ["cached", "new"]


def test_a_prompt_that_is_nearly_computed_is_finished_first(make_harness):
    harness = make_harness(num_blocks=400, max_step_tokens=16, max_running_requests=8)
    harness.add("long", prompt(1, 100))
    for _ in range(6):
        harness.step()
    harness.add("short", prompt(2, 30))
    assert order_of_first_tokens(harness) == ["long", "short"]


def test_a_lower_priority_value_goes_first_under_the_default_policy(make_harness):
    harness = make_harness(num_blocks=400, max_step_tokens=16, max_running_requests=8)
    harness.add("usual", prompt(1, 40))
    harness.add("late", prompt(2, 20), priority=1)
    harness.add("urgent", prompt(3, 200), priority=-1)
    assert order_of_first_tokens(harness) == ["urgent", "usual", "late"]


def test_first_come_first_served_by_name(make_harness):
    harness = make_harness(num_blocks=400, max_step_tokens=16, max_running_requests=8, scheduling_policy="fcfs")
    harness.add("long", prompt(1, 200))
    harness.step()
    harness.add("short", prompt(2, 10))
    assert order_of_first_tokens(harness) == ["long", "short"]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**9))
def test_later_arrivals_that_go_first_bring_a_bounded_multiple_of_a_requests_work(make_harness, seed):
    rng = random.Random(seed)
    harness = make_harness(num_blocks=4000, max_step_tokens=16, max_running_requests=16)
    lengths: list[int] = []
    while len(lengths) < 25:
        for _ in range(rng.randrange(3)):
            lengths.append(rng.choice([1, 3, 10, 30, 80]))
            harness.add(str(len(lengths) - 1), prompt(seed + len(lengths), lengths[-1]), max_tokens=1)
        harness.core.step()
    while harness.core.has_work:
        harness.core.step()
    computed = [0] * len(lengths)
    overtaken: dict[int, int] = {}
    for plan in harness.executor.plans:
        before = list(computed)
        for entry in (*plan.new, *plan.continued):
            computed[int(entry.request_id)] += entry.num_new
        for request, length in enumerate(lengths):
            if before[request] < length == computed[request]:
                overtaken[request] = sum(before[request + 1 :])
    assert computed == lengths
    assert all(overtaken[request] <= OVERTAKE * length for request, length in enumerate(lengths))


def test_the_newest_is_preempted_and_not_one_that_decodes_for_long(make_harness):
    harness = make_harness(num_blocks=14, max_step_tokens=32, max_running_requests=4, watermark=0.0)
    old = harness.add("old", prompt(1, 8), max_tokens=30)
    for _ in range(4):
        harness.step()
    new = harness.add("new", prompt(2, 8), max_tokens=30)
    harness.drain()
    assert (old.num_preemptions, new.num_preemptions > 0) == (0, True)


@pytest.mark.parametrize("policy", ["shortest_first", "fcfs"])
def test_the_load_lists_prompts_in_the_order_they_will_be_computed(make_harness, policy):
    harness = make_harness(num_blocks=400, max_step_tokens=16, max_running_requests=8, scheduling_policy=policy)
    harness.add("decodes", prompt(0, 8), max_tokens=50)
    harness.step()
    harness.add("long", prompt(1, 200))
    harness.step()
    harness.add("short", prompt(2, 20))
    harness.add("middle", prompt(3, 40))
    harness.add("fork", prompt(3, 40), fork_of=RequestId("middle"))
    load = harness.core.load()
    prompts = [("long", 185), ("short", 20), ("middle", 40)]
    expected = [prompts[1], prompts[2], prompts[0]] if policy == "shortest_first" else prompts
    assert load.prefills == (*expected, ("fork", 1))
    assert load.more_prefill_tokens == 0
    assert (load.num_running, load.num_waiting, load.num_decoding) == (2, 3, 1)
    assert load.num_context_tokens == 9 + 15
    order = order_of_first_tokens(harness)
    assert [name for name in order if name not in ("decodes", "fork")] == [name for name, _ in expected]


def test_a_long_queue_is_summed_up(make_harness):
    harness = make_harness(num_blocks=400, max_step_tokens=16, max_running_requests=8)
    for i in range(300):
        harness.add(f"r{i}", prompt(i, 20))
    load = harness.core.load()
    assert len(load.prefills) == 256
    assert load.more_prefill_tokens == 44 * 20
    harness.core.abort(RequestId("r299"))
    assert harness.core.load().more_prefill_tokens == 43 * 20


def test_a_core_learns_what_its_steps_take_and_how_many_requests_end(make_harness):
    harness = make_harness(num_blocks=400, max_step_tokens=16, max_running_requests=8, record_kv_events=True)
    assert harness.core.load().step_time is None
    assert harness.core.load().finished_per_s == 0.0
    for i in range(20):
        harness.add(f"r{i}", prompt(i, 20))
    harness.drain()
    load = harness.core.load()
    assert load.step_time is not None
    assert 0.0 < load.step_time.seconds(0, 8, 100) < 1.0
    assert load.finished_per_s > 0.0
    assert load.num_free_blocks == load.num_blocks == 399
    stored = [block_hash for event in harness.core.take_kv_events() for block_hash in event.block_hashes]
    assert len(stored) == load.num_blocks - load.num_empty_blocks == 20 * (20 + 7) // 4 - 15
    assert harness.core.take_kv_events() == []
