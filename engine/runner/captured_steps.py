"""Small steps whose operations are launched all at once, as captured in an earlier step of the same shape."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from shoal.engine.layers.attention import AttentionBatch, LastTokens
from shoal.engine.models.model import Model
from shoal.engine.runner.batch import StepBatch
from shoal.kernels.dispatch import Capture, NotCapturableError

log = logging.getLogger(__name__)

# Larger steps take so long that launching operations one by one costs nothing.
MAX_TOKENS = 1024
MAX_HIDDEN_ELEMENTS = 2**20
MAX_LOGITS = 2**24  # of a step: 64 MiB, which stay taken
MAX_CAPTURES = 256  # some tens of KiB each
MAX_SEEN = 4096


class StepShape(NamedTuple):
    """What a capture is good for: any step of as many tokens, requests and samples."""

    tokens: int
    requests: int
    samples: int


class CapturedSteps:
    """Runs steps whose inputs are written to the same places every time.

    The logits of a step are good until the next one.
    """

    def __init__(
        self, model: Model, kv: Sequence[Tensor], capture: Capture, *, hidden_size: int, vocab_size: int,
        max_requests: int, max_blocks: int,
    ) -> None:  # fmt: skip
        """`max_blocks`: of one request."""
        self._model = model
        self._kv = kv
        self._capture = capture
        self._is_possible = True
        self._seen: set[StepShape] = set()
        self._captured: dict[StepShape, tuple[Tensor, Callable[[], None]]] = {}  # the one used last at the end
        self._max_tokens = min(MAX_TOKENS, MAX_HIDDEN_ELEMENTS // hidden_size)
        self._max_samples = MAX_LOGITS // vocab_size
        self._input_ids, self._positions, self._slots, self._sampled_tokens = np.zeros((4, self._max_tokens), np.int64)
        self._block_tables = np.zeros((max_requests, max_blocks), np.int32)
        self._query_starts, self._sample_starts = np.zeros((2, max_requests + 1), np.int32)
        self._context_lens = np.zeros(max_requests, np.int32)

    def logits(self, batch: StepBatch) -> Tensor | None:
        """[samples, vocabulary] as Model.logits. None for a step that has to run operation by operation."""
        shape = StepShape(len(batch.input_ids), len(batch.rows), len(batch.sampled))
        is_small = shape.tokens <= self._max_tokens and shape.samples <= self._max_samples
        if not is_small or not self._is_possible or len(batch.pending):
            return None
        if shape in self._captured:
            self._fill(batch, shape)
            logits, replay = self._captured[shape] = self._captured.pop(shape)
            replay()
            return logits
        if shape not in self._seen:  # it may never come back
            if len(self._seen) == MAX_SEEN:
                self._seen.clear()
            self._seen.add(shape)
            return None
        self._fill(batch, shape)
        try:
            (logits,), replay = self._capture(lambda: (self._run(shape),))
        except NotCapturableError as error:
            log.info("steps are launched operation by operation: the model has %s", error)
            self._is_possible = False
            return None
        if len(self._captured) == MAX_CAPTURES:
            del self._captured[next(iter(self._captured))]
        self._captured[shape] = logits, replay
        return logits

    def _fill(self, batch: StepBatch, shape: StepShape) -> None:
        tokens, requests, samples = shape
        self._input_ids[:tokens] = batch.input_ids
        self._positions[:tokens] = batch.positions
        self._slots[:tokens] = batch.slots
        self._block_tables[:requests, : batch.block_tables.shape[1]] = batch.block_tables
        self._query_starts[: requests + 1] = batch.query_starts
        self._context_lens[:requests] = batch.context_lens
        if not batch.samples_all:
            self._sampled_tokens[:samples] = batch.sampled_tokens
            self._sample_starts[: requests + 1], _ = batch.sample_starts()

    def _run(self, shape: StepShape) -> Tensor:
        tokens, requests, samples = shape
        wanted = LastTokens(
            tokens=torch.from_numpy(self._sampled_tokens[:samples]),
            query_starts=torch.from_numpy(self._sample_starts[: requests + 1]),
            max_query_len=tokens,
        )
        attention = AttentionBatch(
            slots=torch.from_numpy(self._slots[:tokens]),
            block_tables=torch.from_numpy(self._block_tables[:requests]),
            query_starts=torch.from_numpy(self._query_starts[: requests + 1]),
            context_lens=torch.from_numpy(self._context_lens[:requests]),
            max_query_len=tokens,
            wanted=wanted if samples < tokens else None,
        )
        input_ids, positions = (torch.from_numpy(array[:tokens]) for array in (self._input_ids, self._positions))
        return self._model.logits(self._model.forward(input_ids, positions, attention, self._kv))
