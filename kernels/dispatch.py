"""One table: operation x device -> function. The only file of this folder that others import.

    ops = operations("cpu")
    hidden = ops.add_rms_norm(x, residual, weight, eps)

Contracts (shapes, dtypes, errors) are the docstrings of the twins in torch_ops.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from shoal.kernels.torch_ops import (
    activation,
    attention,
    capture,
    embedding,
    experts,
    kv_write,
    linear,
    norm,
    rotary,
    sampling,
)
from shoal.kernels.torch_ops.activation import Activation
from shoal.kernels.torch_ops.capture import Capture, NotCapturableError
from shoal.kernels.torch_ops.experts import PackedExperts
from shoal.kernels.torch_ops.linear import PackedLinear
from shoal.kernels.torch_ops.quantized import QuantizedType, QuantizedWeight

__all__ = [
    "Activation",
    "Capture",
    "NotCapturableError",
    "Operations",
    "PackedExperts",
    "PackedLinear",
    "QuantizedType",
    "QuantizedWeight",
    "operations",
    "reference",
]

logger = logging.getLogger(__name__)


class Attention(Protocol):
    def __call__(
        self,
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
    ) -> Tensor: ...


class Embedding(Protocol):
    def __call__(self, ids: Tensor, table: Tensor, scale: float = 1.0) -> Tensor: ...


class Linear(Protocol):
    def __call__(
        self, x: Tensor, packed: PackedLinear, bias: Tensor | None = None, *, out_dtype: torch.dtype | None = None
    ) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Operations:
    """Every operation for one device. Weights packed by one table are for that table's `linear` and `experts`."""

    embedding: Embedding
    take_rows: Callable[[Tensor, Tensor], Tensor]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    add: Callable[[Tensor, Tensor], None]
    rotary: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    kv_write: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    copy_blocks: Callable[[Tensor, Tensor, Tensor], None]
    attention: Attention
    gated_activation: Callable[[Tensor, Activation], Tensor]
    pack_linear: Callable[[Tensor | QuantizedWeight], PackedLinear]
    linear: Linear
    gated_linear: Callable[[Tensor, PackedLinear, Tensor | None, Activation], Tensor]
    quantized_rows: Callable[[PackedLinear, Tensor, torch.dtype], Tensor]
    pack_experts: Callable[[Tensor | Sequence[QuantizedWeight], Tensor | Sequence[QuantizedWeight]], PackedExperts]
    experts: Callable[[Tensor, PackedExperts, Tensor, Tensor, Activation], Tensor]
    sample: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    new_capture: Callable[[], Capture]


@functools.cache
def operations(device: Literal["cpu", "cuda"]) -> Operations:
    """The fastest table for a device, resolved once.

    The first call for "cpu" may compile the C++ kernels (some seconds, then cached on disk); where that fails it warns
    and the torch twins serve. "cuda" needs triton, which comes with CUDA builds of torch.
    """
    return {"cpu": _cpu, "cuda": _cuda}[device]()


def reference() -> Operations:
    """The torch twins: right on every device, fast on none."""
    return Operations(
        embedding=embedding.embedding,
        take_rows=embedding.take_rows,
        rms_norm=norm.rms_norm,
        add_rms_norm=norm.add_rms_norm,
        add=norm.add,
        rotary=rotary.rotary,
        kv_write=kv_write.kv_write,
        copy_blocks=kv_write.copy_blocks,
        attention=attention.attention,
        gated_activation=activation.gated_activation,
        pack_linear=linear.pack_linear,
        linear=linear.linear,
        gated_linear=linear.gated_linear,
        quantized_rows=linear.quantized_rows,
        pack_experts=experts.pack_experts,
        experts=experts.experts,
        sample=sampling.sample,
        new_capture=capture.new_capture,
    )


def _cpu() -> Operations:
    from shoal.kernels.cpu_ops import (
        activation,
        attention,
        embedding,
        experts,
        kernel,
        kv_write,
        library,
        linear,
        norm,
        quantized_linear,
        rotary,
        sampling,
    )

    try:
        library.library()
    except library.CompilerError as error:
        logger.warning("no C++ kernels, plain torch serves, several times slower; install g++ or set CXX: %s", error)
        return reference()
    return replace(
        reference(),
        embedding=embedding.embedding,
        take_rows=embedding.take_rows,
        rms_norm=norm.rms_norm,
        add_rms_norm=norm.add_rms_norm,
        add=norm.add,
        rotary=rotary.rotary,
        kv_write=kv_write.kv_write,
        attention=attention.attention,
        gated_activation=activation.gated_activation,
        pack_linear=linear.pack_linear,
        linear=linear.linear,
        gated_linear=linear.gated_linear,
        quantized_rows=quantized_linear.quantized_rows,
        pack_experts=experts.pack_experts,
        experts=experts.experts,
        sample=sampling.sample,
        new_capture=kernel.new_capture,
    )


def _cuda() -> Operations:
    from shoal.kernels.triton_ops import activation, attention, experts, kv_write, linear, norm, rotary, sampling

    return replace(
        reference(),
        rms_norm=norm.rms_norm,
        add_rms_norm=norm.add_rms_norm,
        rotary=rotary.rotary,
        kv_write=kv_write.kv_write,
        attention=attention.attention,
        gated_activation=activation.gated_activation,
        linear=linear.linear,
        gated_linear=linear.gated_linear,
        experts=experts.experts,
        sample=sampling.sample,
    )
