"""From stored tensors to this rank's tensors: one slice at a time, in the model's dtype, on the model's device."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from shoal.engine.models.weights.quantized import kept_type
from shoal.engine.models.weights.stored import StoredTensor
from shoal.kernels.dispatch import QuantizedType, QuantizedWeight

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # bytes done, bytes in all


class WeightSource(Protocol):
    """A checkpoint's tensors under Hugging Face's names and conventions, whatever the file calls them.

    `tensors` gives shape and stored size; `read` one tensor, or its `rows` and `columns`, on the CPU in any dtype.
    """

    @property
    def tensors(self) -> Mapping[str, StoredTensor]: ...

    def read(self, name: str, rows: range | None = None, columns: range | None = None) -> Tensor: ...


class QuantizedSource(WeightSource, Protocol):
    """One that also gives blocks of a quantized type, as in QuantizedWeight."""

    def read_blocks(
        self, name: str, kind: QuantizedType, rows: range | None = None, columns: range | None = None
    ) -> Tensor: ...


class WeightLoader:
    """Hands layers their weights (it is their WeightReader) and counts what was read.

    At any moment at most one stored tensor (or the slice asked for) is in memory besides what layers have kept.
    """

    def __init__(
        self,
        source: WeightSource,
        *,
        dtype: torch.dtype,
        device: torch.device,
        quantized: QuantizedSource | None = None,
        total_bytes: int = 0,
        progress: Progress | None = None,
    ) -> None:
        """`quantized`: the source again, where weights are to stay quantized."""
        self.dtype = dtype
        self.device = device
        self._source = source
        self._quantized = quantized
        self._kept: Counter[str] = Counter()  # of quantized types, as "stored" or "stored as kept"
        self._progress = progress
        self._total_bytes = total_bytes
        self._done_bytes = 0
        self._counted: set[str] = set()

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised tensor for `read_into`."""
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def read_into(self, out: Tensor, name: str, rows: range | None = None, columns: range | None = None) -> None:
        """Fill `out` with tensor `name`, or with its `rows` and `columns` [len(rows), len(columns)]."""
        out.copy_(self._source.read(name, rows, columns))
        self._count(name)

    def read_quantized(
        self, parts: Sequence[tuple[str, range]], columns: range | None = None
    ) -> QuantizedWeight | None:
        if self._quantized is None:
            return None
        stored = [self._source.tensors[name] for name, _ in parts]
        columns = columns or range(stored[0].shape[1])
        kind = kept_type([tensor.dtype for tensor in stored], columns)
        if kind is None:
            return None
        blocks = torch.cat([self._quantized.read_blocks(name, kind, rows, columns) for name, rows in parts])
        for (name, _), tensor in zip(parts, stored, strict=True):
            self._kept[kind if tensor.dtype == kind else f"{tensor.dtype} as {kind}"] += 1
            self._count(name)
        return QuantizedWeight(blocks, kind)

    def log_quantized(self) -> None:
        """Say which matrices have stayed quantized; all others are in the model's dtype."""
        if self._quantized is not None:
            kept = ", ".join(f"{count} {kind}" for kind, count in sorted(self._kept.items())) or "none"
            dtype = str(self.dtype).removeprefix("torch.")
            logger.info("matrices kept quantized: %s; the others are in %s", kept, dtype)

    def _count(self, name: str) -> None:
        if name not in self._counted:
            self._counted.add(name)
            self._done_bytes += self._source.tensors[name].num_bytes
        if self._progress is not None:
            self._progress(min(self._done_bytes, self._total_bytes), self._total_bytes)
