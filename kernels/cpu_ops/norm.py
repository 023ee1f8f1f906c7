"""C++ twins of torch_ops.norm."""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.kernels.cpu_ops.kernel import Kernel, empty
from shoal.kernels.cpu_ops.library import DTYPE_CODES

_rms_norm, _add_rms_norm, _add = Kernel("rms_norm"), Kernel("add_rms_norm"), Kernel("add")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    assert weight.dtype == torch.float32
    out = empty(x.shape, x.dtype)
    rows = x if x.dim() in (2, 3) else x.reshape(-1, x.shape[-1])
    heads, head_stride = (rows.shape[1], rows.stride(1)) if rows.dim() == 3 else (1, 0)
    _rms_norm(
        x.numel(), out.data_ptr(), rows.data_ptr(), weight.data_ptr(), rows.shape[0], heads, rows.shape[-1],
        rows.stride(0), head_stride, eps, DTYPE_CODES[x.dtype],
    )  # fmt: skip
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    assert weight.dtype == torch.float32
    assert x.dtype == residual.dtype
    tokens, dim = x.shape
    out = empty((tokens, dim), x.dtype)
    _add_rms_norm(
        x.numel(), out.data_ptr(), x.data_ptr(), residual.data_ptr(), weight.data_ptr(), tokens, dim, x.stride(0),
        residual.stride(0), eps, DTYPE_CODES[x.dtype],
    )  # fmt: skip
    return out


def add(x: Tensor, residual: Tensor) -> None:
    assert x.dtype == residual.dtype
    assert x.stride(1) == residual.stride(1) == 1
    tokens, dim = x.shape
    _add(
        x.numel(), residual.data_ptr(), x.data_ptr(), tokens, dim, residual.stride(0), x.stride(0),
        DTYPE_CODES[x.dtype],
    )  # fmt: skip
