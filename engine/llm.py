"""Offline use: prompts in, completions out, in this process and without Ray.

from shoal.engine import LLM, SamplingParams

llm = LLM("model.gguf")
for result in llm.generate(["The sky is"], SamplingParams(temperature=0, max_tokens=20)):
    print(result.outputs[0].text)
"""

from __future__ import annotations

import dataclasses
import itertools
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from tqdm import tqdm

from shoal.engine.config import ConfigError, EngineConfig, EngineOptions, SpeculativeOptions
from shoal.engine.core import EngineCore
from shoal.engine.executor import EngineFactory, RankInfo
from shoal.engine.request import (
    NO_DRAFTS,
    DraftCounts,
    EngineStats,
    FinishReason,
    Request,
    RequestError,
    RequestId,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
    best_samples,
    requests_of,
)
from shoal.engine.tokenizer import IncrementalDetokenizer, Tokenizer, with_bad_words
from shoal.engine.worker import check_options, local_engine

Prompt = str | Sequence[int]
Message = Mapping[str, Any]


@dataclass(slots=True)
class Completion:
    """One sample of one prompt."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None  # one per token, if SamplingParams.logprobs was set
    finish_reason: str | None = None  # "stop" or "length"
    stop_string: str | None = None  # the stop string that ended it, if one did
    drafts: DraftCounts = NO_DRAFTS  # what became of speculative drafts


@dataclass(slots=True)
class GenerationResult:
    """All samples of one prompt."""

    prompt: str | None  # None if the prompt was given as token ids
    prompt_token_ids: list[int]
    outputs: list[Completion]
    num_cached_tokens: int = 0  # prompt tokens whose KV was in the prefix cache already


class LLM:
    """A model, loaded. Use it as a context manager, or call close(), to free its memory early.

    model: a directory with config.json and safetensors, or a .gguf file. Other arguments: see EngineOptions.
    speculative may be a method's name ("suffix"), or a mapping of SpeculativeOptions' fields. With tensor_parallel or
    pipeline_parallel above 1 the ranks are processes of this host.
    Raises ConfigError, telling what to change, for a model or settings that cannot work, and ExecutorError if a rank
    dies.
    """

    def __init__(self, model: str, *, dtype: str = "auto", **options: Any) -> None:
        known = [f.name for f in dataclasses.fields(EngineOptions)]
        for name in options:
            if name not in known:
                raise ConfigError(f"LLM() has no option {name!r}; it takes {', '.join(known)}", field=name)
        speculative = SpeculativeOptions.of(options.pop("speculative", None))
        engine_options = EngineOptions(model=str(model), dtype=dtype, speculative=speculative, **options)
        self._tokenizer = Tokenizer.load(str(model))
        with tqdm(desc="loading weights", unit="B", unit_scale=True, leave=False, disable=None) as bar:

            def report(what: str, done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            self._config, executor = _engine_factory(engine_options)(report)
            self._core = EngineCore(self._config, executor)
            try:
                self._core.start()
            except BaseException:
                self._core.close()
                raise
        self._ids = itertools.count()

    @property
    def config(self) -> EngineConfig:
        return self._config

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @property
    def max_model_len(self) -> int:
        return self._core.max_model_len

    @property
    def ranks(self) -> tuple[RankInfo, ...]:
        """Where the model is: one rank in this process, or several in processes of their own."""
        return self._core.info.ranks

    def stats(self) -> EngineStats:
        return self._core.stats()

    def close(self) -> None:
        self._core.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[GenerationResult]:
        """Complete each prompt, a string as it stands or a list of token ids. One result per prompt, in order.

        `params`: one for all prompts, or one each. Raises RequestError for a prompt that cannot be served, before
        anything is computed.
        """
        listed = _as_prompts(prompts)
        ids = [self._tokenizer.encode(p) if isinstance(p, str) else list(p) for p in listed]
        results = [
            GenerationResult(prompt if isinstance(prompt, str) else None, token_ids, [])
            for prompt, token_ids in zip(listed, ids, strict=True)
        ]
        each = [with_bad_words(given, self._tokenizer) for given in _as_params(params, len(listed))]
        self._run(results, each, use_tqdm)
        return results

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[GenerationResult]:
        """Answer one conversation, or each of several, through the model's chat template."""
        conversations: Sequence[Any] = [messages] if messages and isinstance(messages[0], Mapping) else messages
        ids = [self._tokenizer.encode_chat(list(conversation)) for conversation in conversations]
        return self.generate(ids, params, use_tqdm=use_tqdm)

    def _run(self, results: list[GenerationResult], params: list[SamplingParams], use_tqdm: bool) -> None:
        open_samples: dict[RequestId, _Sample] = {}
        try:
            for result, param in zip(results, params, strict=True):
                for sample_id, sample in self._samples(result, param).items():
                    if sample_id == sample.request.request_id:
                        self._core.check_request(sample.request)
                        self._core.add(sample.request)
                    open_samples[sample_id] = sample
            total = len(open_samples)
            with tqdm(total=total, desc="generating", unit="sample", disable=not use_tqdm or total < 2) as bar:
                start, num_tokens = time.perf_counter(), 0
                while open_samples:
                    for output in self._core.step():
                        num_tokens += len(output.token_ids)
                        if open_samples[output.request_id].take(output):
                            del open_samples[output.request_id]
                            self._core.abort(output.request_id)  # a stop string ends what the engine would go on with
                            bar.set_postfix_str(f"{num_tokens / (time.perf_counter() - start):.0f} tokens/s")
                            bar.update()
                while self._core.has_work:  # steps planned ahead for a request that has stopped
                    self._core.step()
            for result, param in zip(results, params, strict=True):
                if param.chooses_samples:
                    _keep_best(result, param)
        finally:
            for request_id in open_samples:  # interrupted, or refused halfway: leave nothing behind
                self._core.abort(request_id)

    def _samples(self, result: GenerationResult, params: SamplingParams) -> dict[RequestId, _Sample]:
        name = f"llm-{next(self._ids)}"
        ids = tuple(RequestId(f"{name}-{index}") for index in range(params.num_samples))
        requests = requests_of(
            ids,
            tuple(result.prompt_token_ids),
            params,
            seed=params.seed if params.seed is not None else secrets.randbits(63),
            arrival_s=time.monotonic(),
        )
        has_logprobs = params.logprobs is not None or params.chooses_samples
        result.outputs = [Completion(index, logprobs=[] if has_logprobs else None) for index in range(len(ids))]
        return {
            sample_id: _Sample(
                request, result, completion, IncrementalDetokenizer(self._tokenizer, result.prompt_token_ids, params)
            )
            for sample_id, request, completion in zip(ids, itertools.cycle(requests), result.outputs, strict=False)
        }


