"""Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv:1910.07467); the same on every rank."""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.engine.layers.weight_reader import WeightReader
from shoal.kernels.dispatch import Operations


class RMSNorm:
    """x / rms(x) * weight over the last dimension. The weight stays in float32 whatever the model's dtype."""

    def __init__(self, weight: Tensor, eps: float, ops: Operations) -> None:
        self.weight = weight  # [dim] float32
        self._eps = eps
        self._ops = ops

    @classmethod
    def load(cls, reader: WeightReader, name: str, *, size: int, eps: float, offset: float, ops: Operations) -> RMSNorm:
        """`offset` is what the family adds to the stored weight (1 in Gemma)."""
        weight = reader.empty(size, dtype=torch.float32)
        reader.read_into(weight, f"{name}.weight")
        return cls(weight.add_(offset), eps, ops)

    @property
    def weight_bytes(self) -> int:
        return self.weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., dim] -> a new tensor of the same shape."""
        return self._ops.rms_norm(x, self.weight, self._eps)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """Add x to `residual` in place, both [tokens, dim], and return the norm of the sum."""
        return self._ops.add_rms_norm(x, residual, self.weight, self._eps)
