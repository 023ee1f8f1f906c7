"""Triton twin of torch_ops.rotary."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.triton_ops.launch import next_power_of_2


@triton.jit
def _rotate(x, cos, sin, heads, head_dim, half, HEADS: tl.constexpr, HALF: tl.constexpr):  # noqa: N803
    head, pair = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (pair < half)
    first_at = x + head * head_dim + pair
    first = tl.load(first_at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(first_at + half, mask=inside, other=0.0).to(tl.float32)
    tl.store(first_at, (first * cos - second * sin).to(x.dtype.element_ty), mask=inside)
    tl.store(first_at + half, (second * cos + first * sin).to(x.dtype.element_ty), mask=inside)


@triton.jit
def _rotary_kernel(
    q, k, positions, cos_sin, q_stride, k_stride, heads, kv_heads, head_dim, half,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr,  # noqa: N803
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, HALF)[None, :]
    angles = cos_sin + tl.load(positions + token) * 2 * half + pair
    cos = tl.load(angles, mask=pair < half, other=0.0)
    sin = tl.load(angles + half, mask=pair < half, other=0.0)
    _rotate(q + token * q_stride, cos, sin, heads, head_dim, half, HEADS, HALF)
    _rotate(k + token * k_stride, cos, sin, kv_heads, head_dim, half, KV_HEADS, HALF)


def rotary(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
    tokens, heads, head_dim = q.shape
    kv_heads, half = k.shape[1], cos_sin.shape[1] // 2
    if tokens:
        _rotary_kernel[(tokens,)](
            q, k, positions, cos_sin, q.stride(0), k.stride(0), heads, kv_heads, head_dim, half,
            HEADS=next_power_of_2(heads), KV_HEADS=next_power_of_2(kv_heads), HALF=next_power_of_2(half),
        )  # fmt: skip
