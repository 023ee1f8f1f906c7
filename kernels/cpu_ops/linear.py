"""Matrix products with the weight laid out once: our own panels for bfloat16 (linear.cpp), oneDNN's for float32.

Against F.linear, which lays the weight out in every call, oneDNN saves half in float32; torch's own inductor uses the
same two operators.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from shoal.kernels.cpu_ops.library import library
from shoal.kernels.cpu_ops.quantized_linear import pack_quantized, quantized_linear
from shoal.kernels.torch_ops import linear as plain
from shoal.kernels.torch_ops.linear import PackedLinear
from shoal.kernels.torch_ops.quantized import QuantizedWeight

# The number of rows that oneDNN lays the weight out for. Measured: 8 to 1024 give the same times at 1 to 1024 rows
# within noise, 1 is slower.
_BATCH_HINT = 32

_PANEL = 48  # outputs of a panel, as in linear.cpp


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
    library().shoal_pack_panels(panels.data_ptr(), dense.data_ptr(), outputs, inputs, torch.get_num_threads())
    return panels


def _multiply_panels(x: Tensor, packed: PackedLinear, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    assert x.shape[1] == packed.in_features
    assert x.dtype == packed.dtype
    if x.stride(1) != 1 or x.stride(0) % 2 or x.data_ptr() % 4:
        x = x.contiguous()
    out = torch.empty((x.shape[0], packed.out_features), dtype=out_dtype)
    library().shoal_linear(
        out.data_ptr(), x.data_ptr(), packed.weight.data_ptr(), None if bias is None else bias.data_ptr(),
        x.shape[0], packed.out_features, packed.in_features, x.stride(0), out_dtype == torch.float32,
        torch.get_num_threads(),
    )  # fmt: skip
    return out
