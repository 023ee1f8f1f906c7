"""Matrix products with a weight prepared once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.kernels.torch_ops.activation import Activation, gated_activation
from shoal.kernels.torch_ops.quantized import QuantizedType, QuantizedWeight, dequantize


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A weight in the layout of the operation table that packed it. The loader drops the original.

    layout: "plain" is [out_features, in_features] as stored, or blocks as in QuantizedWeight; "onednn" is opaque;
        "panels" is as in cpu_ops/linear.cpp, or quantized_linear.cpp.
    dtype: that of the numbers; of quantized weights uint8.
    quantized: how blocks are to be read, where the weight is quantized.
    """

    weight: Tensor
    layout: Literal["plain", "onednn", "panels"]
    out_features: int
    in_features: int
    dtype: torch.dtype
    quantized: QuantizedType | None = None


def pack_linear(
    weight: Tensor | QuantizedWeight,  # [out_features, in_features]
) -> PackedLinear:
    """Keep the weight as it is. Raises ValueError where it is not a matrix."""
    if isinstance(weight, QuantizedWeight):
        return PackedLinear(weight.blocks, "plain", *weight.shape, torch.uint8, weight.type)
    if weight.dim() != 2:
        raise ValueError(f"pack_linear needs a weight [out, in], got shape {list(weight.shape)}")
    return PackedLinear(weight, "plain", weight.shape[0], weight.shape[1], weight.dtype)


def linear(
    x: Tensor,  # [tokens, in_features]
    packed: PackedLinear,
    bias: Tensor | None = None,  # [out_features], in the dtype of x
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:  # [tokens, out_features]
    """x @ weight.T + bias, summed in float32 and rounded once.

    out_dtype: that of x where None; float32 keeps what rounding would lose (logits that are close become ties in
    bfloat16). With a quantized weight, a device's table may round x to 8 bits first, 32 inputs of a row sharing a
    scale. Raises ValueError where the width of x is not the weight's.
    """
    if x.shape[-1] != packed.in_features:
        raise ValueError(f"linear needs x of width {packed.in_features}, got {x.shape[-1]}")
    if packed.quantized is not None:
        wide = F.linear(x.float(), dequantize(packed.weight, packed.quantized), None if bias is None else bias.float())
        return wide.to(out_dtype or x.dtype)
    if out_dtype in (None, x.dtype):
        return F.linear(x, packed.weight, bias)
    wide_bias = bias.to(out_dtype) if bias is not None else None
    return F.linear(x.to(out_dtype), packed.weight.to(out_dtype), wide_bias)


def gated_linear(
    x: Tensor,  # [tokens, in_features]
    packed: PackedLinear,  # [gate; up], each with half of out_features
    bias: Tensor | None,  # [out_features]
    activation: Activation,
) -> Tensor:  # [tokens, out_features / 2]
    """activation(gate(x)) * up(x), rounded once, and gate and up before that where they are two steps."""
    return gated_activation(linear(x, packed, bias), activation)


def quantized_rows(
    packed: PackedLinear,  # quantized
    ids: Tensor,  # [tokens] int64, each below out_features
    dtype: torch.dtype,
) -> Tensor:  # [tokens, in_features]
    """Rows of a quantized weight, as an embedding table is read. Raises ValueError where it is not quantized."""
    if packed.quantized is None:
        raise ValueError("quantized_rows reads quantized weights")
    return dequantize(packed.weight[ids], packed.quantized).to(dtype)
