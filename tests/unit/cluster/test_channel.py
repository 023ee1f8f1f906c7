"""Tokens on their way from an engine to a gateway: a real engine over a fake device, real sockets, a fake Serve."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from shoal.cluster.channel import (
    CallSummary,
    GenerateCall,
    Held,
    PeerMessage,
    Reserved,
    Settled,
    decode_gateway_message,
    encode_keepalive,
    encode_peer_message,
    encode_step,
)
from shoal.cluster.gateway import inbox, replica_backend
from shoal.cluster.gateway.backend import ReplicaFailedError
from shoal.cluster.gateway.inbox import StepInbox, TokensLostError
from shoal.cluster.gateway.replica_backend import ReplicaBackend
from shoal.cluster.replica import channel
from shoal.cluster.replica.calls import Calls
from shoal.cluster.replica.channel import GatewayChannels
from shoal.cluster.routing.model_routing import ModelRouting
from shoal.engine.config import EngineConfig, EngineOptions, Machine, ModelConfig, resolve
from shoal.engine.executor import ExecutorInfo, RankInfo
from shoal.engine.plan import StepPlan, StepResult
from shoal.engine.request import (
    FinishReason,
    RequestError,
    RequestId,
    RequestOutput,
    RequestTimes,
    SamplingParams,
    TokenLogprobs,
)
from shoal.engine.streaming import AsyncEngine

MODEL = ModelConfig(
    path="tiny",
    architecture="LlamaForCausalLM",
    num_layers=1,
    hidden_size=8,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    vocab_size=100,
    max_position=512,
    layer_windows=(None,),
    stored_dtype="float32",
    num_parameters=1,
    eos_token_ids=(0,),
    hf_config={},
)


class CountingDevice:
    """Answers each request with 1, 2, 3, ...; a step takes `step_s`. To a beam the next numbers are less likely."""

    def __init__(self, step_s: float) -> None:
        self.step_s = step_s
        self.num_steps = 0
        self.error: Exception | None = None
        self._plans: deque[StepPlan] = deque()
        self._known: dict[RequestId, int] = {}
        self._next: dict[RequestId, int] = {}
        self._num_reported: dict[RequestId, int] = {}

    def start(self) -> ExecutorInfo:
        rank = RankInfo(0, 0, "here", 1, "fake", first_layer=0, num_layers=1, weight_bytes=0, kv_bytes=0)
        return ExecutorInfo(num_blocks=512, ranks=(rank,))

    def close(self) -> None:
        pass

    def check(self) -> None:
        pass

    def submit(self, plan: StepPlan) -> None:
        self._plans.append(plan)

    def collect(self) -> StepResult:
        return self._execute(self._plans.popleft())

    def _execute(self, plan: StepPlan) -> StepResult:
        time.sleep(self.step_s)
        if self.error is not None:
            raise self.error
        self.num_steps += 1
        tokens: dict[RequestId, tuple[int, ...]] = {}
        logprobs: dict[RequestId, tuple[TokenLogprobs, ...]] = {}
        for new in plan.new:
            self._known[new.request_id] = len(new.token_ids)
            self._next[new.request_id] = 1 + len(new.token_ids) - new.num_prompt_tokens
            self._num_reported[new.request_id] = new.params.num_reported or 0
        for entry in plan.continued:
            self._known[entry.request_id] += len(entry.new_token_ids)
        for entry in (*plan.new, *plan.continued):
            if entry.num_computed + entry.num_new == self._known[entry.request_id]:
                token, count = self._next[entry.request_id], self._num_reported[entry.request_id]
                tokens[entry.request_id] = (token,)
                self._next[entry.request_id] += 1
                if count:
                    top = tuple(-0.1 * (1 + i * i) for i in range(count))
                    logprobs[entry.request_id] = (TokenLogprobs(top[0], 1, tuple(range(token, token + count)), top),)
        return StepResult(plan.step, tokens, logprobs)


class LocalResponse:
    """A Serve response whose replica is in this process."""

    def __init__(self, task: asyncio.Task[Any]) -> None:
        self._task = task

    def __await__(self) -> Any:
        return asyncio.shield(self._task).__await__()

    def cancel(self) -> None:
        self._task.cancel()


class LocalHandle:
    """A Serve handle whose replica is in this process."""

    def __init__(self, generate: Callable[[GenerateCall, str], Any]) -> None:
        self._generate = generate

    @property
    def generate(self) -> LocalHandle:
        return self

    def remote(self, call: GenerateCall, reply_to: str) -> LocalResponse:
        return LocalResponse(asyncio.ensure_future(self._generate(call, reply_to)))


INTERVAL_S = 0.03


class Rig:
    """A replica and a gateway, joined."""

    def __init__(self) -> None:
        self.device = CountingDevice(step_s=0.002)
        self.engine = AsyncEngine(lambda progress: (self._config(), self.device))
        self.calls = Calls(self.engine)
        self.inbox = StepInbox("127.0.0.1", interval_s=INTERVAL_S)
        self.routing = ModelRouting("tiny")
        self.backend = self.backend_over(self.calls.run)

    def backend_over(self, generate: Callable[[GenerateCall, str], Any]) -> ReplicaBackend:
        return ReplicaBackend("tiny", LocalHandle(generate), self.inbox, self.routing)  # type: ignore[arg-type]

    def _config(self) -> EngineConfig:
        return resolve(EngineOptions("tiny", block_size=4), MODEL, Machine("cpu", 2**30, 1))

    async def until_running(self, count: int) -> float:
        """Wait until the engine runs so many requests and none waits; seconds that took."""
        start = time.monotonic()
        while (self.engine.stats().num_running, self.engine.stats().num_waiting) != (count, 0):
            assert time.monotonic() - start < 5, self.engine.stats()
            await asyncio.sleep(0.001)
        return time.monotonic() - start


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    rig = Rig()
    await rig.engine.start()
    rig.calls.start()
    rig.inbox.start()
    yield rig
    await rig.engine.close()
    rig.calls.close()
    rig.inbox.close()
    rig.routing.close()


def call(name: str, max_tokens: int = 5, *, n: int = 1, prompt: tuple[int, ...] = (7, 8, 9)) -> GenerateCall:
    params = SamplingParams(max_tokens=max_tokens, n=n, seed=1, temperature=0.0 if n == 1 else 1.0)
    return GenerateCall(name, prompt, params)


async def tokens_of(backend: ReplicaBackend, call: GenerateCall) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {sample_id: [] for sample_id in call.sample_ids}
    async for outputs in backend.generate(call):
        for output in outputs:
            tokens[output.request_id].extend(output.token_ids)
    return tokens


async def test_every_call_gets_all_its_tokens_in_order(rig: Rig) -> None:
    calls = [call(f"c{i}", max_tokens=1 + i) for i in range(20)]
    answers = await asyncio.gather(*(tokens_of(rig.backend, c) for c in calls))
    assert answers == [{f"c{i}-0": list(range(1, i + 2))} for i in range(20)]


async def arrivals(rig: Rig, call: GenerateCall) -> list[tuple[float, int]]:
    """When outputs came, in seconds after the first ones, and how many tokens they held."""
    came = [(time.monotonic(), sum(len(o.token_ids) for o in outputs)) async for outputs in rig.backend.generate(call)]
    return [(at - came[0][0], count) for at, count in came]


async def test_tokens_that_come_fast_go_together_but_for_the_first(rig: Rig) -> None:
    came = await arrivals(rig, call("c", 100))
    assert came[0][1] == 1
    assert sum(count for _, count in came) == 100
    # The first, the second (nobody was woken lately), then once an interval, and at the end.
    assert len(came) <= 3 + came[-1][0] / INTERVAL_S
    assert len(came) < 50


async def test_tokens_that_come_slowly_are_not_kept(rig: Rig) -> None:
    rig.device.step_s = 8 * INTERVAL_S
    came = await arrivals(rig, call("c", 6))
    assert [count for _, count in came] == [1] * 6


async def test_the_end_of_a_call_is_not_kept(rig: Rig) -> None:
    rig.inbox._interval_s = 10.0
    came = await arrivals(rig, call("c", 100))
    assert len(came) <= 3, came
    assert came[-1][0] < 5.0


async def test_samples_of_a_call_come_apart_and_complete(rig: Rig) -> None:
    answer = await tokens_of(rig.backend, call("c", 6, n=3))
    assert answer == {f"c-{i}": [1, 2, 3, 4, 5, 6] for i in range(3)}


async def test_beams_of_a_call_come_at_its_end_and_count_as_its_samples(rig: Rig) -> None:
    params = SamplingParams(max_tokens=6, n=2, best_of=4, use_beam_search=True, seed=1)
    asked = GenerateCall("c", (7, 8, 9), params)
    steps = [outputs async for outputs in rig.backend.generate(asked)]
    assert [[output.token_ids for output in outputs] for outputs in steps[:-1]] == [[()]]
    best, second = steps[-1]
    assert (best.request_id, best.token_ids) == ("c-0", (1, 2, 3, 4, 5, 6))
    assert (second.request_id, len(second.token_ids)) == ("c-1", 6)
    assert second.token_ids != best.token_ids
    metrics = {point.metric: point.value for point in rig.calls.snapshot() if not point.labels}
    assert metrics["vllm:generation_tokens"] == 12
    assert metrics["vllm:request_generation_tokens"].sum == 12  # type: ignore[union-attr]
    assert rig.calls.prompts.prompts_total == 1


async def test_a_cancelled_call_frees_its_beams(rig: Rig) -> None:
    params = SamplingParams(max_tokens=200, n=2, best_of=4, use_beam_search=True, seed=1)
    stream = rig.backend.generate(GenerateCall("c", (7, 8, 9), params))
    await anext(stream)
    await rig.until_running(4)
    await stream.aclose()
    await rig.until_running(0)


async def test_one_message_per_step_however_many_calls(rig: Rig) -> None:
    received: list[int] = []
    deliver = rig.inbox._deliver

    def count(outputs: list[RequestOutput | RequestId]) -> None:
        received.append(len(outputs))
        deliver(outputs)

    rig.inbox._deliver = count  # type: ignore[method-assign]
    await asyncio.gather(*(tokens_of(rig.backend, call(f"c{i}", 10)) for i in range(8)))
    assert sum(received) == 80
    assert len(received) <= rig.device.num_steps


async def test_closing_the_generator_aborts_at_once(rig: Rig) -> None:
    stream = rig.backend.generate(call("c", 400))
    await anext(stream)
    await stream.aclose()
    assert await rig.until_running(0) < 0.5
    assert rig.engine.stats().kv_usage == 0
    finished = {p.labels: p.value for p in rig.calls.snapshot() if p.metric == "vllm:request_success"}
    assert finished["abort",] == 1


async def test_cancelling_the_reader_aborts_at_once(rig: Rig) -> None:
    reader = asyncio.create_task(tokens_of(rig.backend, call("c", 400, n=4)))
    await rig.until_running(4)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert await rig.until_running(0) < 0.5


async def test_a_refused_call_says_which_field(rig: Rig) -> None:
    with pytest.raises(RequestError) as refusal:
        await tokens_of(rig.backend, call("c", prompt=(1, 2, 10**6)))
    assert "1000000" in str(refusal.value)
    assert refusal.value.param == "prompt"
    assert await tokens_of(rig.backend, call("d", 2)) == {"d-0": [1, 2]}


async def test_a_failing_engine_ends_its_calls(rig: Rig) -> None:
    stream = rig.backend.generate(call("c", 400))
    await anext(stream)
    rig.device.error = RuntimeError("device lost")
    with pytest.raises(ReplicaFailedError, match="device lost"):
        async for _ in stream:
            pass
    with pytest.raises(ReplicaFailedError):
        await tokens_of(rig.backend, call("d"))


async def test_a_dead_replica_ends_its_calls(rig: Rig) -> None:
    async def die(call: GenerateCall, reply_to: str) -> CallSummary:
        await asyncio.sleep(0.02)
        raise ConnectionResetError

    with pytest.raises(ReplicaFailedError, match="tiny failed: ConnectionResetError"):
        await asyncio.wait_for(tokens_of(rig.backend_over(die), call("c")), timeout=2)


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keepalives every 20 ms; silence is four times as long."""
    monkeypatch.setattr(channel, "KEEPALIVE_PERIOD_S", 0.02)
    monkeypatch.setattr(inbox, "KEEPALIVE_PERIOD_S", 0.02)
    monkeypatch.setattr(inbox, "_MAX_SILENT_PERIODS", 4)


