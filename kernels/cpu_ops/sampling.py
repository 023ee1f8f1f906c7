"""C++ twin of torch_ops.sampling."""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.kernels.cpu_ops.library import library


def sample(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor) -> Tensor:
    assert logits.dtype == torch.float32
    assert top_k.dtype == torch.int32
    rows, vocab = logits.shape
    out = torch.empty(rows, dtype=torch.int64)
    library().shoal_sample(
        out.data_ptr(), logits.data_ptr(), temperature.data_ptr(), top_k.data_ptr(), top_p.data_ptr(), min_p.data_ptr(),
        uniform.data_ptr(), rows, vocab, logits.stride(0), torch.get_num_threads(),
    )  # fmt: skip
    return out
