"""C++ twin of torch_ops.activation."""

from __future__ import annotations

from torch import Tensor

from shoal.kernels.cpu_ops.kernel import Kernel, empty
from shoal.kernels.cpu_ops.library import DTYPE_CODES
from shoal.kernels.torch_ops.activation import Activation

IS_GELU: dict[Activation, int] = {"silu": 0, "gelu_tanh": 1}
_gated_activation = Kernel("gated_activation")


def gated_activation(gate_up: Tensor, activation: Activation) -> Tensor:
    tokens, width = gate_up.shape
    out = empty((tokens, width // 2), gate_up.dtype)
    _gated_activation(
        out.numel(), out.data_ptr(), gate_up.data_ptr(), tokens, width // 2, gate_up.stride(0), IS_GELU[activation],
        DTYPE_CODES[gate_up.dtype],
    )  # fmt: skip
    return out
