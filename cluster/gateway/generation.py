"""From a call to text: outputs of a backend, step by step, as deltas of the choices that a client sees."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TypeVar

from shoal.cluster.gateway.backend import GenerateCall, ReplicaFailedError, ServedModel
from shoal.cluster.gateway.responses import CompletionTokensDetails, FinishReasonName, PromptTokensDetails, Usage
from shoal.engine.request import (
    NO_DRAFTS,
    DraftCounts,
    FinishReason,
    RequestId,
    RequestOutput,
    TokenLogprobs,
    best_samples,
)
from shoal.engine.tokenizer import IncrementalDetokenizer

_T = TypeVar("_T")

_FINISH_NAMES: Mapping[FinishReason, FinishReasonName] = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.ABORT: "abort",
}


@dataclass(frozen=True, slots=True)
class TokenReport:
    """A generated token with its log-probabilities and where in the choice's text it begins (characters)."""

    token_id: int
    logprobs: TokenLogprobs
    text_offset: int


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """What one engine step gave one choice."""

    index: int
    text: str
    tokens: tuple[TokenReport, ...]  # empty without logprobs
    finish_reason: FinishReasonName | None
    is_first: bool


class _Choice:
    """One sample of one prompt on its way to text."""

    def __init__(self, index: int, model: ServedModel, call: GenerateCall) -> None:
        self.index = index
        self.num_cached_tokens = 0
        self.logprobs: list[float] = []  # of the tokens that count, where they are known
        self.drafts = NO_DRAFTS
        self.is_finished = False
        self._is_first = True
        self._detokenizer = IncrementalDetokenizer(model.tokenizer, call.prompt_ids, call.params)

    @property
    def num_tokens(self) -> int:
        return self._detokenizer.num_tokens_used

    def take(self, output: RequestOutput) -> ChoiceDelta | None:
        """The delta to show for one output, None if there is nothing to show yet."""
        if self.is_finished:  # a stop string ended it; the engine does not know
            return None
        self.drafts = self.drafts.plus(output)
        reason = output.finish_reason
        detokenizer = self._detokenizer
        text = detokenizer.push(output.token_ids, ends_with_stop_token=reason is FinishReason.STOP)
        self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        tokens: tuple[TokenReport, ...] = ()
        if output.logprobs:
            # Offsets end where a stop string did, and with them what is reported.
            tokens = tuple(map(TokenReport, output.token_ids, output.logprobs, detokenizer.token_offsets))
            self.logprobs += [token.logprobs.logprob for token in tokens]
        if reason is not None:
            text += detokenizer.finish()
        if detokenizer.is_stopped:
            reason = FinishReason.STOP
        self.is_finished = reason is not None
        if not (text or tokens or reason):
            return None
        is_first, self._is_first = self._is_first, False
        return ChoiceDelta(self.index, text, tokens, _FINISH_NAMES[reason] if reason else None, is_first)


class Generation:
    """All choices of one HTTP request: `params.num_samples` of each prompt, one prompt's after the other's.

    `steps` holds each call's outputs, as Backend.generate gives them.
    """

    def __init__(
        self,
        model: ServedModel,
        calls: Sequence[GenerateCall],
        steps: Sequence[AsyncGenerator[list[RequestOutput], None]],
    ) -> None:
        self._is_speculative = model.is_speculative
        self._calls = tuple(calls)
        self._steps = tuple(steps)
        self._choices: dict[RequestId, _Choice] = {}
        self._groups = [self._open(model, call) for call in self._calls]

    def usage(self) -> Usage:
        """Tokens so far. A prompt counts once, however many samples it has."""
        num_prompt = sum(len(call.prompt_ids) for call in self._calls)
        num_generated = sum(choice.num_tokens for choice in self._choices.values())
        # Later samples share the first one's blocks; that is no hit of the prefix cache.
        num_cached = sum(group[0].num_cached_tokens for group in self._groups)
        drafts = sum([choice.drafts for choice in self._choices.values()], NO_DRAFTS)
        return Usage(
            num_prompt,
            num_generated,
            num_prompt + num_generated,
            PromptTokensDetails(num_cached),
            _drafts_details(drafts) if self._is_speculative else None,
        )

    def answered(self) -> list[int]:
        """Indices of the choices to be answered, once all have ended: the best ones where more were generated."""
        chosen: list[int] = []
        for call, group in zip(self._calls, self._groups, strict=True):
            if call.params.chooses_samples:
                best = best_samples([choice.logprobs for choice in group], call.params.n)
                chosen += [group[sample].index for sample in best]
            else:
                chosen += [choice.index for choice in group]
        return chosen

    def deltas(self) -> AsyncGenerator[list[ChoiceDelta], None]:
        """What engine steps gave, until every choice has finished. Closing this aborts what still runs."""
        streams = [self._call_deltas(steps, group) for steps, group in zip(self._steps, self._groups, strict=True)]
        return streams[0] if len(streams) == 1 else _merge(streams)

    def _open(self, model: ServedModel, call: GenerateCall) -> list[_Choice]:
        first = len(self._choices)
        group = [_Choice(first + sample, model, call) for sample in range(call.params.num_samples)]
        self._choices |= zip(call.sample_ids, group, strict=True)
        return group

    async def _call_deltas(
        self, steps: AsyncGenerator[list[RequestOutput], None], group: Sequence[_Choice]
    ) -> AsyncGenerator[list[ChoiceDelta], None]:
        async with aclosing(steps):
            async for outputs in steps:
                deltas = [self._choices[output.request_id].take(output) for output in outputs]
                if shown := [delta for delta in deltas if delta is not None]:
                    yield shown
                if all(choice.is_finished for choice in group):
                    return  # closing the steps aborts samples that the engine would carry past a stop string
        raise ReplicaFailedError("the replica stopped answering before every sample was finished")


def _drafts_details(drafts: DraftCounts) -> CompletionTokensDetails:
    return CompletionTokensDetails(
        drafts.num_accepted, drafts.num_drafted - drafts.num_accepted, list(drafts.accepted_at)
    )


async def collect(generation: Generation) -> list[ChoiceDelta]:
    """Every choice that is answered as one delta: `n` of each prompt, index = prompt index * n + place."""
    parts: dict[int, list[ChoiceDelta]] = {}
    async with aclosing(generation.deltas()) as steps:
        async for deltas in steps:
            for delta in deltas:
                parts.setdefault(delta.index, []).append(delta)
    return [
        replace(
            parts[index][0],
            index=place,
            text="".join(delta.text for delta in parts[index]),
            tokens=tuple(token for delta in parts[index] for token in delta.tokens),
            finish_reason=parts[index][-1].finish_reason,
        )
        for place, index in enumerate(generation.answered())
    ]


async def _merge(streams: Sequence[AsyncGenerator[_T, None]]) -> AsyncGenerator[_T, None]:
    """Items of all streams as they come. The first exception ends it; however it ends, every stream is closed."""
    queue: asyncio.Queue[_T | Exception | None] = asyncio.Queue(maxsize=len(streams))

    async def pump(stream: AsyncGenerator[_T, None]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    await queue.put(item)
        except Exception as error:
            await queue.put(error)
        else:
            await queue.put(None)

    pumps = [asyncio.create_task(pump(stream)) for stream in streams]
    num_open = len(pumps)
    try:
        while num_open:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
