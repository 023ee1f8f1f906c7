"""The asyncio front: streams, cancellation, failure. The fake device checks every slot underneath."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace

import pytest

from shoal.engine.config import ConfigError
from shoal.engine.executor import ExecutorError
from shoal.engine.plan import StepPlan, StepResult
from shoal.engine.request import FinishReason, Request, RequestError, RequestId, RequestOutput, SamplingParams
from shoal.engine.streaming import AsyncEngine


def request(name: str, length: int = 7, max_tokens: int = 6, **fields: object) -> Request:
    return Request(
        RequestId(name),
        tuple(range(1, length + 1)),
        SamplingParams(max_tokens=max_tokens),
        seed=0,
        arrival_s=time.monotonic(),
        **fields,  # type: ignore[arg-type]
    )


@pytest.fixture
async def make_engine(make_harness, make_config):
    engines = []

    async def make(executor=None, observer=None, **options):
        config = make_config(block_size=4, **options)
        executor = executor or make_harness().executor
        engine = AsyncEngine(lambda progress: (config, executor), observer=observer)
        await engine.start()
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        await engine.close()


class Collector:
    def __init__(self) -> None:
        self.batches: list[list[RequestOutput]] = []
        self.threads: set[str] = set()

    def deliver(self, outputs: list[RequestOutput]) -> None:
        self.batches.append(outputs)
        self.threads.add(threading.current_thread().name)


async def wait_until(condition, timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        await asyncio.sleep(0.005)


async def test_streams_are_complete_and_ordered(make_engine, expected):
    engine = await make_engine()

    async def collect(i: int) -> list[int]:
        return [token async for output in engine.generate(request(f"r{i}", 3 + i)) for token in output.token_ids]

    answers = await asyncio.gather(*(collect(i) for i in range(8)))
    for i, tokens in enumerate(answers):
        assert tokens == expected(tuple(range(1, 4 + i)), 6)


async def test_a_sink_is_called_once_per_step(make_engine):
    engine = await make_engine()
    sink = Collector()
    engine.submit([request(f"r{i}") for i in range(5)], sink)
    await wait_until(lambda: engine.stats().requests_finished_total == 5)
    assert sink.threads == {"engine"}
    assert len(sink.batches) == 6
    assert all(len(batch) == 5 for batch in sink.batches)
    assert all(output.times is not None for output in sink.batches[-1])


class SlowExecutor:
    """The fake device with a fixed step time, and a step at which it fails."""

    def __init__(self, inner, step_s: float = 0.02, fail_at: int | None = None) -> None:
        self.inner, self.step_s, self.fail_at = inner, step_s, fail_at
        self.is_closed = False
        self.is_dead = False

    def start(self):
        return self.inner.start()

    def submit(self, plan: StepPlan) -> None:
        self.inner.submit(plan)

    def collect(self) -> StepResult:
        time.sleep(self.step_s)
        result = self.inner.collect()
        if result.step == self.fail_at:
            raise RuntimeError("rank 0 is gone")
        return result

    def check(self) -> None:
        if self.is_dead:
            raise ExecutorError("rank 0 has died")

    def close(self) -> None:
        self.is_closed = True


async def test_closing_a_stream_aborts_within_a_step(make_engine, make_harness):
    engine = await make_engine(SlowExecutor(make_harness().executor))
    stream = engine.generate(request("r", max_tokens=200))
    await anext(stream)
    await stream.aclose()
    stopped_at = engine.stats().steps_total
    await wait_until(lambda: engine.stats().num_running == 0)
    stats = engine.stats()
    assert stats.steps_total <= stopped_at + 2
    assert stats.num_free_blocks == stats.num_blocks


async def test_a_search_ends_with_all_its_results_and_closing_it_frees_its_beams(make_engine):
    engine = await make_engine()
    fields = {"n": 3, "use_beam_search": True}
    ids = (RequestId("b"), RequestId("b1"), RequestId("b2"))
    search = replace(request("b"), params=SamplingParams(max_tokens=6, **fields), hypothesis_ids=ids)
    outputs = [output async for output in engine.generate(search)]
    assert [output.request_id for output in outputs] == ["b", *ids]
    assert all(output.finish_reason is not None for output in outputs[1:])
    endless = SamplingParams(max_tokens=200, ignore_eos=True, **fields)
    stream = engine.generate(replace(request("b"), params=endless, hypothesis_ids=ids))
    await anext(stream)
    await stream.aclose()
    await wait_until(lambda: engine.stats().num_running == engine.stats().num_waiting == 0)
    assert engine.stats().num_free_blocks == engine.stats().num_blocks


async def test_abort_before_the_first_step(make_engine, make_harness):
    engine = await make_engine(SlowExecutor(make_harness().executor))
    sink = Collector()
    for i in range(50):
        engine.submit([request(f"r{i}")], sink)
        engine.abort([RequestId(f"r{i}")])
    await wait_until(lambda: engine.stats().num_running == engine.stats().num_waiting == 0)
    stats = engine.stats()
    assert stats.num_free_blocks == stats.num_blocks


async def test_a_refused_request_leaves_the_engine_running(make_engine, expected):
    engine = await make_engine()
    with pytest.raises(RequestError):
        engine.submit([request("fine"), request("long", 5000)], Collector())
    tokens = [token async for output in engine.generate(request("fine")) for token in output.token_ids]
    assert tokens == expected(tuple(range(1, 8)), 6)


async def test_a_failed_step_ends_every_stream_and_the_engine(make_engine, make_harness):
    executor = SlowExecutor(make_harness().executor, step_s=0.001, fail_at=4)
    engine = await make_engine(executor)

    async def last(i: int) -> RequestOutput:
        return [output async for output in engine.generate(request(f"r{i}", max_tokens=50))][-1]

    outputs = await asyncio.wait_for(asyncio.gather(*(last(i) for i in range(3))), 5)
    assert all(output.finish_reason is FinishReason.ERROR for output in outputs)
    assert all("rank 0 is gone" in (output.error or "") for output in outputs)
    with pytest.raises(ExecutorError, match="rank 0 is gone"):
        engine.check()
    with pytest.raises(ExecutorError):
        engine.submit([request("late")], Collector())
    await wait_until(lambda: executor.is_closed)


async def test_a_rank_that_dies_in_an_idle_moment_is_noticed(make_engine, make_harness):
    executor = SlowExecutor(make_harness().executor)
    engine = await make_engine(executor)
    executor.is_dead = True
    await wait_until(lambda: executor.is_closed)
    with pytest.raises(ExecutorError, match="rank 0 has died"):
        engine.check()


async def test_closing_ends_open_streams(make_engine, make_harness):
    engine = await make_engine(SlowExecutor(make_harness().executor))
    stream = engine.generate(request("r", max_tokens=200))
    await anext(stream)
    await engine.close()
    outputs = [output async for output in stream]
    assert outputs[-1].finish_reason is FinishReason.ABORT
    with pytest.raises(ExecutorError, match="closed"):
        engine.submit([request("late")], Collector())


async def test_a_start_that_fails_raises_its_own_error(make_config):
    def factory(progress):
        raise ConfigError("no such model", field="model")

    engine = AsyncEngine(factory)
    with pytest.raises(ConfigError, match="no such model"):
        await engine.start()
    await engine.close()


async def test_an_observer_sees_arrivals_before_their_step_and_steps_after_their_outputs(make_engine, make_harness):
    seen: list[tuple[str, int, int, int]] = []
    stored = []
    sink = Collector()

    def observe(core) -> None:
        load = core.load()
        name = threading.current_thread().name
        seen.append((name, len(load.prefills), core.stats().steps_total, len(sink.batches)))
        stored.extend(core.take_kv_events())

    engine = await make_engine(SlowExecutor(make_harness().executor), observer=observe)
    engine.submit([request("r", length=9, max_tokens=3)], sink)
    await wait_until(lambda: engine.stats().requests_finished_total == 1)
    await wait_until(lambda: seen[-1][2] == 3)
    assert {name for name, *_ in seen} == {"engine"}
    assert [counts for _, *counts in seen if counts[1:] == [0, 0]] == [[1, 0, 0]]
    assert [num_batches for _, _, num_steps, num_batches in seen if num_steps] == [1, 2, 3]
    assert [len(event.block_hashes) for event in stored] == [2]