def _engine_factory(options: EngineOptions) -> EngineFactory:
    if options.num_ranks == 1:
        return local_engine(options)
    check_options(options)
    from shoal.engine.group.coordinator import group_engine
    from shoal.engine.group.processes import ProcessLauncher

    return group_engine(options, ProcessLauncher())


@dataclass(slots=True)
class _Sample:
    """One generation under way."""

    request: Request
    result: GenerationResult
    completion: Completion
    detokenizer: IncrementalDetokenizer

    def take(self, output: RequestOutput) -> bool:
        """Add what a step gave. True when the sample is complete."""
        completion = self.completion
        if not completion.token_ids and completion.index == 0:
            self.result.num_cached_tokens = output.num_cached_tokens
        completion.token_ids.extend(output.token_ids)
        completion.drafts = completion.drafts.plus(output)
        if completion.logprobs is not None:
            completion.logprobs.extend(output.logprobs)
        ends = output.finish_reason is FinishReason.STOP
        completion.text += self.detokenizer.push(output.token_ids, ends_with_stop_token=ends)
        if not self.detokenizer.is_stopped and output.finish_reason is None:
            return False
        completion.text += self.detokenizer.finish()
        if self.detokenizer.is_stopped:
            used = self.detokenizer.num_tokens_used
            del completion.token_ids[used:]
            if completion.logprobs is not None:
                del completion.logprobs[used:]
            completion.finish_reason = FinishReason.STOP.value
            completion.stop_string = self.detokenizer.stop_string
        else:
            assert output.finish_reason is not None
            completion.finish_reason = output.finish_reason.value
        return True


def _keep_best(result: GenerationResult, params: SamplingParams) -> None:
    """Of more samples than are answered the best ones, which had to report their log-probabilities for that."""
    logprobs = [[token.logprob for token in completion.logprobs or ()] for completion in result.outputs]
    result.outputs = [result.outputs[index] for index in best_samples(logprobs, params.n)]
    for index, completion in enumerate(result.outputs):
        completion.index = index
        if params.logprobs is None:
            completion.logprobs = None


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    listed = list(prompts)
    if listed and all(isinstance(item, int) for item in listed):
        return [listed]  # type: ignore[list-item]
    for index, item in enumerate(listed):
        if not isinstance(item, str) and not all(isinstance(token, int) for token in item):  # type: ignore[union-attr]
            raise RequestError(f"prompt {index} must be a string or a list of token ids", param="prompt")
    return listed  # type: ignore[return-value]


def _as_params(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise RequestError(f"{len(params)} SamplingParams for {count} prompts: give one, or one each", param="params")
    return list(params)
