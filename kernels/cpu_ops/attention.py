"""C++ twin of torch_ops.attention."""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.kernels.cpu_ops.kernel import Kernel, empty
from shoal.kernels.cpu_ops.library import DTYPE_CODES

MAX_HEAD_DIM = 1024

_attention = Kernel("attention")


def attention(
    q: Tensor,
    kv: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    max_query_len: int,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """max_query_len is not used: a task is cut from the starts themselves."""
    tokens, heads, head_dim = q.shape
    assert q.stride(1) == head_dim <= MAX_HEAD_DIM, "heads must be dense"
    assert q.dtype == kv.dtype
    assert block_tables.dtype == query_starts.dtype == context_lens.dtype == torch.int32
    out = empty((tokens, heads, head_dim), q.dtype)
    work = 5 * tokens * heads * block_tables.shape[1] * kv.shape[3]  # at most; a score takes as long as 5 elements
    _attention(
        work, out.data_ptr(), q.data_ptr(), kv.data_ptr(), block_tables.data_ptr(), query_starts.data_ptr(),
        context_lens.data_ptr(), context_lens.shape[0], heads, kv.shape[2], head_dim, kv.shape[3], q.stride(0),
        kv.stride(0), block_tables.stride(0), window or 0, scale, softcap or 0.0, DTYPE_CODES[q.dtype],
    )  # fmt: skip
    return out
