"""One token for each row of logits, and its log-probability where asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shoal.engine.request import RequestId, SamplingParams, TokenLogprobs
from shoal.engine.sampling.logits import LogitsProcessor
from shoal.engine.sampling.random_numbers import uniforms
from shoal.kernels.dispatch import Operations


@dataclass(frozen=True, slots=True)
class SampleBatch:
    """The settings of the rows that draw in one step. Arrays are [samples]."""

    request_ids: list[RequestId]
    params: list[SamplingParams]
    num_outputs: list[int]  # tokens generated before this one
    seeds: npt.NDArray[np.uint64]
    streams: npt.NDArray[np.uint32]
    positions: npt.NDArray[np.int64]  # of the token to be drawn
    temperature: npt.NDArray[np.float32]  # 0: greedy
    top_k: npt.NDArray[np.int32]  # 0: off
    top_p: npt.NDArray[np.float32]
    min_p: npt.NDArray[np.float32]


class Sampler:
    """Draws tokens. A draw is a function of the logits, the request's settings, its seed and its position only."""

    def __init__(self, ops: Operations, eos_token_ids: tuple[int, ...], vocab_size: int) -> None:
        self._ops = ops
        self._eos_token_ids = eos_token_ids
        self._vocab_size = vocab_size
        self._processors: dict[RequestId, LogitsProcessor] = {}

    def add(
        self,
        request_id: RequestId,
        params: SamplingParams,
        token_ids: Sequence[int],
        num_prompt_tokens: int,
        device: torch.device,
    ) -> None:
        """Get ready for a request with these known tokens, whose logits will be on `device`."""
        if LogitsProcessor.is_needed(params):
            known = torch.tensor(token_ids, dtype=torch.int64, device=device)  # [known tokens]
            self._processors[request_id] = LogitsProcessor(
                params, self._eos_token_ids, known, num_prompt_tokens, self._vocab_size
            )

    def forget(self, request_id: RequestId) -> None:
        self._processors.pop(request_id, None)

    def sample(self, logits: Tensor, batch: SampleBatch) -> tuple[list[int], dict[RequestId, TokenLogprobs]]:
        """One token per row of `logits` [samples, vocab] (any float dtype), and log-probabilities where asked."""
        processors = [self._processors.get(request_id) for request_id in batch.request_ids]
        is_processed = any(processors)
        wants_logprobs = [i for i, params in enumerate(batch.params) if params.logprobs is not None]
        original = logits.float()  # [samples, vocab]; the same tensor if it was float32
        logits = original.clone() if is_processed and wants_logprobs else original
        for i, processor in enumerate(processors):
            if processor is not None:
                processor.apply(logits[i], batch.num_outputs[i])
        tokens = self._draw(logits, batch)
        for processor, token in zip(processors, tokens, strict=True):
            if processor is not None and processor.counts is not None:
                processor.counts.add(token)
        logprobs = {
            batch.request_ids[i]: token_logprobs(original[i], tokens[i], batch.params[i].logprobs or 0)
            for i in wants_logprobs
        }
        return tokens, logprobs

    def _draw(self, logits: Tensor, batch: SampleBatch) -> list[int]:
        is_greedy = not batch.temperature.any()
        # [samples] float32; greedy rows do not look at it
        draws = batch.temperature if is_greedy else uniforms(batch.seeds, batch.streams, batch.positions)
        settings = (batch.temperature, batch.top_k, batch.top_p, batch.min_p, draws)
        tensors = [torch.from_numpy(values).to(logits.device) for values in settings]  # [samples] each
        tokens: list[int] = self._ops.sample(logits, *tensors).tolist()
        return tokens


def token_logprobs(logits: Tensor, token: int, num_top: int) -> TokenLogprobs:
    """logits: [vocab] float32, as the model gave them."""
    logprobs = torch.log_softmax(logits, dim=-1)  # [vocab]
    own = logprobs[token]
    top = torch.topk(logprobs, num_top) if num_top else None
    return TokenLogprobs(
        logprob=float(own),
        rank=int((logprobs > own).sum()) + 1,
        top_ids=tuple(top.indices.tolist()) if top else (),
        top_logprobs=tuple(top.values.tolist()) if top else (),
    )
