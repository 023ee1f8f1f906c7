"""A fake device that checks what a real one could only get wrong silently."""

from __future__ import annotations

import hashlib
import random
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from shoal.engine.config import EngineConfig, EngineOptions, Machine, ModelConfig, resolve
from shoal.engine.core import EngineCore
from shoal.engine.executor import ExecutorInfo, RankInfo
from shoal.engine.plan import ContinuedRequest, StepPlan, StepResult
from shoal.engine.request import MAX_LOGPROBS, Request, RequestId, RequestOutput, SamplingParams, TokenLogprobs
from shoal.engine.scheduling.beam_search import BeamSearch
from shoal.engine.speculation.proposer import Proposer

VOCAB = 997

TINY_MODEL = ModelConfig(
    path="tiny",
    architecture="LlamaForCausalLM",
    num_layers=2,
    hidden_size=8,
    num_heads=4,
    num_kv_heads=2,
    head_dim=2,
    vocab_size=VOCAB,
    max_position=4096,
    layer_windows=(None, None),
    stored_dtype="float32",
    num_parameters=1000,
    eos_token_ids=(0,),
    hf_config={},
)


def fingerprint(token_ids: tuple[int, ...]) -> int:
    """What the KV of the last of these tokens depends on: all of them, in order."""
    return int.from_bytes(hashlib.blake2b(repr(token_ids).encode(), digest_size=8).digest(), "little")


