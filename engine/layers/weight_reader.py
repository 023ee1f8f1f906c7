"""What a layer asks for while it loads. Adapters live with the formats that they read."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class WeightReader(Protocol):
    """Gives a layer memory on the model's device and fills it with stored weights, converted to its dtype."""

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised tensor, of the model's dtype unless told otherwise."""
        ...

    def read_into(self, out: Tensor, name: str, rows: range | None = None, columns: range | None = None) -> None:
        """Fill `out` with tensor `name`, or with its `rows` and `columns` [len(rows), len(columns)]."""
        ...