async def test_a_step_may_take_longer_than_a_replica_may_be_silent(hurry: None, rig: Rig) -> None:
    rig.device.step_s = 0.3
    assert await tokens_of(rig.backend, call("c", 2)) == {"c-0": [1, 2]}


async def test_a_replica_that_falls_silent_loses_its_calls(hurry: None, rig: Rig) -> None:
    async def never(call: GenerateCall, reply_to: str) -> CallSummary:
        rig.inbox._deliver([call.sample_ids[0]])
        return await asyncio.Future()  # as a Serve call to a host that is cut off

    start = time.monotonic()
    with pytest.raises(ReplicaFailedError, match="not been heard of"):
        await asyncio.wait_for(tokens_of(rig.backend_over(never), call("c")), timeout=2)
    assert time.monotonic() - start >= 3 * 0.02


async def test_a_call_that_waits_for_a_replica_may_wait(hurry: None, rig: Rig) -> None:
    async def later(call: GenerateCall, reply_to: str) -> CallSummary:
        await asyncio.sleep(0.3)
        return await rig.calls.run(call, reply_to)

    assert await tokens_of(rig.backend_over(later), call("c", 2)) == {"c-0": [1, 2]}


async def test_a_gateway_that_was_held_up_blames_nobody(hurry: None, rig: Rig) -> None:
    stream = rig.backend.generate(call("c", 100))
    await anext(stream)
    time.sleep(0.3)  # noqa: ASYNC251  (the event loop stands still)
    assert sum([len(outputs) async for outputs in stream]) == 99


