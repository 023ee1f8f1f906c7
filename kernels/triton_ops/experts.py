"""Triton twin of torch_ops.experts: two grouped matrix products over pairs of a token and an expert, sorted by expert.

A tile holds pairs of one expert only. How many tiles there are is known on the device alone, so the grid is as large as
it could get and tiles that are too many return at once: nothing waits for the device.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.torch_ops.activation import Activation
from shoal.kernels.torch_ops.experts import PackedExperts
from shoal.kernels.triton_ops.launch import IS_INTERPRETED, next_power_of_2

_FEW_ROWS, _MAX_ROWS = 16, 64
# Outputs of a program, and inputs that it adds up at once. With few rows the weights' way from memory is what takes
# time: more programs, each with longer pieces of them on their way.
_FEW_COLUMNS, _FEW_DEPTH = 32, 128
_COLUMNS, _DEPTH = 64, 64
_SUM_COLUMNS = 1024


@triton.jit
def _dot(a, b, sums, IS_WIDENED: tl.constexpr):  # noqa: N803
    if IS_WIDENED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
    return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def _tile(starts, tile, num_experts, ROWS: tl.constexpr, EXPERTS: tl.constexpr):  # noqa: N803
    """(expert, its first pair in this tile, end of its pairs); expert is num_experts where there is no such tile."""
    lane = tl.arange(0, EXPERTS)
    inside = lane < num_experts
    counts = tl.load(starts + lane + 1, mask=inside, other=0) - tl.load(starts + lane, mask=inside, other=0)
    tiles = (counts + ROWS - 1) // ROWS
    ends = tl.cumsum(tiles, 0)
    expert = tl.sum((inside & (ends <= tile)).to(tl.int32), 0)
    earlier = tl.sum(tl.where(lane < expert, tiles, 0), 0)
    is_tile = expert < num_experts
    first = tl.load(starts + expert, mask=is_tile, other=0) + (tile - earlier) * ROWS
    return expert, first, tl.load(starts + expert + 1, mask=is_tile, other=0)


@triton.jit
def _inner_kernel(
    x, gate_up, order, starts, inner, x_stride, num_experts, num_chosen, width, hidden,
    IS_GELU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,  # noqa: N803
    EXPERTS: tl.constexpr, IS_WIDENED: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """inner [pairs by expert, width] = activation(x gate^T) * (x up^T)."""
    expert, first, end = _tile(starts, tl.program_id(0), num_experts, ROWS, EXPERTS)
    if expert >= num_experts:
        return
    pair = first + tl.arange(0, ROWS).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    is_pair, is_column = pair < end, column < width
    token = tl.load(order + pair, mask=is_pair, other=0) // num_chosen
    rows = x + token[:, None] * x_stride
    gate_rows = gate_up + (expert.to(tl.int64) * 2 * width + column)[None, :] * hidden
    up_rows = gate_up + ((expert.to(tl.int64) * 2 + 1) * width + column)[None, :] * hidden

    gate = tl.zeros((ROWS, COLUMNS), tl.float32)
    up = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, hidden, DEPTH):
        k = start + depth
        is_weight = (k < hidden)[:, None] & is_column[None, :]
        x_tile = tl.load(rows + k[None, :], mask=is_pair[:, None] & (k < hidden)[None, :], other=0.0)
        gate = _dot(x_tile, tl.load(gate_rows + k[:, None], mask=is_weight, other=0.0), gate, IS_WIDENED)
        up = _dot(x_tile, tl.load(up_rows + k[:, None], mask=is_weight, other=0.0), up, IS_WIDENED)
    gate, up = gate.to(x.dtype.element_ty).to(tl.float32), up.to(x.dtype.element_ty).to(tl.float32)
    if IS_GELU:
        # 0.5 * (1 + tanh(u)) is sigmoid(2 u); 0.79788 is sqrt(2 / pi).
        active = gate * tl.sigmoid(2.0 * 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate))
    else:
        active = gate * tl.sigmoid(gate)
    target = inner + pair[:, None] * width + column[None, :]
    tl.store(target, (active * up).to(inner.dtype.element_ty), mask=is_pair[:, None] & is_column[None, :])


@triton.jit
def _term_kernel(
    inner, down, order, weights, starts, terms, num_experts, width, hidden,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,  # noqa: N803
    EXPERTS: tl.constexpr, IS_WIDENED: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """terms [pairs by token, hidden] = weight * (inner down^T)."""
    expert, first, end = _tile(starts, tl.program_id(0), num_experts, ROWS, EXPERTS)
    if expert >= num_experts:
        return
    pair = first + tl.arange(0, ROWS).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    is_pair, is_column = pair < end, column < hidden
    down_rows = down + (expert.to(tl.int64) * hidden + column)[None, :] * width

    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, width, DEPTH):
        k = start + depth
        is_weight = (k < width)[:, None] & is_column[None, :]
        rows = tl.load(
            inner + pair[:, None] * width + k[None, :], mask=is_pair[:, None] & (k < width)[None, :], other=0.0
        )
        sums = _dot(rows, tl.load(down_rows + k[:, None], mask=is_weight, other=0.0), sums, IS_WIDENED)
    place = tl.load(order + pair, mask=is_pair, other=0)
    weight = tl.load(weights + place, mask=is_pair, other=0.0)
    target = terms + place[:, None] * hidden + column[None, :]
    tl.store(target, sums * weight[:, None], mask=is_pair[:, None] & is_column[None, :])


@triton.jit
def _sum_kernel(terms, out, num_chosen, hidden, COLUMNS: tl.constexpr):  # noqa: N803
    """out [tokens, hidden] = sum of a token's terms, one by one."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < hidden
    sums = tl.zeros((COLUMNS,), tl.float32)
    for index in range(num_chosen):
        sums += tl.load(terms + (token * num_chosen + index) * hidden + column, mask=inside, other=0.0)
    tl.store(out + token * hidden + column, sums.to(out.dtype.element_ty), mask=inside)


