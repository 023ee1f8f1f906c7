"""Triton twins of torch_ops.norm."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.triton_ops.launch import next_power_of_2


@triton.jit
def _normalise(x, weight, out, eps, dim, columns):
    """One row; x in float32, 0 beyond dim."""
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / dim + eps)
    normal = x * scale * tl.load(weight + columns, mask=columns < dim, other=0.0)
    tl.store(out + columns, normal.to(out.dtype.element_ty), mask=columns < dim)


@triton.jit
def _rms_norm_kernel(x, weight, out, token_stride, head_stride, heads, dim, eps, BLOCK: tl.constexpr):  # noqa: N803
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    start = x + row // heads * token_stride + row % heads * head_stride
    values = tl.load(start + columns, mask=columns < dim, other=0.0).to(tl.float32)
    _normalise(values, weight, out + row * dim, eps, dim, columns)


@triton.jit
def _add_rms_norm_kernel(x, residual, weight, out, x_stride, residual_stride, dim, eps, BLOCK: tl.constexpr):  # noqa: N803
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < dim
    target = residual + row * residual_stride + columns
    added = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    total = (tl.load(target, mask=inside, other=0.0).to(tl.float32) + added).to(residual.dtype.element_ty)
    tl.store(target, total, mask=inside)
    _normalise(total.to(tl.float32), weight, out + row * dim, eps, dim, columns)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    rows = x if x.dim() in (2, 3) else x.reshape(-1, x.shape[-1])
    heads, head_stride = (rows.shape[1], rows.stride(1)) if rows.dim() == 3 else (1, 0)
    dim = x.shape[-1]
    _rms_norm_kernel[(rows.shape[0] * heads,)](
        rows, weight, out, rows.stride(0), head_stride, heads, dim, eps, BLOCK=next_power_of_2(dim)
    )
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    tokens, dim = x.shape
    out = torch.empty((tokens, dim), dtype=x.dtype, device=x.device)
    if tokens:
        _add_rms_norm_kernel[(tokens,)](
            x, residual, weight, out, x.stride(0), residual.stride(0), dim, eps, BLOCK=next_power_of_2(dim)
        )
    return out