async def test_lost_last_tokens_are_waited_for_only_so_long(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_backend, "LAST_TOKENS_TIMEOUT_S", 0.05)

    async def elsewhere(call: GenerateCall, reply_to: str) -> CallSummary:
        return await rig.calls.run(call, "tcp://127.0.0.1:1")

    with pytest.raises(TokensLostError, match="last of 5 tokens"):
        await asyncio.wait_for(tokens_of(rig.backend_over(elsewhere), call("c")), timeout=2)


async def test_a_gap_is_an_error_and_not_a_shorter_answer(rig: Rig) -> None:
    deliver = rig.inbox._deliver

    def lossy(items: list[RequestOutput | RequestId]) -> None:
        deliver([item for item in items if not (isinstance(item, RequestOutput) and item.token_ids == (3,))])

    rig.inbox._deliver = lossy  # type: ignore[method-assign]
    with pytest.raises(TokensLostError, match="1 of 5 tokens of c-0"):
        await tokens_of(rig.backend, call("c"))


async def test_who_reads_late_gets_several_steps_at_once(rig: Rig) -> None:
    one, two = RequestId("one"), RequestId("two")
    with rig.inbox.open([one, two]) as held:
        steps = [[RequestOutput(one, (1,))], [RequestOutput(two, (2, 3)), RequestOutput(one, (4,))]]
        for step in steps:
            held.put(step)
        assert await held.next() == [*steps[0], *steps[1]]
        reading = asyncio.create_task(held.next())
        await asyncio.sleep(0)
        held.put([RequestOutput(one, (5,), finish_reason=FinishReason.LENGTH)])
        held.put([RequestOutput(two, (6,), finish_reason=FinishReason.STOP)])
        held.wake()
        assert [output.token_ids for output in await reading] == [(5,), (6,)]
        assert held.is_finished


