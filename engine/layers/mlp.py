"""The gated feed-forward layer (Shazeer 2020, arXiv:2002.05202)."""

from __future__ import annotations

from torch import Tensor

from shoal.engine.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from shoal.kernels.dispatch import Activation


class GatedMLP:
    """down(activation(gate(x)) * up(x)), split over ranks by inner features."""

    def __init__(self, gate_up: MergedColumnParallelLinear, down: RowParallelLinear, activation: Activation) -> None:
        self.weight_bytes = gate_up.weight_bytes + down.weight_bytes
        self._gate_up = gate_up
        self._down = down
        self._activation = activation

    def __call__(self, x: Tensor) -> Tensor:
        """x [tokens, hidden] -> [tokens, hidden]."""
        return self._down(self._gate_up.gated(x, self._activation))
