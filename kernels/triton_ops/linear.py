"""Matrix products are cuBLAS's; no kernel of ours is needed."""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.kernels.torch_ops import linear as plain
from shoal.kernels.torch_ops.activation import Activation
from shoal.kernels.torch_ops.linear import PackedLinear
from shoal.kernels.triton_ops.activation import gated_activation


def linear(
    x: Tensor, packed: PackedLinear, bias: Tensor | None = None, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    if out_dtype in (None, x.dtype) or not x.is_cuda or bias is not None or packed.quantized is not None:
        return plain.linear(x, packed, bias, out_dtype=out_dtype)
    return torch.mm(x, packed.weight.t(), out_dtype=out_dtype)


def gated_linear(x: Tensor, packed: PackedLinear, bias: Tensor | None, activation: Activation) -> Tensor:
    return gated_activation(linear(x, packed, bias), activation)
