"""The KV manager against a model that knows who owns what, over long random histories."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from shoal.engine.memory.kv_manager import KVManager
from shoal.engine.request import Request, RequestId, SamplingParams

BLOCK = 4
PARAMS = SamplingParams(max_tokens=100)


class Model:
    """Requests and in-flight steps around one KVManager, with its own account of every block's contents."""

    def __init__(self, num_blocks: int, *, window: int | None = None, caching: bool = True) -> None:
        self.kv = KVManager(num_blocks, BLOCK, enable_prefix_caching=caching, watermark=0.05, window=window)
        self.window = window
        self.live: dict[RequestId, Request] = {}
        self.contents: dict[int, tuple[int, ...]] = {}  # block -> tokens from the start that its KV stands for
        self.step = 0
        self.count = 0

    def make(self, prompt_ids: tuple[int, ...], salt: str = "") -> Request:
        self.count += 1
        return Request(RequestId(f"r{self.count}"), prompt_ids, PARAMS, 0, float(self.count), cache_salt=salt)

    def admit(self, prompt_ids: tuple[int, ...], salt: str) -> None:
        request = self.make(prompt_ids, salt)
        free = self.kv.num_free_blocks
        if not self.kv.admit(request, is_alone=not self.live):
            assert self.kv.num_free_blocks == free
            return
        self.live[request.request_id] = request
        assert request.num_computed < request.num_known
        for index, block in enumerate(self.kv.table(request.request_id)[: request.num_computed // BLOCK]):
            expected = (hash(salt), *request.known_ids(0, (index + 1) * BLOCK))
            assert self.contents[block] == expected, "a cached block holds other tokens"

    def fork(self, source: Request) -> None:
        request = self.make(source.prompt_ids, source.cache_salt)
        if not self.kv.can_fork(request, source):
            return
        copies = self.kv.fork(request, source.request_id)
        if copies is None:
            return
        for origin, target in copies:
            self.contents[target] = self.contents[origin]
        self.live[request.request_id] = request
        assert request.num_computed == len(request.prompt_ids) - 1

    def compute(self, request: Request, count: int) -> None:
        """Compute up to `count` known tokens; at the end of them, one more becomes known."""
        end = min(request.num_known, request.num_computed + count)
        if not self.kv.grow(request, end):
            return
        table = self.kv.table(request.request_id)
        for position in range(request.num_computed, end):
            block = table[position // BLOCK]
            owners = sum(block in self.kv.table(other) for other in self.live)
            assert owners == 1, "a shared block is written"
            self.contents[block] = (hash(request.cache_salt), *request.known_ids(0, position + 1))
        request.num_computed = end
        self.kv.commit(request)
        if end == request.num_known:
            request.output_ids.append(end % 3)
            request.num_known += 1

    def release(self, request: Request, in_flight: bool) -> None:
        del self.live[request.request_id]
        self.step += 1
        self.kv.release(request.request_id, after_step=self.step if in_flight else None)

    def rewind(self, request: Request) -> None:
        """Preemption: blocks gone, tokens kept; then try to come back."""
        self.kv.release(request.request_id)
        request.num_computed = 0
        if not self.kv.admit(request, is_alone=len(self.live) == 1):
            del self.live[request.request_id]

    def check(self) -> None:
        self.kv.check()
        for request in self.live.values():
            table = self.kv.table(request.request_id)
            assert request.num_computed <= request.num_slots == len(table) * BLOCK
            first = 0 if self.window is None else max(0, request.num_computed - self.window + 1)
            for position in range(first, request.num_computed):
                expected = (hash(request.cache_salt), *request.known_ids(0, position + 1))
                assert self.contents[table[position // BLOCK]][: len(expected)] == expected


def drain(model: Model) -> None:
    for request in list(model.live.values()):
        model.release(request, in_flight=False)
    model.kv.retire(model.step)
    model.check()
    assert model.kv.num_free_blocks == model.kv.num_usable_blocks
    model.kv.reset_cache()
    assert model.kv.num_cached_blocks == 0


class KVMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.model = Model(24)

    def pick(self, data: st.DataObject) -> Request | None:
        live = sorted(self.model.live)
        return self.model.live[data.draw(st.sampled_from(live))] if live else None

    @rule(ids=st.lists(st.integers(0, 1), min_size=1, max_size=24), salt=st.sampled_from(["", "tenant"]))
    def admit(self, ids: list[int], salt: str) -> None:
        self.model.admit(tuple(ids), salt)

    @rule(data=st.data(), count=st.integers(1, 12))
    def compute(self, data: st.DataObject, count: int) -> None:
        if (request := self.pick(data)) is not None:
            self.model.compute(request, count)

    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        if (request := self.pick(data)) is not None:
            self.model.fork(request)

    @rule(data=st.data(), in_flight=st.booleans())
    def release(self, data: st.DataObject, in_flight: bool) -> None:
        if (request := self.pick(data)) is not None:
            self.model.release(request, in_flight)

    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        if (request := self.pick(data)) is not None:
            self.model.rewind(request)

    @rule()
    def retire(self) -> None:
        self.model.kv.retire(self.model.step)

    @rule()
    def reset(self) -> None:
        self.model.kv.reset_cache()

    @invariant()
    def holds(self) -> None:
        self.model.check()

    def teardown(self) -> None:
        drain(self.model)


def test_stateful() -> None:
    run_state_machine_as_test(KVMachine, settings=settings(max_examples=60, stateful_step_count=60, deadline=None))


def random_history(seed: int, steps: int) -> None:
    rng = random.Random(seed)
    model = Model(rng.choice([6, 24, 60]), window=rng.choice([None, None, 6]), caching=rng.random() < 0.8)
    for _ in range(steps):
        live = list(model.live.values())
        request = rng.choice(live) if live else None
        action = rng.random()
        if request is None or action < 0.15:
            ids = tuple(rng.randrange(2) for _ in range(rng.randrange(1, 24)))
            model.admit(ids, rng.choice(["", "tenant"]))
        elif action < 0.65:
            model.compute(request, rng.randrange(1, 12))
        elif action < 0.75:
            model.fork(request)
        elif action < 0.85:
            model.release(request, in_flight=rng.random() < 0.5)
        elif action < 0.92:
            model.rewind(request)
        elif action < 0.99:
            model.kv.retire(model.step)
        else:
            model.kv.reset_cache()
        model.check()
    drain(model)


@pytest.mark.parametrize("seed", range(6))
def test_ten_thousand_random_steps(seed: int) -> None:
    random_history(seed, 10_000)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(100, 300))
def test_ten_thousand_random_steps_soak(seed: int) -> None:
    random_history(seed, 10_000)
