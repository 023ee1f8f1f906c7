"""C++ twin of torch_ops.kv_write.

Inside each block and head the elements lie as the products of `attention` take them, so that a step lays nothing out
anew: keys [head_dim / pack, block_size, pack] and values [block_size / pack, head_dim, pack], where pack is 2 for
bfloat16 if both sizes are even, else 1. Only this table's `attention` reads them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.kernels.cpu_ops.kernel import Kernel
from shoal.kernels.cpu_ops.library import DTYPE_CODES

_kv_write = Kernel("kv_write")


def kv_write(k: Tensor, v: Tensor, kv: Tensor, slots: Tensor) -> None:
    tokens, kv_heads, head_dim = k.shape
    assert k.stride(1) == v.stride(1) == head_dim, "heads must be dense"
    assert k.dtype == v.dtype == kv.dtype
    assert slots.dtype == torch.int64
    _kv_write(
        k.numel() + v.numel(), k.data_ptr(), v.data_ptr(), kv.data_ptr(), slots.data_ptr(), tokens, kv_heads, head_dim,
        kv.shape[3], k.stride(0), v.stride(0), kv.stride(0), DTYPE_CODES[k.dtype],
    )  # fmt: skip
