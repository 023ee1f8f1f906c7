"""Matrix products with quantized weights in panels (quantized_linear.cpp), and rows of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from shoal.kernels.cpu_ops.kernel import Kernel, empty
from shoal.kernels.cpu_ops.library import DTYPE_CODES
from shoal.kernels.torch_ops.linear import PackedLinear
from shoal.kernels.torch_ops.quantized import BLOCK_BYTES, BLOCK_INPUTS, QuantizedType, QuantizedWeight

_PANEL = 32  # outputs of a panel, as in quantized_linear.cpp
_pack, _multiply, _take = Kernel("pack_quantized"), Kernel("quantized_linear"), Kernel("quantized_rows")
_CODES: Mapping[QuantizedType, int] = {"Q8_0": 0, "Q4_0": 1, "Q4_1": 2}


def pack_quantized(weight: QuantizedWeight) -> PackedLinear:
    """Lay out in panels of 32 outputs, in as many bytes as before; the last panel is filled up with zeros."""
    outputs, inputs = weight.shape
    num_blocks = inputs // BLOCK_INPUTS
    panels = torch.empty((-(-outputs // _PANEL), num_blocks, _PANEL * BLOCK_BYTES[weight.type]), dtype=torch.uint8)
    blocks = weight.blocks.contiguous()
    _pack(blocks.numel(), panels.data_ptr(), blocks.data_ptr(), outputs, inputs, _CODES[weight.type])
    return PackedLinear(panels, "panels", outputs, inputs, torch.uint8, weight.type)


def quantized_linear(
    x: Tensor, packed: PackedLinear, kind: QuantizedType, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """As torch_ops.linear.linear, x rounded to 8 bits, 32 inputs of a row sharing a scale."""
    assert x.shape[1] == packed.in_features
    assert bias is None or (bias.dtype == x.dtype and bias.is_contiguous())
    if x.stride(1) != 1:
        x = x.contiguous()
    out = empty((len(x), packed.out_features), out_dtype)
    _multiply(
        packed.out_features * packed.in_features * len(x), out.data_ptr(), x.data_ptr(), packed.weight.data_ptr(),
        0 if bias is None else bias.data_ptr(), len(x), packed.out_features, packed.in_features, x.stride(0),
        _CODES[kind], DTYPE_CODES[x.dtype], DTYPE_CODES[out_dtype],
    )  # fmt: skip
    return out


def quantized_rows(packed: PackedLinear, ids: Tensor, dtype: torch.dtype) -> Tensor:
    assert packed.quantized is not None
    out = empty((len(ids), packed.in_features), dtype)
    ids = ids.contiguous()
    _take(
        out.numel(), out.data_ptr(), packed.weight.data_ptr(), ids.data_ptr(), len(ids), packed.in_features,
        _CODES[packed.quantized], DTYPE_CODES[dtype],
    )  # fmt: skip
    return out
