"""One token for each row of logits, and its log-probability where asked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shoal.engine.parallel.collectives import Collectives
from shoal.engine.parallel.topology import Topology
from shoal.engine.request import MAX_LOGPROBS, RequestId, SamplingParams, TokenLogprobs
from shoal.engine.sampling.batch import SampleBatch
from shoal.engine.sampling.draw import Draw, WholeVocabularyDraw
from shoal.engine.sampling.logits import LogitsProcessor
from shoal.engine.sampling.logprobs import Logprobs, logprobs_of
from shoal.engine.sampling.split_draw import SplitVocabularyDraw
from shoal.kernels.dispatch import Operations


class Samples:
    """What one step drew. `tokens` are for the next step on the same device, `wait` is for the host."""

    def __init__(self, batch: SampleBatch, tokens: Tensor, logprob_rows: list[int], logprobs: Logprobs | None) -> None:
        """Starts the copy to the host. logprobs has the rows of the batch that `logprob_rows` names."""
        self.tokens = tokens  # [samples] int64, on the device of the logits
        self._batch = batch
        self._host_tokens = tokens.to("cpu", non_blocking=True)
        self._logprob_rows = logprob_rows
        self._host_logprobs = None if logprobs is None else logprobs.to_host()
        self._copied = torch.cuda.current_stream().record_event() if tokens.is_cuda else None

    def wait(self) -> tuple[dict[RequestId, tuple[int, ...]], dict[RequestId, tuple[TokenLogprobs, ...]]]:
        """Tokens, and log-probabilities where asked. Does not wait for steps that were launched later."""
        if self._copied is not None:
            self._copied.synchronize()
        ids, params = self._batch.request_ids, self._batch.params
        tokens: dict[RequestId, tuple[int, ...]] = {
            request_id: (token,) for request_id, token in zip(ids, self._host_tokens.tolist(), strict=True)
        }
        if self._host_logprobs is None:
            return tokens, {}
        logprobs: dict[RequestId, tuple[TokenLogprobs, ...]] = {
            ids[row]: (self._host_logprobs.of_row(i, params[row].logprobs or 0),)
            for i, row in enumerate(self._logprob_rows)
        }
        return tokens, logprobs


class Sampler:
    """Draws tokens. A draw is a function of the logits, the request's settings, its seed and its position only.

    Every tensor rank has a sampler over its own part of the vocabulary; all draw the same tokens.
    """

    def __init__(
        self,
        ops: Operations,
        eos_token_ids: tuple[int, ...],
        vocab_size: int,
        topology: Topology,
        collectives: Collectives,
    ) -> None:
        self._eos_token_ids = eos_token_ids
        self._vocab = topology.vocab_shard(vocab_size)
        self._num_top = min(MAX_LOGPROBS, vocab_size)  # for all, so that ties are not broken by what neighbours ask
        self._collectives = collectives
        self._draw: Draw = (
            WholeVocabularyDraw(ops)
            if topology.tensor_size == 1
            else SplitVocabularyDraw(vocab_size, topology, collectives)
        )
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
            self._processors[request_id] = LogitsProcessor(
                params, self._eos_token_ids, token_ids, num_prompt_tokens, self._vocab, device
            )

    def forget(self, request_id: RequestId) -> None:
        self._processors.pop(request_id, None)

    def sample(self, logits: Tensor, batch: SampleBatch) -> Samples:
        """Draw one token per row of `logits` [samples, columns of this rank] float32, which are written over.

        Returns without waiting for the device.
        """
        processors = [self._processors.get(request_id) for request_id in batch.request_ids]
        logprob_rows = [i for i, params in enumerate(batch.params) if params.logprobs is not None]
        original = logits.clone() if logprob_rows and any(processors) else logits  # [samples, columns]
        for i, processor in enumerate(processors):
            if processor is not None:
                processor.apply(logits[i], batch.num_outputs[i])
        tokens = self._draw(logits, batch)  # [samples]
        for i, processor in enumerate(processors):
            if processor is not None:
                processor.count(tokens[i : i + 1])
        if not logprob_rows:
            return Samples(batch, tokens, [], None)
        logprobs = logprobs_of(
            _take(original, logprob_rows), _take(tokens, logprob_rows), self._num_top, self._vocab.start,
            self._collectives,
        )  # fmt: skip
        return Samples(batch, tokens, logprob_rows, logprobs)


def _take(x: Tensor, rows: list[int]) -> Tensor:
    """Some rows of x [rows, ...], without a copy if they are all."""
    return x if len(rows) == len(x) else x[torch.tensor(rows).to(x.device, non_blocking=True)]
