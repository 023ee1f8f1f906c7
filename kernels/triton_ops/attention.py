"""Triton twin of torch_ops.attention: one kernel for decoding and prompt chunks.

The context is split where few programs would leave the device idle.

A program takes a block of rows, tokens x the query heads of one key head, against a part of the context with online
softmax (Dao, arXiv 2307.08691). Parts are joined by their log-sum-exp (flash-decoding).
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.triton_ops.launch import IS_INTERPRETED, next_power_of_2

_KEYS = 64  # keys of a tile
_SPLIT_KEYS = 512  # a part of the context is worth its merge from this many keys on
_MAX_SPLITS = 16


@triton.jit
def _attention_kernel(
    q, kv, block_tables, query_starts, context_lens, out, lse,
    q_stride, block_stride, table_stride, split_stride, heads, kv_heads, block_size, head_dim, scale, softcap,
    WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,  # noqa: N803
    KEYS: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr, IS_WIDENED: tl.constexpr,  # noqa: N803
):  # fmt: skip
    request, tile = tl.program_id(0), tl.program_id(1)
    kv_head, split = tl.program_id(2) // SPLITS, tl.program_id(2) % SPLITS
    start = tl.load(query_starts + request)
    queries = tl.load(query_starts + request + 1) - start
    context = tl.load(context_lens + request)
    tokens_per_tile: tl.constexpr = ROWS // GROUP
    first = tile * tokens_per_tile
    if first >= queries:
        return

    row, lane = tl.arange(0, ROWS), tl.arange(0, DIM)
    token = first + row // GROUP
    head = kv_head * GROUP + row % GROUP
    is_row = (row < tokens_per_tile * GROUP) & (token < queries)
    inside = is_row[:, None] & (lane < head_dim)[None, :]
    token_row = (start + token).to(tl.int64)
    rows = tl.load(q + token_row[:, None] * q_stride + head[:, None] * head_dim + lane[None, :], mask=inside, other=0.0)
    position = context - queries + token

    high = tl.minimum(context, context - queries + first + tokens_per_tile)
    low = 0
    if WINDOW > 0:
        low = tl.maximum(0, context - queries + first - WINDOW + 1)
    part = tl.cdiv(tl.cdiv(high - low, SPLITS), KEYS) * KEYS
    begin = low + split * part
    end = tl.minimum(high, begin + part)

    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    values = tl.zeros((ROWS, DIM), tl.float32)
    for base in range(begin, end, KEYS):
        key = base + tl.arange(0, KEYS)
        is_key = key < end
        block = tl.load(block_tables + request * table_stride + key // block_size, mask=is_key, other=0).to(tl.int64)
        at = kv + block * block_stride + (kv_head * block_size + key % block_size) * head_dim
        is_element = is_key[:, None] & (lane < head_dim)[None, :]
        k_tile = tl.load(at[:, None] + lane[None, :], mask=is_element, other=0.0)
        v_tile = tl.load(at[:, None] + kv_heads * block_size * head_dim + lane[None, :], mask=is_element, other=0.0)
        if IS_WIDENED:
            scores = tl.dot(rows.to(tl.float32), tl.trans(k_tile.to(tl.float32)), input_precision="ieee")
        else:
            scores = tl.dot(rows, tl.trans(k_tile), input_precision="ieee")
        scores = scores * scale
        if HAS_SOFTCAP:
            scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)  # tanh
        is_seen = is_key[None, :] & (key[None, :] <= position[:, None])
        if WINDOW > 0:
            is_seen = is_seen & (key[None, :] > position[:, None] - WINDOW)
        scores = tl.where(is_seen, scores, float("-inf"))
        now = tl.maximum(top, tl.max(scores, axis=1))
        safe = tl.where(now == float("-inf"), 0.0, now)
        weights = tl.exp(scores - safe[:, None])
        keep = tl.exp(top - safe)
        total = total * keep + tl.sum(weights, axis=1)
        if IS_WIDENED:
            product = tl.dot(weights, v_tile.to(tl.float32), input_precision="ieee")
        else:
            product = tl.dot(weights.to(v_tile.dtype), v_tile, input_precision="ieee")
        values = values * keep[:, None] + product
        top = now

    divisor = tl.where(total > 0, total, 1.0)
    result = values / divisor[:, None]
    out_row = token_row * heads + head
    target = out + split * split_stride * head_dim + out_row[:, None] * head_dim + lane[None, :]
    tl.store(target, result.to(out.dtype.element_ty), mask=inside)
    if SPLITS > 1:
        tl.store(lse + split * split_stride + out_row, top + tl.log(divisor), mask=is_row)


@triton.jit
def _merge_kernel(outputs, lses, out, rows, head_dim, SPLITS: tl.constexpr, DIM: tl.constexpr):  # noqa: N803
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, DIM)
    top = float("-inf")
    for split in range(SPLITS):
        top = tl.maximum(top, tl.load(lses + split * rows + row))
    safe = tl.where(top == float("-inf"), 0.0, top)
    total = 0.0
    values = tl.zeros((DIM,), tl.float32)
    for split in range(SPLITS):
        weight = tl.exp(tl.load(lses + split * rows + row) - safe)
        part = tl.load(outputs + (split * rows + row) * head_dim + lane, mask=lane < head_dim, other=0.0)
        total += weight
        values += weight * part
    result = values / tl.where(total > 0, total, 1.0)
    tl.store(out + row * head_dim + lane, result.to(out.dtype.element_ty), mask=lane < head_dim)


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
    tokens, heads, head_dim = q.shape
    requests, max_blocks = block_tables.shape
    kv_heads, block_size = kv.shape[2:4]
    out = torch.empty((tokens, heads, head_dim), dtype=q.dtype, device=q.device)
    if tokens == 0:
        return out
    group = heads // kv_heads
    rows = max(16, next_power_of_2(min(max_query_len * group, max(64, group))))
    tiles = triton.cdiv(max_query_len, rows // group)
    # Context lengths stay on the device; the width of the tables bounds them.
    longest = max_blocks * block_size if window is None else min(max_blocks * block_size, window + max_query_len)
    splits = _splits(requests * tiles * kv_heads, longest, _num_processors(q.device))
    if splits == 1:
        part, lses = out, out  # lses is not written
    else:
        part = torch.empty((splits, tokens, heads, head_dim), dtype=torch.float32, device=q.device)
        lses = torch.empty((splits, tokens, heads), dtype=torch.float32, device=q.device)
    dim = max(16, next_power_of_2(head_dim))
    _attention_kernel[(requests, tiles, kv_heads * splits)](
        q, kv, block_tables, query_starts, context_lens, part, lses,
        q.stride(0), kv.stride(0), block_tables.stride(0), tokens * heads, heads, kv_heads, block_size, head_dim,
        scale, softcap or 0.0,
        WINDOW=window or 0, HAS_SOFTCAP=softcap is not None, GROUP=group, ROWS=rows,
        KEYS=_KEYS if dim <= 128 else _KEYS // 2, DIM=dim, SPLITS=splits, IS_WIDENED=IS_INTERPRETED,
    )  # fmt: skip
    if splits > 1:
        merge_splits(part.view(splits, tokens * heads, head_dim), lses.view(splits, -1), out)
    return out


def merge_splits(
    outputs: Tensor,  # [splits, rows, head_dim] float32
    lses: Tensor,  # [splits, rows] float32
    out: Tensor,  # rows x head_dim elements, contiguous
) -> None:
    """Twin of torch_ops.attention.merge_splits, into `out`."""
    splits, rows, head_dim = outputs.shape
    _merge_kernel[(rows,)](outputs, lses, out, rows, head_dim, SPLITS=splits, DIM=next_power_of_2(head_dim))


def _splits(programs: int, longest: int, processors: int) -> int:
    """Parts of the context, a power of two: enough to occupy the device twice over, none too small for its merge."""
    wanted = min(2 * processors // max(programs, 1), longest // _SPLIT_KEYS, _MAX_SPLITS)
    return 1 << max(0, wanted.bit_length() - 1)


@functools.cache
def _num_processors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; interpreted programs run one after another."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
