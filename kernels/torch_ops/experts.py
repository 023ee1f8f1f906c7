"""A mixture of gated feed-forward layers, "experts", of which each token uses a few (Shazeer et al. 2017,
arXiv:1701.06538; gated as in Mixtral, arXiv:2401.04088).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.kernels.torch_ops.activation import Activation, gated_activation
from shoal.kernels.torch_ops.linear import PackedLinear, linear, pack_linear
from shoal.kernels.torch_ops.quantized import QuantizedWeight


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """The weights of one layer's experts in the layout of the operation table that packed them."""

    gate_up: tuple[PackedLinear, ...]  # of each expert
    down: tuple[PackedLinear, ...]
    stacks: tuple[Tensor, Tensor] | None  # what was packed, where that is still what `gate_up` and `down` are made of


def pack_experts(
    gate_up: Tensor | Sequence[QuantizedWeight],  # [experts, 2 * inter, hidden]: gate, then up
    down: Tensor | Sequence[QuantizedWeight],  # [experts, hidden, inter]
) -> PackedExperts:
    """Keep the weights as they are. Raises ValueError where their shapes do not belong together."""
    if not isinstance(gate_up, Tensor) or not isinstance(down, Tensor):
        return PackedExperts(tuple(map(pack_linear, gate_up)), tuple(map(pack_linear, down)), None)
    num_experts, width, hidden = gate_up.shape
    if width % 2 or down.shape != (num_experts, hidden, width // 2):
        raise ValueError(
            "pack_experts needs gate_up [experts, 2 * inter, hidden] and down [experts, hidden, inter], got "
            f"{list(gate_up.shape)} and {list(down.shape)}"
        )
    gate_up, down = gate_up.contiguous(), down.contiguous()
    return PackedExperts(tuple(map(pack_linear, gate_up)), tuple(map(pack_linear, down)), (gate_up, down))


def experts(
    x: Tensor,  # [tokens, hidden]
    packed: PackedExperts,
    chosen: Tensor,  # [tokens, experts per token] int64, ascending in each row
    weights: Tensor,  # [tokens, experts per token] float32
    activation: Activation,
) -> Tensor:  # [tokens, hidden] contiguous
    """Sum over a token's experts of weight * down(gated_activation(gate_up(x))).

    Inner features are rounded to the dtype of x; the sum runs in float32, by ascending expert, and is rounded once.
    Raises ValueError where the width of x is not the experts', or for another activation.
    """
    out = torch.zeros_like(x, dtype=torch.float32)
    for expert, (gate_up, down) in enumerate(zip(packed.gate_up, packed.down, strict=True)):
        tokens, place = torch.where(chosen == expert)
        inner = gated_activation(linear(x[tokens], gate_up), activation)
        product = linear(inner, down, out_dtype=torch.float32)
        out.index_add_(0, tokens, product * weights[tokens, place].unsqueeze(1))
    return out.to(x.dtype)
