"""C++ twin of torch_ops.kv_write."""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.kernels.cpu_ops.library import library


def kv_write(k: Tensor, v: Tensor, kv: Tensor, slots: Tensor) -> None:
    tokens, kv_heads, head_dim = k.shape
    assert k.stride(1) == v.stride(1) == head_dim, "heads must be dense"
    assert k.dtype == v.dtype == kv.dtype
    assert slots.dtype == torch.int64
    size = k.element_size()
    library().shoal_kv_write(
        k.data_ptr(), v.data_ptr(), kv.data_ptr(), slots.data_ptr(), tokens, kv_heads, head_dim * size, kv.shape[3],
        k.stride(0) * size, v.stride(0) * size, kv.stride(0) * size, torch.get_num_threads(),
    )  # fmt: skip