def experts(x: Tensor, packed: PackedExperts, chosen: Tensor, weights: Tensor, activation: Activation) -> Tensor:
    assert packed.stacks is not None, "experts packed by another table"
    gate_up, down = packed.stacks
    num_experts, hidden, width = down.shape
    tokens, num_chosen = chosen.shape
    out = torch.empty((tokens, hidden), dtype=x.dtype, device=x.device)
    if not tokens:
        return out
    by_expert, order = chosen.flatten().sort(stable=True)
    starts = torch.searchsorted(by_expert, torch.arange(num_experts + 1, device=x.device))
    inner = torch.empty((len(order), width), dtype=x.dtype, device=x.device)
    terms = torch.empty((len(order), hidden), dtype=torch.float32, device=x.device)

    rows = max(_FEW_ROWS, min(_MAX_ROWS, next_power_of_2(len(order) // num_experts)))
    columns, depth = (_FEW_COLUMNS, _FEW_DEPTH) if rows == _FEW_ROWS else (_COLUMNS, _DEPTH)
    most_tiles = len(order) // rows + min(len(order), num_experts)
    shape = {
        "ROWS": rows, "COLUMNS": columns, "DEPTH": depth, "EXPERTS": next_power_of_2(num_experts),
        "IS_WIDENED": IS_INTERPRETED, "num_stages": 4 if x.element_size() == 2 else 2,
    }  # fmt: skip
    _inner_kernel[(most_tiles, triton.cdiv(width, columns))](
        x, gate_up, order, starts, inner, x.stride(0), num_experts, num_chosen, width, hidden,
        IS_GELU=activation == "gelu_tanh", **shape,
    )  # fmt: skip
    _term_kernel[(most_tiles, triton.cdiv(hidden, columns))](
        inner, down, order, weights.contiguous(), starts, terms, num_experts, width, hidden, **shape
    )
    _sum_kernel[(tokens, triton.cdiv(hidden, _SUM_COLUMNS))](terms, out, num_chosen, hidden, COLUMNS=_SUM_COLUMNS)
    return out
