"""C++ twin of torch_ops.activation."""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.kernels.cpu_ops.library import DTYPE_CODES, library
from shoal.kernels.torch_ops.activation import Activation

_IS_GELU: dict[Activation, int] = {"silu": 0, "gelu_tanh": 1}


def gated_activation(gate_up: Tensor, activation: Activation) -> Tensor:
    tokens, width = gate_up.shape
    out = torch.empty((tokens, width // 2), dtype=gate_up.dtype)
    library().shoal_gated_activation(
        out.data_ptr(), gate_up.data_ptr(), tokens, width // 2, gate_up.stride(0), _IS_GELU[activation],
        DTYPE_CODES[gate_up.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return out
