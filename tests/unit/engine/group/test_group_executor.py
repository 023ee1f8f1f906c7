"""A coordinator and its ranks, over real sockets and process groups; the ranks are threads and compute nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import zmq

from shoal.engine.config import ConfigError
from shoal.engine.executor import ExecutorError
from shoal.engine.group.messages import Failed, Stepped, encode, socket_name
from shoal.engine.parallel.topology import Topology
from shoal.engine.plan import ContinuedRequest, StepPlan, StepResult
from shoal.engine.request import RequestId

# A dead rank is noticed within this, though the machine be busy: twenty times what it takes on an idle one.
PROMPT_S = 4.0

Open = Callable[..., Any]
MakeScript = Callable[..., Any]


def a_plan(step: int) -> StepPlan:
    return StepPlan(step, continued=(ContinuedRequest(RequestId("a"), 3, 1, (5,), ()),), num_tokens=1)


def only(rank: int, run: Callable[[], object]) -> Callable[[Topology], object]:
    """For one rank of the group."""
    return lambda topology: run() if topology.rank == rank else None


def raise_it(error: Exception) -> Callable[[], object]:
    def run() -> None:
        raise error

    return run


def run_steps(opened: Any, count: int = 1) -> None:
    for step in range(count):
        opened.executor.submit(a_plan(step))
        assert opened.executor.collect() == StepResult(step, {RequestId("a"): (step,)})


def stay_idle(opened: Any) -> None:
    while True:
        opened.executor.check()


# -- what it does ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tensor_parallel", "pipeline_parallel"), [(1, 2), (2, 1), (2, 2)])
def test_every_rank_gets_every_plan_and_results_come_in_order(
    open_threads: Open, make_script: MakeScript, tensor_parallel: int, pipeline_parallel: int
) -> None:
    script = make_script()
    opened = open_threads(script, tensor_parallel=tensor_parallel, pipeline_parallel=pipeline_parallel)
    opened.executor.start()
    plans = [a_plan(step) for step in range(20)]
    in_flight = opened.config.max_steps_in_flight
    results = []
    for index, plan in enumerate(plans):
        opened.executor.submit(plan)
        if index + 1 >= in_flight:
            results.append(opened.executor.collect())
    results += [opened.executor.collect() for _ in range(in_flight - 1)]
    assert results == [StepResult(step, {RequestId("a"): (step,)}) for step in range(20)]
    deadline_s = time.monotonic() + PROMPT_S
    while any(len(seen) < 20 for seen in script.plans.values()) and time.monotonic() < deadline_s:
        time.sleep(0.01)  # ranks that do not answer may be behind
    assert script.plans == dict.fromkeys(range(tensor_parallel * pipeline_parallel), plans)


def test_the_pool_is_as_large_as_the_smallest_rank_can_hold(open_threads: Open, make_script: MakeScript) -> None:
    script = make_script(num_blocks=lambda topology: 50 - topology.rank)
    opened = open_threads(script, tensor_parallel=2, pipeline_parallel=2)
    info = opened.executor.start()
    assert info.num_blocks == 47
    assert script.allocated == [47] * 4
    assert [(rank.stage, rank.tensor_rank) for rank in info.ranks] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert {rank.kv_bytes for rank in info.ranks} == {47 * 4}  # each was told that four share the host


def test_a_step_is_launched_while_another_one_is_awaited(open_threads: Open, make_script: MakeScript) -> None:
    """What keeps a CUDA device busy: the second plan is launched before the first one's result is there."""
    is_second_launched = threading.Event()
    num_launched = 0

    def count() -> None:
        nonlocal num_launched
        num_launched += 1
        if num_launched == 2:
            is_second_launched.set()

    def wait() -> None:
        assert is_second_launched.wait(PROMPT_S)

    script = make_script(on_launch=only(1, count), on_wait=only(1, wait))
    executor = open_threads(script, pipeline_parallel=2).executor
    executor.start()
    executor.submit(a_plan(1))
    executor.submit(a_plan(2))
    assert [executor.collect().step, executor.collect().step] == [1, 2]


def test_loading_is_told_for_all_ranks_together(open_threads: Open, make_script: MakeScript) -> None:
    opened = open_threads(make_script(), pipeline_parallel=3)
    opened.executor.start()
    assert opened.progress[:4] == [("starting ranks", number, 3) for number in range(4)]
    told = [(done, total) for what, done, total in opened.progress if what == "loading weights"]
    assert {total for _, total in told} == {30}
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1] == (30, 30)


def test_a_long_step_is_no_reason_to_count_a_rank_as_dead(open_threads: Open, make_script: MakeScript) -> None:
    script = make_script(on_launch=only(1, lambda: time.sleep(2.5)))
    opened = open_threads(script, pipeline_parallel=2, heartbeat_timeout_s=1.0)
    opened.executor.start()
    run_steps(opened)


