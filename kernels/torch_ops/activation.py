"""Gated activations of the feed-forward layer (Shazeer, arXiv 2002.05202)."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Activation = Literal["silu", "gelu_tanh"]


def gated_activation(
    gate_up: Tensor,  # [tokens, 2 * inter]: gate, then up
    activation: Activation,
) -> Tensor:  # [tokens, inter] contiguous
    """activation(gate) * up, in float32 and rounded once. Raises ValueError for another activation or an odd width."""
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gated_activation needs gate and up side by side, got an odd width {gate_up.shape[-1]}")
    gate, up = gate_up.float().chunk(2, dim=-1)
    if activation == "silu":
        return (F.silu(gate) * up).to(gate_up.dtype)
    if activation == "gelu_tanh":
        return (F.gelu(gate, approximate="tanh") * up).to(gate_up.dtype)
    raise ValueError(f"activation {activation!r} is not known: use 'silu' or 'gelu_tanh'")
