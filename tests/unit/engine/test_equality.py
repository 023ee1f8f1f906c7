"""What a request gets does not depend on how it was served: company, chunks, preemption, cached prefixes, forks.

A tiny random-weight Llama through the whole engine on the CPU, kernels included; in bf16 too, where only results that
are the same bit for bit can give the same tokens.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from shoal.engine.config import EngineOptions
from shoal.engine.core import EngineCore
from shoal.engine.request import Request, RequestId, SamplingParams
from shoal.engine.worker import LocalExecutor, resolve_options

BLOCK = 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=300,
        max_position_embeddings=512,
        initializer_range=0.2,
        eos_token_id=299,
    )
    path = tmp_path_factory.mktemp("tiny-llama")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def model(request: pytest.FixtureRequest, checkpoint: Path) -> EngineOptions:
    return EngineOptions(
        str(checkpoint), dtype=request.param, num_threads=1, block_size=BLOCK, num_blocks=200, max_running_requests=32
    )


class Engine:
    """An engine core whose requests are driven by the test."""

    def __init__(self, model: EngineOptions, **options: Any) -> None:
        config = resolve_options(replace(model, **options))
        self.core = EngineCore(config, LocalExecutor(config))
        self.core.start()
        self.tokens: dict[str, list[int]] = {}

    def add(self, name: str, prompt: list[int], params: SamplingParams, **fields: Any) -> Request:
        request = Request(
            RequestId(name), tuple(prompt), params, params.seed or 0, arrival_s=len(self.tokens), **fields
        )
        self.core.add(request)
        self.tokens[name] = []
        return request

    def step(self) -> None:
        for output in self.core.step():
            self.tokens[output.request_id] += output.token_ids

    def drain(self) -> dict[str, list[int]]:
        while self.core.has_work:
            self.step()
        self.core.check()
        return self.tokens


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(3, 290) for _ in range(rng.randrange(2, 40))] for _ in range(32)]


def settings_of(index: int) -> SamplingParams:
    """Greedy, plain sampling, and everything at once, in turn."""
    common = {"max_tokens": 20, "ignore_eos": True}
    match index % 3:
        case 0:
            return SamplingParams(temperature=0.0, **common)
        case 1:
            return SamplingParams(temperature=1.0, seed=index, **common)
    return SamplingParams(
        temperature=0.8,
        seed=index,
        top_k=40,
        top_p=0.9,
        min_p=0.01,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        repetition_penalty=1.1,
        logit_bias={5: 2.0},
        **common,
    )


@pytest.fixture(scope="module")
def alone(model: EngineOptions, prompts: list[list[int]]) -> list[list[int]]:
    """Each request by itself, its whole prompt in one step, nothing cached."""
    engine = Engine(model, enable_prefix_caching=False)
    answers = []
    for index, prompt in enumerate(prompts):
        engine.add(f"r{index}", prompt, settings_of(index))
        answers.append(engine.drain()[f"r{index}"])
    return answers


def serve_all(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    for index, prompt in enumerate(prompts):
        engine.add(f"r{index}", prompt, settings_of(index))
    engine.drain()
    return [engine.tokens[f"r{index}"] for index in range(len(prompts))]


def test_greedy_equals_transformers(checkpoint, prompts, model, alone):
    if model.dtype != "float32":
        pytest.skip("other roundings, other tokens: transformers is compared in float32")
    oracle = transformers.LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    for index in range(0, 32, 3):
        ids = torch.tensor([prompts[index] + alone[index]])
        with torch.inference_mode():
            choices = oracle(ids).logits[0].argmax(-1).tolist()
        assert alone[index] == choices[len(prompts[index]) - 1 : -1]


def test_among_31_others(model, prompts, alone):
    engine = Engine(model, max_running_requests=32)
    assert serve_all(engine, prompts) == alone


@pytest.mark.parametrize("chunk", [1, 7, BLOCK, BLOCK + 1, 4096])
def test_any_chunk(model, prompts, alone, chunk):
    engine = Engine(model, max_step_tokens=chunk, max_running_requests=1)
    assert serve_all(engine, prompts[:9]) == alone[:9]


def test_many_at_once_in_small_chunks(model, prompts, alone):
    engine = Engine(model, max_step_tokens=9, max_running_requests=8)
    assert serve_all(engine, prompts) == alone


@pytest.mark.parametrize("caching", [True, False])
def test_under_memory_pressure(model, prompts, alone, caching):
    engine = Engine(model, num_blocks=24, max_running_requests=8, watermark=0.0, enable_prefix_caching=caching)
    assert serve_all(engine, prompts) == alone
    assert engine.core.stats().preemptions_total > 3


@pytest.mark.parametrize("options", [{}, {"max_step_tokens": 9}, {"num_blocks": 24, "watermark": 0.0}])
def test_planned_ahead(model, prompts, alone, options):
    engine = Engine(model, async_scheduling=True, max_running_requests=8, **options)
    assert serve_all(engine, prompts) == alone


def test_preempted_at_every_step(model, prompts, alone):
    engine = Engine(model, max_step_tokens=6, max_running_requests=1, enable_prefix_caching=False)
    for index in (1, 2):  # sampled, and with penalties
        most_steps = -(-len(prompts[index]) // 6) + 20
        for at in range(most_steps):
            request = engine.add(f"r{index}-{at}", prompts[index], settings_of(index))
            for _ in range(at):
                engine.step()
            if not request.is_finished and request.admitted_s is not None:
                engine.core._scheduler._preempt(request)
            engine.drain()
            assert engine.tokens[f"r{index}-{at}"] == alone[index], at


def test_cached_prefix(model, prompts, alone):
    engine = Engine(model)
    for index, prompt in enumerate(prompts):
        for attempt in range(2):
            request = engine.add(f"r{index}-{attempt}", prompt, settings_of(index))
            engine.drain()
            assert engine.tokens[f"r{index}-{attempt}"] == alone[index]
        assert request.num_cached_tokens == (len(prompt) - 1) // BLOCK * BLOCK


def test_forks_equal_requests_of_their_own(model, prompts):
    params = SamplingParams(max_tokens=12, seed=9, temperature=1.2, ignore_eos=True)
    apart = Engine(model, enable_prefix_caching=False)
    together = Engine(model, max_running_requests=4)
    for stream in range(4):
        apart.add(f"s{stream}", prompts[5], params, stream=stream)
        apart.drain()
        together.add(f"s{stream}", prompts[5], params, stream=stream, fork_of=RequestId("s0") if stream else None)
    together.drain()
    assert together.tokens == apart.tokens
    assert len({tuple(tokens) for tokens in apart.tokens.values()}) == 4


def test_logprobs_agree_with_transformers(checkpoint, prompts):
    engine = Engine(EngineOptions(str(checkpoint), dtype="float32", num_threads=1))
    request = engine.add("r", prompts[4], SamplingParams(temperature=0, max_tokens=5, logprobs=3, ignore_eos=True))
    answers = []
    while engine.core.has_work:
        for output in engine.core.step():
            answers += zip(output.token_ids, output.logprobs, strict=True)
    oracle = transformers.LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = oracle(torch.tensor([prompts[4] + request.output_ids])).logits[0]
    for position, (token, answer) in enumerate(answers, start=len(prompts[4]) - 1):
        expected = torch.log_softmax(logits[position], -1)
        assert answer.logprob == pytest.approx(float(expected[token]), abs=1e-4)
        assert list(answer.top_ids) == expected.topk(3).indices.tolist()
        assert list(answer.top_logprobs) == pytest.approx(expected.topk(3).values.tolist(), abs=1e-4)
