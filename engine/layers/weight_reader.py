"""What a layer asks for while it loads. Adapters live with the formats that they read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from shoal.kernels.dispatch import QuantizedWeight


class WeightReader(Protocol):
    """Gives a layer memory on the model's device and fills it with stored weights, converted to its dtype."""

    dtype: torch.dtype  # of the model

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised tensor, of the model's dtype unless told otherwise."""
        ...

    def read_into(self, out: Tensor, name: str, rows: range | None = None, columns: range | None = None) -> None:
        """Fill `out` with tensor `name`, or with its `rows` and `columns` [len(rows), len(columns)]."""
        ...

    def read_quantized(
        self, parts: Sequence[tuple[str, range]], columns: range | None = None
    ) -> QuantizedWeight | None:
        """The rows of named matrices, one below the other, or `columns` of them, quantized. None where they are to be
        read as numbers.
        """
        ...