class FakeExecutor:
    """Plays a model whose KV at a position is the fingerprint of all tokens up to it, in simulated block memory.

    Every step it reads each request's KV back through its block table, as attention would, and asserts that each slot
    holds exactly what that request needs: a block shared wrongly, overwritten, freed too early or not copied shows at
    once. The next token is a function of the whole sequence, so equal requests must give equal tokens.
    """

    def __init__(self, num_blocks: int, block_size: int, window: int | None = None) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.window = window
        self.memory: dict[tuple[int, int], int] = {}
        self.tokens: dict[RequestId, list[int]] = {}
        self.tables: dict[RequestId, list[int]] = {}
        self.num_reported: dict[RequestId, int] = {}
        self.plans: list[StepPlan] = []
        self.sampled: dict[RequestId, int] = {}  # what this device sampled last for each request
        self.in_flight: deque[StepPlan] = deque()

    def start(self) -> ExecutorInfo:
        return ExecutorInfo(self.num_blocks, (RankInfo(0, 0, "here", 1, "fake", 0, 2, 0, 0),))

    def close(self) -> None:
        self.memory.clear()

    def check(self) -> None:
        pass

    def submit(self, plan: StepPlan) -> None:
        self.in_flight.append(plan)

    def collect(self) -> StepResult:
        return self.execute(self.in_flight.popleft())

    def execute(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        for request_id in plan.finished:
            del self.tokens[request_id], self.tables[request_id]
        for source, target in plan.copies:
            for offset in range(self.block_size):
                self.memory[target, offset] = self.memory.get((source, offset), -1)
        for new in plan.new:
            assert new.request_id not in self.tokens
            self.tokens[new.request_id] = list(new.token_ids)
            self.tables[new.request_id] = list(new.block_ids)
            self.num_reported[new.request_id] = new.params.num_reported or 0
        for entry in plan.continued:
            self.tokens[entry.request_id].extend(entry.new_token_ids)
            if entry.num_pending:
                self.tokens[entry.request_id].append(self.sampled[entry.request_id])
            self.tables[entry.request_id].extend(entry.new_block_ids)
        entries = (*plan.new, *plan.continued)
        assert len({entry.request_id for entry in entries}) == len(entries)
        assert plan.num_tokens == sum(entry.num_new for entry in entries)
        writes: set[tuple[int, int]] = set()
        result: dict[RequestId, tuple[int, ...]] = {}
        logprobs: dict[RequestId, tuple[TokenLogprobs, ...]] = {}
        for entry in entries:
            draft_ids = entry.draft_ids if isinstance(entry, ContinuedRequest) else ()
            drawn = self._compute(entry.request_id, entry.num_computed, entry.num_new, draft_ids, writes)
            if drawn:
                result[entry.request_id] = drawn
                self.sampled[entry.request_id] = drawn[-1]
                if (count := self.num_reported[entry.request_id]) > 0:
                    logprobs[entry.request_id] = (likely_tokens(tuple(self.tokens[entry.request_id]), count),)
        return StepResult(plan.step, result, logprobs)

    def _compute(
        self, request_id: RequestId, start: int, count: int, draft_ids: tuple[int, ...], writes: set[tuple[int, int]]
    ) -> tuple[int, ...]:
        tokens, table = [*self.tokens[request_id], *draft_ids], self.tables[request_id]
        assert count > len(draft_ids)
        assert start + count <= len(tokens)
        for position in range(start, start + count):
            slot = self._slot(table, position)
            assert slot not in writes, f"two requests write slot {slot}"
            writes.add(slot)
            self.memory[slot] = fingerprint(tuple(tokens[: position + 1]))
        end = start + count
        first_seen = 0 if self.window is None else max(0, start - self.window + 1)
        for position in range(first_seen, end):
            assert self.memory[self._slot(table, position)] == fingerprint(tuple(tokens[: position + 1]))
        if end < len(tokens):
            assert not draft_ids
            return ()
        return self._verify(self.tokens[request_id], draft_ids)

    def _verify(self, known: list[int], draft_ids: tuple[int, ...]) -> tuple[int, ...]:
        """What is said after the known tokens, up to the first that is not as guessed."""
        drawn: list[int] = []
        for guess in (*draft_ids, None):
            drawn.append(1 + fingerprint((*known, *drawn, -1)) % (VOCAB - 1))
            if drawn[-1] != guess:
                break
        return tuple(drawn)

    def _slot(self, table: list[int], position: int) -> tuple[int, int]:
        block = table[position // self.block_size]
        assert 0 < block < self.num_blocks
        return block, position % self.block_size


def likely_tokens(known: tuple[int, ...], count: int) -> TokenLogprobs:
    """What the fake model finds likeliest behind known tokens: some of the first 3 * count, end of text among them."""
    numbers = random.Random(fingerprint((*known, -2)))
    token_ids = tuple(numbers.sample(range(3 * count), count))
    logprobs = tuple(sorted((-8.0 * numbers.random() for _ in range(count)), reverse=True))
    return TokenLogprobs(logprobs[0], 1, token_ids, logprobs)


def expected_beams(prompt_ids: tuple[int, ...], params: SamplingParams, max_tokens: int) -> list[list[int]]:
    """The hypotheses about the fake model's answer."""
    search = BeamSearch(params, frozenset((*params.stop_token_ids, *TINY_MODEL.eos_token_ids)), max_tokens)
    beams = [prompt_ids]
    while not search.is_over:
        parents = search.advance([likely_tokens(beam, MAX_LOGPROBS) for beam in beams])
        beams = [(*beams[parent], way.token_id) for parent, way in zip(parents, search.running, strict=True)]
    return [list(hypothesis.tokens()[0]) for hypothesis in search.finished[: params.n]]


def expected_tokens(prompt_ids: tuple[int, ...], count: int) -> list[int]:
    """What the fake model says after a prompt."""
    tokens = list(prompt_ids)
    for _ in range(count):
        tokens.append(1 + fingerprint((*tokens, -1)) % (VOCAB - 1))
    return tokens[len(prompt_ids) :]


def fake_config(**options: Any) -> EngineConfig:
    window = options.pop("window", None)
    model = replace(TINY_MODEL, layer_windows=(window, window))
    return resolve(EngineOptions(model="tiny", **options), model, Machine("cpu", 2**30, 2))


class Harness:
    """A core over the fake device, and what came out of it."""

    def __init__(
        self,
        num_blocks: int = 64,
        block_size: int = 4,
        *,
        record_kv_events: bool = False,
        proposer: Proposer | None = None,
        **options: Any,
    ) -> None:
        config = fake_config(block_size=block_size, **options)
        self.executor = FakeExecutor(num_blocks, block_size, window=config.model.layer_windows[0])
        self.core = EngineCore(config, self.executor, record_kv_events=record_kv_events, proposer=proposer)
        self.core.start()
        self.outputs: dict[RequestId, list[int]] = {}
        self.finished: dict[RequestId, RequestOutput] = {}
        self._clock = 0.0

    def request(self, name: str, prompt_ids: tuple[int, ...], max_tokens: int = 8, **fields: Any) -> Request:
        self._clock += 1.0
        params = SamplingParams(max_tokens=max_tokens, **fields.pop("params", {}))
        return Request(RequestId(name), prompt_ids, params, seed=0, arrival_s=self._clock, **fields)

    def add(self, name: str, prompt_ids: tuple[int, ...], max_tokens: int = 8, **fields: Any) -> Request:
        request = self.request(name, prompt_ids, max_tokens, **fields)
        self.core.check_request(request)
        self.core.add(request)
        self.outputs |= {request_id: [] for request_id in request.result_ids}
        return request

    def step(self) -> list[RequestOutput]:
        outputs = self.core.step()
        for output in outputs:
            self.outputs[output.request_id].extend(output.token_ids)
            if output.finish_reason is not None:
                self.finished[output.request_id] = output
        self.core.check()
        return outputs

    def drain(self, max_steps: int = 10_000) -> None:
        for _ in range(max_steps):
            if not self.core.has_work:
                self.core.check()
                return
            self.step()
        raise AssertionError("requests are still unfinished")


@pytest.fixture
def make_harness() -> Callable[..., Harness]:
    return Harness


@pytest.fixture
def expected() -> Callable[[tuple[int, ...], int], list[int]]:
    return expected_tokens


@pytest.fixture
def expected_hypotheses() -> Callable[[tuple[int, ...], SamplingParams, int], list[list[int]]]:
    return expected_beams


@pytest.fixture
def make_config() -> Callable[..., EngineConfig]:
    return fake_config
