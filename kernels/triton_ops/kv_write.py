"""Triton twin of torch_ops.kv_write."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.triton_ops.launch import next_power_of_2


@triton.jit
def _kv_write_kernel(
    k, v, kv, slots, k_stride, v_stride, block_stride, kv_heads, block_size, head_dim,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr,  # noqa: N803
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if slot < 0:
        return
    head, lane = tl.arange(0, KV_HEADS)[:, None], tl.arange(0, DIM)[None, :]
    inside = (head < kv_heads) & (lane < head_dim)
    source = head * head_dim + lane
    target = kv + slot // block_size * block_stride + (head * block_size + slot % block_size) * head_dim + lane
    tl.store(target, tl.load(k + token * k_stride + source, mask=inside), mask=inside)
    value_offset = kv_heads * block_size * head_dim
    tl.store(target + value_offset, tl.load(v + token * v_stride + source, mask=inside), mask=inside)


def kv_write(k: Tensor, v: Tensor, kv: Tensor, slots: Tensor) -> None:
    tokens, kv_heads, head_dim = k.shape
    if tokens:
        _kv_write_kernel[(tokens,)](
            k, v, kv, slots, k.stride(0), v.stride(0), kv.stride(0), kv_heads, kv.shape[3], head_dim,
            KV_HEADS=next_power_of_2(kv_heads), DIM=next_power_of_2(head_dim),
        )  # fmt: skip
