"""C++ twin of torch_ops.embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.kernels.cpu_ops.kernel import Kernel, empty
from shoal.kernels.cpu_ops.library import DTYPE_CODES

_embedding = Kernel("embedding")


def embedding(ids: Tensor, table: Tensor, scale: float = 1.0) -> Tensor:
    assert ids.dtype == torch.int64
    assert table.is_contiguous()
    out = empty((len(ids), table.shape[1]), table.dtype)
    _embedding(
        out.numel(), out.data_ptr(), ids.data_ptr(), table.data_ptr(), len(ids), table.shape[1],
        scale, DTYPE_CODES[table.dtype],
    )  # fmt: skip
    return out
