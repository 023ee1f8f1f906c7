"""Small steps whose operations are launched all at once, as captured in an earlier step of the same shape."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from shoal.engine.layers.attention import AttentionBatch
from shoal.engine.models.model import Model
from shoal.engine.runner.batch import StepBatch
from shoal.kernels.dispatch import Capture, NotCapturableError

log = logging.getLogger(__name__)

MAX_TOKENS = 64  # more of them take so long that launching operations one by one costs nothing
MAX_CAPTURES = 256  # shapes; some tens of KiB each

Shape = tuple[int, int]  # tokens, requests


class CapturedSteps:
    """Runs steps that sample after each of their tokens, as decoding and verifying drafts do.

    Their inputs are written to the same places every time. The logits of a step are good until the next one.
    """

    def __init__(
        self, model: Model, kv: Sequence[Tensor], capture: Capture, max_requests: int, max_blocks: int
    ) -> None:
        """`max_blocks`: of one request."""
        self._model = model
        self._kv = kv
        self._capture = capture
        self._is_possible = True
        self._seen: set[Shape] = set()
        self._captured: dict[Shape, tuple[Tensor, Callable[[], None]]] = {}  # the one used last at the end
        rows = min(MAX_TOKENS, max_requests)
        self._input_ids, self._positions, self._slots = np.zeros((3, MAX_TOKENS), np.int64)  # [tokens] each
        self._block_tables = np.zeros((rows, max_blocks), np.int32)  # [requests, max_blocks]
        self._query_starts = np.zeros(rows + 1, np.int32)  # [requests + 1]
        self._context_lens = np.zeros(rows, np.int32)  # [requests]

    def logits(self, batch: StepBatch) -> Tensor | None:
        """Of all tokens, as Model.logits gives them. None for a step that has to run operation by operation."""
        num_tokens, num_requests = shape = len(batch.input_ids), len(batch.rows)
        is_small = len(batch.sampled_tokens) == num_tokens <= MAX_TOKENS
        if not is_small or not self._is_possible or len(batch.pending):
            return None
        self._fill(batch)
        if shape in self._captured:
            logits, replay = self._captured[shape] = self._captured.pop(shape)
            replay()
            return logits
        if shape not in self._seen:
            self._seen.add(shape)  # it may never come back
            return None
        try:
            (logits,), replay = self._capture(lambda: (self._forward(num_tokens, num_requests),))
        except NotCapturableError as error:
            log.info("steps are launched operation by operation: the model has %s", error)
            self._is_possible = False
            return None
        if len(self._captured) == MAX_CAPTURES:
            del self._captured[next(iter(self._captured))]
        self._captured[shape] = logits, replay
        return logits

    def _fill(self, batch: StepBatch) -> None:
        num_tokens, num_requests = len(batch.input_ids), len(batch.rows)
        self._input_ids[:num_tokens] = batch.input_ids
        self._positions[:num_tokens] = batch.positions
        self._slots[:num_tokens] = batch.slots
        self._block_tables[:num_requests, : batch.block_tables.shape[1]] = batch.block_tables
        self._query_starts[: num_requests + 1] = batch.query_starts
        self._context_lens[:num_requests] = batch.context_lens

    def _forward(self, num_tokens: int, num_requests: int) -> Tensor:
        attention = AttentionBatch(
            slots=torch.from_numpy(self._slots[:num_tokens]),
            block_tables=torch.from_numpy(self._block_tables[:num_requests]),
            query_starts=torch.from_numpy(self._query_starts[: num_requests + 1]),
            context_lens=torch.from_numpy(self._context_lens[:num_requests]),
            max_query_len=num_tokens,
        )
        hidden = self._model.forward(
            torch.from_numpy(self._input_ids[:num_tokens]),
            torch.from_numpy(self._positions[:num_tokens]),
            attention,
            self._kv,
        )
        return self._model.logits(hidden)