def test_an_idle_group_stays_alive(open_threads: Open, make_script: MakeScript) -> None:
    opened = open_threads(make_script(), pipeline_parallel=2, heartbeat_timeout_s=1.0)
    opened.executor.start()
    time.sleep(2.5)
    opened.executor.check()
    run_steps(opened)


# -- what goes wrong ------------------------------------------------------------------------------------------


def test_a_shape_that_cannot_be_is_refused_before_anything_starts(open_threads: Open, make_script: MakeScript) -> None:
    for options, name in (
        ({"pipeline_parallel": 5}, "pipeline_parallel"),
        ({"tensor_parallel": 3}, "tensor_parallel"),
        ({"tensor_parallel": 0}, "tensor_parallel"),
        ({"pipeline_parallel": 2, "stage_layers": (1, 1)}, "stage_layers"),
    ):
        script = make_script()
        with pytest.raises(ConfigError) as caught:
            open_threads(script, **options)
        assert caught.value.field == name
        assert not script.plans, "a worker was made"


def test_a_rank_that_raises_ends_the_group_and_is_named(open_threads: Open, make_script: MakeScript) -> None:
    script = make_script(on_launch=only(1, raise_it(RuntimeError("no kernel"))))
    opened = open_threads(script, tensor_parallel=2)
    opened.executor.start()
    start_s = time.monotonic()
    with pytest.raises(ExecutorError, match=r"rank 1 \(stage 0, tensor rank 1\) on host .*, pid \d+: Run.*: no kernel"):
        run_steps(opened, count=1000)  # rank 0 answers some: it has nothing to do with rank 1
    assert time.monotonic() - start_s < PROMPT_S
    for call in (opened.executor.check, opened.executor.collect, lambda: opened.executor.submit(a_plan(2))):
        with pytest.raises(ExecutorError, match="no kernel"):
            call()
    assert all(not rank.thread.is_alive() or rank.rank._is_stopped.is_set() for rank in opened.launcher.ranks)


def test_an_error_that_shows_only_in_the_result_ends_the_group_too(open_threads: Open, make_script: MakeScript) -> None:
    script = make_script(on_wait=only(1, raise_it(RuntimeError("device-side assert"))))
    executor = open_threads(script, pipeline_parallel=2).executor
    executor.start()
    executor.submit(a_plan(1))
    with pytest.raises(ExecutorError, match=r"rank 1 .*device-side assert"):
        executor.collect()


def test_a_config_error_of_a_rank_is_a_config_error_here(open_threads: Open, make_script: MakeScript) -> None:
    script = make_script(on_load=only(1, raise_it(ConfigError("too much", field="kv_memory_bytes"))))
    executor = open_threads(script, pipeline_parallel=2).executor
    with pytest.raises(ConfigError, match=r"^too much$") as caught:
        executor.start()
    assert caught.value.field == "kv_memory_bytes"


@pytest.mark.parametrize("is_loaded", [False, True], ids=["loading", "idle"])
def test_a_rank_that_has_ended_is_named(open_threads: Open, make_script: MakeScript, is_loaded: bool) -> None:
    is_over = threading.Event()
    opened = open_threads(
        make_script(on_load=nothing_or(is_loaded, lambda topology: is_over.wait(10))), pipeline_parallel=2
    )
    if is_loaded:
        opened.executor.start()
    opened.launcher.ranks[0].reason = "was killed by signal 9"
    start_s = time.monotonic()
    with pytest.raises(ExecutorError, match=r"rank 0 \(stage 0, tensor rank 0\) on host .* was killed by signal 9"):
        stay_idle(opened) if is_loaded else opened.executor.start()
    assert time.monotonic() - start_s < PROMPT_S
    is_over.set()


def nothing_or(is_nothing: bool, do: Callable[[Topology], object]) -> Callable[[Topology], object]:
    return (lambda topology: None) if is_nothing else do


def test_the_death_behind_a_peers_complaint_is_what_is_told(open_threads: Open, make_script: MakeScript) -> None:
    """A rank whose neighbour dies complains of a lost connection, often before anyone has seen the death."""
    script = make_script(on_launch=only(0, raise_it(RuntimeError("connection closed by peer"))))
    opened = open_threads(script, pipeline_parallel=2)
    opened.executor.start()
    threading.Timer(0.05, setattr, (opened.launcher.ranks[1], "reason", "was killed by signal 9")).start()
    with pytest.raises(ExecutorError, match=r"rank 1 .*was killed by signal 9"):
        run_steps(opened, count=1000)


def test_ranks_tell_what_they_did_and_how_long(open_threads: Open, make_script: MakeScript) -> None:
    script = make_script(on_launch=lambda topology: time.sleep(0.06 if topology.rank else 0.02))
    opened = open_threads(script, pipeline_parallel=2)
    opened.executor.start()
    for step in range(1, 6):
        opened.executor.submit(a_plan(step))
        told = opened.executor.collect().ranks
    work = {one.rank: one for one in told}
    assert work.keys() == {"pp0/tp0", "pp1/tp0"}
    assert 4 <= work["pp1/tp0"].num_steps <= 5
    for one in work.values():
        least_s = 0.06 if one.rank.startswith("pp1") else 0.02
        assert one.compute_s >= least_s * one.num_steps
        assert one.wait_s == 0.0


