"""One token for each row of logits, and its log-probability where asked."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from shoal.engine.parallel.collectives import Collectives
from shoal.engine.parallel.topology import Topology
from shoal.engine.request import MAX_LOGPROBS, RequestId, SamplingParams, TokenLogprobs
from shoal.engine.sampling.batch import SampleBatch
from shoal.engine.sampling.draw import make_draw
from shoal.engine.sampling.logits import LogitsProcessor
from shoal.engine.sampling.logprobs import Logprobs, logprobs_of
from shoal.engine.sampling.transfer import to_device
from shoal.kernels.dispatch import Operations


class Samples:
    """What one step drew. `tokens` are for the next step on the same device, `wait` is for the host."""

    def __init__(self, batch: SampleBatch, tokens: Tensor, logprob_rows: list[int], logprobs: Logprobs | None) -> None:
        """Starts the copy to the host. logprobs has the rows of the batch that `logprob_rows` names."""
        self.tokens = tokens  # [samples] int64, on the device of the logits
        self._batch = batch
        self._has_guesses = bool((batch.guesses >= 0).any())
        self._host_tokens = tokens.to("cpu", non_blocking=True)
        self._logprob_rows = logprob_rows
        self._host_logprobs = None if logprobs is None else logprobs.to_host()
        self._copied = torch.cuda.current_stream().record_event() if tokens.is_cuda else None

    def wait(self) -> tuple[dict[RequestId, tuple[int, ...]], dict[RequestId, tuple[TokenLogprobs, ...]]]:
        """Tokens, and log-probabilities where asked. Does not wait for steps that were launched later.

        Of a request with drafts those up to and including the first token that is not what was guessed. Each was drawn
        as plain decoding draws it, so a guess x is accepted with its probability p(x), and what replaces a rejected one
        follows p without x: rejection sampling (Leviathan et al. 2023, arXiv:2211.17192) of a proposal that is certain
        of its guess. As the number that decides is that of plain decoding too, the tokens are the same whatever was
        guessed (Daliri et al. 2024, arXiv:2408.07978, "drafter-invariant").
        """
        if self._copied is not None:
            self._copied.synchronize()
        ids, params = self._batch.request_ids, self._batch.params
        drawn = self._host_tokens.tolist()
        if not self._has_guesses:
            tokens: dict[RequestId, tuple[int, ...]] = {
                request_id: (token,) for request_id, token in zip(ids, drawn, strict=True)
            }
            rows: Collection[int] = range(len(drawn))
        else:
            rows = _valid_rows(drawn, self._batch.guesses.tolist())
            tokens = {}
            for row in rows:
                tokens[ids[row]] = (*tokens.get(ids[row], ()), drawn[row])
        logprobs: dict[RequestId, tuple[TokenLogprobs, ...]] = {}
        if self._host_logprobs is not None:
            for i, row in enumerate(self._logprob_rows):
                if row in rows:
                    reported = self._host_logprobs.of_row(i, params[row].num_reported or 0)
                    logprobs[ids[row]] = (*logprobs.get(ids[row], ()), reported)
        return tokens, logprobs


def _valid_rows(drawn: list[int], guesses: list[int]) -> dict[int, None]:
    """The rows drawn after right guesses only, in order. Where guesses[i] < 0 the next row is another request's."""
    rows: dict[int, None] = {}
    is_valid = True
    for row, (token, guess) in enumerate(zip(drawn, guesses, strict=True)):
        if is_valid:
            rows[row] = None
        is_valid = guess < 0 or (is_valid and guess == token)
    return rows


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
        self._draw = make_draw(ops, vocab_size, topology, collectives)
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

    @property
    def has_processors(self) -> bool:
        return bool(self._processors)

    def is_plain(self, batch: SampleBatch) -> bool:
        """Whether the rows are drawn from logits as they are, and nothing but tokens is wanted of them."""
        has_processors = bool(self._processors) and not self._processors.keys().isdisjoint(batch.request_ids)
        return not has_processors and all(params.num_reported is None for params in batch.params)

    def learn(self, request_id: RequestId, start: int, token_ids: Sequence[int]) -> None:
        """Known tokens of a request from position `start` on: those that were accepted of what it drew with drafts."""
        if (processor := self._processors.get(request_id)) is not None:
            processor.learn(start, token_ids)

    def forget(self, request_id: RequestId) -> None:
        self._processors.pop(request_id, None)

    def sample(self, logits: Tensor, batch: SampleBatch) -> Samples:
        """Draw one token per row of `logits` [samples, columns of this rank] float32, which are written over.

        Returns without waiting for the device.
        """
        processors = [self._processors.get(i) for i in batch.request_ids] if self._processors else []
        logprob_rows = [i for i, params in enumerate(batch.params) if params.num_reported is not None]
        original = logits.clone() if logprob_rows and any(processors) else logits  # [samples, columns]
        for i, processor in enumerate(processors):
            if processor is not None:
                processor.apply(logits[i], batch.num_outputs[i])
                if batch.guesses[i] >= 0:
                    processor.suppose(int(batch.guesses[i]))
        tokens = self._draw(logits, batch)  # [samples]
        for i, processor in enumerate(processors):
            if processor is None:
                continue
            if batch.guesses[i] >= 0 or batch.num_guessed[i]:
                processor.drop_guesses()  # the known tokens come with a later plan, see `learn`
            else:
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
    return x if len(rows) == len(x) else x[to_device(np.array(rows), x.device)]
