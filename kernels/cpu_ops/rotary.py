"""C++ twin of torch_ops.rotary."""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.kernels.cpu_ops.kernel import Kernel
from shoal.kernels.cpu_ops.library import DTYPE_CODES

_rotary = Kernel("rotary")


def rotary(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
    tokens, heads, head_dim = q.shape
    assert q.stride(1) == k.stride(1) == head_dim, "heads must be dense"
    assert q.dtype == k.dtype
    assert positions.dtype == torch.int64
    assert cos_sin.dtype == torch.float32
    _rotary(
        q.numel() + k.numel(), q.data_ptr(), k.data_ptr(), positions.data_ptr(), cos_sin.data_ptr(), tokens, heads,
        k.shape[1], head_dim, cos_sin.shape[1], q.stride(0), k.stride(0), DTYPE_CODES[q.dtype],
    )  # fmt: skip