def test_a_silent_rank_counts_as_dead(open_threads: Open, make_script: MakeScript) -> None:
    is_over = threading.Event()
    script = make_script(on_wait=only(1, lambda: is_over.wait(10)))  # its sockets stay open until then
    opened = open_threads(script, pipeline_parallel=2, heartbeat_timeout_s=1.0)
    opened.executor.start()
    opened.launcher.ranks[1].exit_reason = lambda: None  # as if on a host that can no longer be reached
    start_s = time.monotonic()
    opened.executor.submit(a_plan(1))
    opened.launcher.ranks[1].kill()
    with pytest.raises(ExecutorError, match=r"rank 1 .* has been silent for \d"):
        opened.executor.collect()
    assert time.monotonic() - start_s < 1.0 + PROMPT_S
    is_over.set()


def test_a_step_that_takes_too_long_is_given_up_and_says_who_is_late(
    open_threads: Open, make_script: MakeScript
) -> None:
    is_over = threading.Event()
    script = make_script(on_launch=only(0, lambda: is_over.wait(10)))
    opened = open_threads(script, pipeline_parallel=2, step_timeout_s=1.5, heartbeat_timeout_s=1.0)
    opened.executor.start()
    opened.launcher.script.on_wait = only(1, lambda: is_over.wait(10))
    opened.executor.submit(a_plan(9))
    start_s = time.monotonic()
    with pytest.raises(ExecutorError, match=r"step 9 has taken more than 1.5 s; furthest behind: rank 0 \(stage 0"):
        opened.executor.collect()
    assert 1.5 <= time.monotonic() - start_s < 1.5 + PROMPT_S
    is_over.set()


def test_a_rank_ends_when_its_coordinator_is_gone(open_threads: Open, make_script: MakeScript) -> None:
    opened = open_threads(make_script(), pipeline_parallel=2, heartbeat_timeout_s=1.0)
    opened.executor.start()
    for rank in opened.launcher.ranks:
        rank.kill = lambda: None  # as if the coordinator's host had vanished
    opened.executor.close()
    deadline_s = time.monotonic() + 1.0 + PROMPT_S
    for rank in opened.launcher.ranks:
        rank.thread.join(deadline_s - time.monotonic())
        assert not rank.thread.is_alive()
        assert "coordinator has been silent for 1 s" in rank.lost[0]


# -- closing --------------------------------------------------------------------------------------------------


def test_closing_from_another_thread_ends_a_wait(open_threads: Open, make_script: MakeScript) -> None:
    is_over = threading.Event()
    executor = open_threads(make_script(on_launch=lambda topology: is_over.wait(10)), pipeline_parallel=2).executor
    executor.start()
    executor.submit(a_plan(1))
    threading.Timer(0.2, executor.close).start()
    start_s = time.monotonic()
    with pytest.raises(ExecutorError, match="closed"):
        executor.collect()
    assert time.monotonic() - start_s < PROMPT_S
    is_over.set()


def test_closing_twice_is_closing_once(open_threads: Open, make_script: MakeScript) -> None:
    executor = open_threads(make_script(), pipeline_parallel=2).executor
    executor.close()
    executor.close()
    with pytest.raises(ExecutorError, match="closed"):
        executor.check()


def test_several_threads_may_close_at_once(open_threads: Open, make_script: MakeScript) -> None:
    executor = open_threads(make_script(), pipeline_parallel=2).executor
    with ThreadPoolExecutor(4) as pool:
        closings = [pool.submit(executor.close) for _ in range(4)]
        for closing in closings:
            closing.result(PROMPT_S)


# -- strangers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [[encode(Failed("lies"))], [b""], [b"\xc1"], [encode(Failed("lies")), b"more"], []])
def test_who_does_not_know_the_key_is_not_heard(
    open_threads: Open, make_script: MakeScript, frames: list[bytes]
) -> None:
    opened = open_threads(make_script(), pipeline_parallel=2)
    start = opened.launcher.starts[0]
    wrong_key = "0" * len(start.key)
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.setsockopt(zmq.LINGER, 0)
        stranger.setsockopt(zmq.ROUTING_ID, socket_name(wrong_key, 0, "plans"))
        stranger.connect(start.address)
        opened.executor.start()
        for _ in range(20):
            stranger.send_multipart(frames or [b""])
            stranger.send_multipart([encode(Stepped(StepResult(0, {RequestId("a"): (666,)})))])
        run_steps(opened, count=20)
        assert not stranger.poll(200), "a stranger was answered"
