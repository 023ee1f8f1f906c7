"""C++ twins of torch_ops.embedding."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shoal.kernels.cpu_ops.kernel import Kernel, empty
from shoal.kernels.cpu_ops.library import DTYPE_CODES

_take_rows = Kernel("take_rows")


def embedding(ids: Tensor, table: Tensor, scale: float = 1.0) -> Tensor:
    return _scaled_rows(table, ids, scale)


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    return _scaled_rows(x, rows, 1.0)


def _scaled_rows(x: Tensor, rows: Tensor, scale: float) -> Tensor:
    assert rows.dtype == torch.int64
    assert x[:1].is_contiguous(), "rows must be dense"
    out = empty((len(rows), *x.shape[1:]), x.dtype)
    _take_rows(
        out.numel(), out.data_ptr(), rows.data_ptr(), x.data_ptr(), len(rows), math.prod(x.shape[1:]), x.stride(0),
        scale, DTYPE_CODES[x.dtype],
    )  # fmt: skip
    return out
