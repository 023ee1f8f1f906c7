"""C++ twin of torch_ops.sampling."""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.kernels.cpu_ops.kernel import Kernel, empty

_sample = Kernel("sample")


def sample(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor) -> Tensor:
    assert logits.dtype == torch.float32
    assert top_k.dtype == torch.int32
    rows, vocab = logits.shape
    out = empty((rows,), torch.int64)
    _sample(
        (rows - 1) * vocab, out.data_ptr(), logits.data_ptr(), temperature.data_ptr(), top_k.data_ptr(),
        top_p.data_ptr(), min_p.data_ptr(), uniform.data_ptr(), rows, vocab, logits.stride(0),
    )  # fmt: skip
    return out
