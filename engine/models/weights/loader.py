"""From stored tensors to this rank's tensors: one slice at a time, in the model's dtype, on the model's device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from shoal.engine.models.weights.stored import StoredTensor

Progress = Callable[[int, int], None]  # bytes done, bytes in all


class WeightSource(Protocol):
    """A checkpoint's tensors under Hugging Face's names and conventions, whatever the file calls them.

    `tensors` gives shape and stored size; `read` one tensor, or its `rows` and `columns`, on the CPU in any dtype.
    """

    @property
    def tensors(self) -> Mapping[str, StoredTensor]: ...

    def read(self, name: str, rows: range | None = None, columns: range | None = None) -> Tensor: ...


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
        total_bytes: int = 0,
        progress: Progress | None = None,
    ) -> None:
        self.dtype = dtype
        self.device = device
        self._source = source
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
        if name not in self._counted:
            self._counted.add(name)
            self._done_bytes += self._source.tensors[name].num_bytes
        if self._progress is not None:
            self._progress(min(self._done_bytes, self._total_bytes), self._total_bytes)