async def test_an_error_comes_after_what_was_there_before_it(rig: Rig) -> None:
    sample = RequestId("c")
    with rig.inbox.open([sample]) as held:
        held.put([RequestOutput(sample, (1,))])
        held.fail(ReplicaFailedError("gone"))
        assert [output.token_ids for output in await held.next()] == [(1,)]
        with pytest.raises(ReplicaFailedError, match="gone"):
            await held.next()


async def test_a_failed_sample_takes_no_tokens_with_it(rig: Rig) -> None:
    sample = RequestId("c")
    with rig.inbox.open([sample]) as held:
        held.put([RequestOutput(sample, (1,))])
        held.put([RequestOutput(sample, (), finish_reason=FinishReason.ERROR, error="out of luck")])
        assert [output.token_ids for output in await held.next()] == [(1,)]
        with pytest.raises(ReplicaFailedError, match="out of luck"):
            await held.next()


async def test_noise_on_the_socket_changes_nothing(rig: Rig) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    noise = context.socket(zmq.PUSH)
    noise.connect(rig.inbox.address)
    for message in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 1000, encode_step([RequestOutput(RequestId("x"), (1,))])):
        noise.send(message)
    assert await tokens_of(rig.backend, call("c")) == {"c-0": [1, 2, 3, 4, 5]}
    context.destroy(linger=0)


