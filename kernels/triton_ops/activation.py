"""Triton twin of torch_ops.activation."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.torch_ops.activation import Activation

_BLOCK = 1024


@triton.jit
def _gated_activation_kernel(gate_up, out, stride, inter, IS_GELU: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < inter
    gate = tl.load(gate_up + token * stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * stride + inter + columns, mask=inside, other=0.0).to(tl.float32)
    if IS_GELU:
        # 0.5 * (1 + tanh(u)) is sigmoid(2 u); 0.79788 is sqrt(2 / pi).
        active = gate * tl.sigmoid(2.0 * 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate))
    else:
        active = gate * tl.sigmoid(gate)
    tl.store(out + token * inter + columns, (active * up).to(out.dtype.element_ty), mask=inside)


def gated_activation(gate_up: Tensor, activation: Activation) -> Tensor:
    tokens, inter = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((tokens, inter), dtype=gate_up.dtype, device=gate_up.device)
    if tokens:
        _gated_activation_kernel[(tokens, triton.cdiv(inter, _BLOCK))](
            gate_up, out, gate_up.stride(0), inter, IS_GELU=activation == "gelu_tanh", BLOCK=_BLOCK
        )
    return out
