"""The gated feed-forward layer (Shazeer 2020, arXiv:2002.05202)."""

from __future__ import annotations

from torch import Tensor

from shoal.engine.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from shoal.kernels.dispatch import Activation, Operations


class GatedMLP:
    """down(activation(gate(x)) * up(x)), split over ranks by inner features."""

    def __init__(
        self, gate_up: MergedColumnParallelLinear, down: RowParallelLinear, activation: Activation, ops: Operations
    ) -> None:
        self.weight_bytes = gate_up.weight_bytes + down.weight_bytes
        self._gate_up = gate_up
        self._down = down
        self._activation = activation
        self._gated_activation = ops.gated_activation

    def __call__(self, x: Tensor) -> Tensor:
        """x [tokens, hidden] -> [tokens, hidden]."""
        return self._down(self._gated_activation(self._gate_up(x), self._activation))