async def test_what_another_gateway_says_comes_beside_the_tokens(rig: Rig) -> None:
    said: asyncio.Queue[PeerMessage] = asyncio.Queue()
    rig.inbox._on_peer_message = said.put_nowait
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    other = context.socket(zmq.PUSH)
    other.connect(rig.inbox.address)
    messages = [Reserved("d", "r", "a", 32, (b"1" * 16,)), Held("d", ("r", "s")), Settled("d", "r")]
    for message in messages:
        other.send(encode_peer_message(message))
    assert await tokens_of(rig.backend, call("c")) == {"c-0": [1, 2, 3, 4, 5]}
    assert [await asyncio.wait_for(said.get(), 5.0) for _ in messages] == messages
    context.destroy(linger=0)


async def test_a_call_leaves_nothing_behind_in_the_routing_however_it_ends(rig: Rig) -> None:
    await tokens_of(rig.backend, call("whole"))
    with pytest.raises(RequestError):
        await tokens_of(rig.backend, call("refused", max_tokens=10_000))
    steps = rig.backend.generate(call("cut off", max_tokens=400))
    await anext(steps)
    await steps.aclose()
    assert rig.routing._open == {}


async def test_a_gateway_that_is_gone_keeps_no_socket() -> None:
    with GatewayChannels(lambda outputs: None) as channels:
        gone = channels.sink("tcp://127.0.0.1:1")
        busy = channels.sink("tcp://127.0.0.1:2")
        busy.open(call("c").requests(0.0))
        channels.sink("tcp://127.0.0.1:3")
        assert gone._socket.closed
        assert not busy._socket.closed
        gone.deliver([RequestOutput(RequestId("c-0"), (1,))])  # an output that was on its way: no error


token_ids = st.integers(0, 2**31 - 1)
numbers = st.floats(allow_nan=False)
outputs = st.builds(
    RequestOutput,
    request_id=st.text(max_size=40),
    token_ids=st.lists(token_ids, max_size=4).map(tuple),
    logprobs=st.lists(
        st.builds(
            TokenLogprobs, numbers, token_ids, st.tuples(token_ids, token_ids), st.tuples(numbers, numbers)
        ),
        max_size=2,
    ).map(tuple),
    finish_reason=st.none() | st.sampled_from(FinishReason),
    num_cached_tokens=st.integers(0, 2**40),
    error=st.none() | st.text(),
    times=st.none()
    | st.builds(
        RequestTimes, numbers, st.none() | numbers, st.none() | numbers, numbers, token_ids, token_ids, token_ids,
        token_ids, st.none() | token_ids,
    ),
    num_drafted=token_ids,
)  # fmt: skip


@given(st.lists(st.text(max_size=40).map(RequestId), max_size=4))
def test_a_keepalive_carries_every_call(ids: list[RequestId]) -> None:
    assert decode_gateway_message(encode_keepalive(ids)) == ids


@given(st.lists(outputs, max_size=4))
def test_a_step_message_carries_every_field(step: list[RequestOutput]) -> None:
    assert decode_gateway_message(encode_step(step)) == step
