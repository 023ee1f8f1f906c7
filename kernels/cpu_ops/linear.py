"""Matrix products with the weight laid out once: our own panels for bfloat16 (linear.cpp), oneDNN's for float32.

Against F.linear, which lays the weight out in every call, oneDNN saves half in float32; torch's own inductor uses the
same two operators.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from shoal.kernels.cpu_ops.activation import IS_GELU, gated_activation
from shoal.kernels.cpu_ops.kernel import Kernel, empty
from shoal.kernels.cpu_ops.quantized_linear import pack_quantized, quantized_linear
from shoal.kernels.torch_ops import linear as plain
from shoal.kernels.torch_ops.activation import Activation
from shoal.kernels.torch_ops.linear import PackedLinear
from shoal.kernels.torch_ops.quantized import QuantizedWeight

# The number of rows that oneDNN lays the weight out for. Measured: 8 to 1024 give the same times at 1 to 1024 rows
# within noise, 1 is slower.
_BATCH_HINT = 32

_PANEL = 48  # outputs of a panel, as in linear.cpp

_pack, _multiply, _multiply_gated = Kernel("pack_panels"), Kernel("linear"), Kernel("gated_linear")


def pack_linear(weight: Tensor | QuantizedWeight) -> PackedLinear:
    if isinstance(weight, QuantizedWeight):
        return pack_quantized(weight)
    packed = plain.pack_linear(weight)
    if weight.numel() == 0:
        return packed
    layout = _choose_layout(weight)
    if layout == "panels":
        return PackedLinear(_pack_panels(weight), layout, packed.out_features, packed.in_features, packed.dtype)
    if layout == "onednn":
        reordered = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _BATCH_HINT)
        return PackedLinear(reordered, layout, packed.out_features, packed.in_features, packed.dtype)
    return packed


def linear(
    x: Tensor, packed: PackedLinear, bias: Tensor | None = None, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    if packed.quantized is not None:
        return quantized_linear(x, packed, packed.quantized, bias, out_dtype or x.dtype)
    if packed.layout == "panels":
        return _multiply_panels(x, packed, bias, out_dtype or x.dtype)
    if packed.layout == "onednn":
        # oneDNN adds up a lone row in another order than rows in company. A second row costs a tenth or so.
        rows = torch.cat((x, x)) if len(x) == 1 else x
        product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed.weight, bias, "none", [], "")
        return product[: len(x)]
    return plain.linear(x, packed, bias, out_dtype=out_dtype)


def gated_linear(x: Tensor, packed: PackedLinear, bias: Tensor | None, activation: Activation) -> Tensor:
    inter = packed.out_features // 2
    if packed.layout != "panels" or packed.quantized is not None or inter % _PANEL:
        return gated_activation(linear(x, packed, bias), activation)
    rows = _pairs(x, packed)
    out = empty((len(x), inter), x.dtype)
    _multiply_gated(
        packed.weight.numel() * len(x), out.data_ptr(), rows.data_ptr(), packed.weight.data_ptr(),
        0 if bias is None else bias.data_ptr(), len(x), inter, packed.in_features, rows.stride(0), IS_GELU[activation],
    )  # fmt: skip
    return out


def _choose_layout(weight: Tensor) -> Literal["plain", "onednn", "panels"]:
    if weight.dtype == torch.bfloat16 and weight.shape[1] % 2 == 0:
        return "panels"
    if weight.dtype == torch.float32 and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "onednn"
    return "plain"  # float16 products run in software on most CPUs, packed or not


def _pack_panels(weight: Tensor) -> Tensor:
    """weight [out, in] -> [ceil(out / 48), in / 2, 48, 2]."""
    outputs, inputs = weight.shape
    panels = torch.empty((-(-outputs // _PANEL), inputs // 2, _PANEL, 2), dtype=weight.dtype)
    dense = weight.contiguous()
    _pack(dense.numel(), panels.data_ptr(), dense.data_ptr(), outputs, inputs)
    return panels


def _multiply_panels(x: Tensor, packed: PackedLinear, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    rows = _pairs(x, packed)
    out = empty((x.shape[0], packed.out_features), out_dtype)
    _multiply(
        packed.weight.numel() * len(x), out.data_ptr(), rows.data_ptr(), packed.weight.data_ptr(),
        0 if bias is None else bias.data_ptr(), len(x), packed.out_features, packed.in_features, rows.stride(0),
        out_dtype == torch.float32,
    )  # fmt: skip
    return out


def _pairs(x: Tensor, packed: PackedLinear) -> Tensor:
    """x, laid out so that its rows are made of pairs."""
    assert x.shape[1] == packed.in_features
    assert x.dtype == packed.dtype
    return x.contiguous() if x.stride(1) != 1 or x.stride(0) % 2 or x.data_ptr() % 4 else x
