"""Triton twin of torch_ops.attention.

A program takes a tile of rows, tokens x the query heads of one key head, against a part of the context with online
softmax (Dao, arXiv 2307.08691), so grouped heads read their keys once and leave no row of a tile idle. The context of a
request is split where few programs would leave the device idle; parts are joined by their log-sum-exp (flash-decoding).

Requests with few queries (decoding, drafts) and those with many (prompts) want different tiles, so a batch that has
both is launched once for each kind. The grid follows from shapes alone: lengths are read on the device, programs that
have nothing to do return at once, and a launch can be recorded in a CUDA graph.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.triton_ops.launch import IS_INTERPRETED, next_power_of_2

_FEW_ROWS = 64  # queries x grouped heads of a request with few queries, at most (or one query)
_MANY_ROWS = 128  # of a tile of a request with more
_PART_KEYS = 256  # the least part of a context that is worth its merge
_MAX_SPLITS = 64
# Programs for each processor, where splits can bring so many. Of the first kind three run at once, and contexts of
# unequal length even out over more; one of the second fills a processor, and its parts are costly to merge.
_FEW_PROGRAMS, _MANY_PROGRAMS = 8, 2
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(
    tile, query_starts, requests, TOKENS: tl.constexpr, HAS_FEW: tl.constexpr, MOST_FEW: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """(request, first query of the tile, start of the request's queries, their number: 0 for one of the other kind).

    A request with few queries is one tile. Otherwise a tile has TOKENS of them, and request r has the tiles from
    query_starts[r] // TOKENS + r on, which are always enough.
    """
    request, first = tile, 0
    if not HAS_FEW:
        low = tl.full((), 0, tl.int32)
        high = low + requests
        while high - low > 1:
            middle = (low + high) // 2
            is_later = tl.load(query_starts + middle) // TOKENS + middle > tile
            low = tl.where(is_later, low, middle)
            high = tl.where(is_later, middle, high)
        request = low
        first = (tile - tl.load(query_starts + low) // TOKENS - low) * TOKENS
    start = tl.load(query_starts + request)
    queries = tl.load(query_starts + request + 1) - start
    if HAS_FEW:
        queries = tl.where(queries <= MOST_FEW, queries, 0)
    else:
        queries = tl.where(queries > MOST_FEW, queries, 0)
    return request, first, start, queries


@triton.jit
def _add_keys(
    top, total, values, rows, position, base, end, table, keys_at, values_at, block_stride, scale, softcap,
    IS_MASKED: tl.constexpr, WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_SIZE: tl.constexpr,  # noqa: N803
    HEAD_DIM: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, IS_WIDENED: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """One tile of keys: the rows' running maximum (of scores in base 2), sum of weights and weighted sum of values."""
    key, lane = base + tl.arange(0, KEYS), tl.arange(0, DIM)
    is_element = (lane < HEAD_DIM)[None, :]
    if IS_MASKED:
        is_element = is_element & (key < end)[:, None]
        block = tl.load(table + key // BLOCK_SIZE, mask=key < end, other=0).to(tl.int64)
    else:
        block = tl.load(table + key // BLOCK_SIZE).to(tl.int64)
    at = (block * block_stride + key % BLOCK_SIZE * HEAD_DIM)[:, None] + lane[None, :]
    k_tile = tl.load(keys_at + at, mask=is_element, other=0.0)
    v_tile = tl.load(values_at + at, mask=is_element, other=0.0)
    if IS_WIDENED:
        scores = tl.dot(rows.to(tl.float32), tl.trans(k_tile.to(tl.float32)), input_precision="ieee")
    else:
        scores = tl.dot(rows, tl.trans(k_tile), input_precision="ieee")
    if HAS_SOFTCAP:
        scores = softcap * (2.0 * tl.sigmoid(2.0 * scores * scale / softcap) - 1.0) * _LOG2_E  # tanh
    else:
        scores = scores * (scale * _LOG2_E)
    if IS_MASKED:
        is_seen = (key < end)[None, :] & (key[None, :] <= position[:, None])
        if WINDOW > 0:
            is_seen = is_seen & (key[None, :] > position[:, None] - WINDOW)
        scores = tl.where(is_seen, scores, float("-inf"))
    now = tl.maximum(top, tl.max(scores, axis=1))
    finite = now
    if IS_MASKED:
        finite = tl.where(now == float("-inf"), 0.0, now)
    weights = tl.exp2(scores - finite[:, None])
    keep = tl.exp2(top - finite)
    total = total * keep + tl.sum(weights, axis=1)
    values = values * keep[:, None]
    if IS_WIDENED:
        values = tl.dot(weights, v_tile.to(tl.float32), values, input_precision="ieee")
    else:
        values = tl.dot(weights.to(v_tile.dtype), v_tile, values, input_precision="ieee")
    return now, total, values


@triton.jit
def _attention_kernel(
    q, kv, block_tables, query_starts, context_lens, out, lse,
    q_stride, block_stride, table_stride, requests, splits, kv_heads, scale, softcap,
    HAS_FEW: tl.constexpr, MOST_FEW: tl.constexpr, WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,  # noqa: N803
    GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, PART_KEYS: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, IS_SPLIT: tl.constexpr,  # noqa: N803
    IS_WIDENED: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """One part of the keys of one tile, into out [tokens, heads, head_dim].

    Where there are several parts, into out [splits, tiles, kv_heads, ROWS, head_dim] float32, with lse, natural
    logarithms; a part without keys writes its lse, -inf, only.
    """
    tokens_per_tile: tl.constexpr = ROWS // GROUP
    # The last tiles of a prompt see most keys, so they begin.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head, split = tl.program_id(1), tl.program_id(2)
    request, first, start, queries = _tile(tile, query_starts, requests, tokens_per_tile, HAS_FEW, MOST_FEW)
    if first >= queries:
        return
    before = tl.load(context_lens + request) - queries

    row, lane = tl.arange(0, ROWS), tl.arange(0, DIM)
    token = first + row // GROUP
    position = before + token
    is_row = (row < tokens_per_tile * GROUP) & (token < queries)
    inside = is_row[:, None] & (lane < HEAD_DIM)[None, :]
    token_row = (start + token).to(tl.int64)
    head = kv_head * GROUP + row % GROUP
    if IS_SPLIT:
        out_row = ((split.to(tl.int64) * tl.num_programs(0) + tile) * kv_heads + kv_head) * ROWS + row
    else:
        out_row = token_row * kv_heads * GROUP + head

    # Keys [low, high) are seen by some row, [all_low, all_high) by all of them.
    low, all_low = 0, 0
    high, all_high = before + tl.minimum(queries, first + tokens_per_tile), before + first + 1
    if WINDOW > 0:
        low, all_low = tl.maximum(0, all_high - WINDOW), tl.maximum(0, high - WINDOW)
    begin, end = low, high
    if IS_SPLIT:
        part = tl.maximum(tl.cdiv(tl.cdiv(high - low, splits), KEYS) * KEYS, PART_KEYS)
        begin = low + split * part
        end = tl.minimum(high, begin + part)
        if begin >= end:
            tl.store(lse + out_row, tl.full((ROWS,), float("-inf"), tl.float32), mask=is_row)
            return

    rows = tl.load(q + token_row[:, None] * q_stride + head[:, None] * HEAD_DIM + lane[None, :], mask=inside, other=0.0)
    table = block_tables + request.to(tl.int64) * table_stride
    keys_at = kv + kv_head.to(tl.int64) * BLOCK_SIZE * HEAD_DIM
    values_at = keys_at + kv_heads * BLOCK_SIZE * HEAD_DIM
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    values = tl.zeros((ROWS, DIM), tl.float32)
    inner = begin
    if WINDOW > 0:
        inner = tl.minimum(end, begin + tl.cdiv(tl.maximum(all_low - begin, 0), KEYS) * KEYS)
        for base in range(begin, inner, KEYS):
            top, total, values = _add_keys(
                top, total, values, rows, position, base, end, table, keys_at, values_at, block_stride, scale, softcap,
                True, WINDOW, HAS_SOFTCAP, BLOCK_SIZE, HEAD_DIM, KEYS, DIM, IS_WIDENED,
            )  # fmt: skip
    outer = inner + tl.maximum(tl.minimum(all_high, end) - inner, 0) // KEYS * KEYS
    for base in range(inner, outer, KEYS):
        top, total, values = _add_keys(
            top, total, values, rows, position, base, end, table, keys_at, values_at, block_stride, scale, softcap,
            False, WINDOW, HAS_SOFTCAP, BLOCK_SIZE, HEAD_DIM, KEYS, DIM, IS_WIDENED,
        )  # fmt: skip
    for base in range(outer, end, KEYS):
        top, total, values = _add_keys(
            top, total, values, rows, position, base, end, table, keys_at, values_at, block_stride, scale, softcap,
            True, WINDOW, HAS_SOFTCAP, BLOCK_SIZE, HEAD_DIM, KEYS, DIM, IS_WIDENED,
        )  # fmt: skip

    divisor = tl.where(total > 0, total, 1.0)
    result = (values / divisor[:, None]).to(out.dtype.element_ty)
    tl.store(out + out_row[:, None] * HEAD_DIM + lane[None, :], result, mask=inside)
    if IS_SPLIT:
        tl.store(lse + out_row, (top + tl.log2(divisor)) / _LOG2_E, mask=is_row)


@triton.jit
def _merge_kernel(
    parts, lse, query_starts, out, requests, splits, kv_heads,
    HAS_FEW: tl.constexpr, MOST_FEW: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Joins the parts of one row of a tile; torch_ops.attention.merge_splits is what it computes."""
    tile, kv_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    _, first, start, queries = _tile(tile, query_starts, requests, ROWS // GROUP, HAS_FEW, MOST_FEW)
    token = first + row // GROUP
    if token >= queries:
        return
    split, lane = tl.arange(0, SPLITS).to(tl.int64), tl.arange(0, DIM)
    part_row = ((split * tl.num_programs(0) + tile) * kv_heads + kv_head) * ROWS + row
    logs = tl.load(lse + part_row, mask=split < splits, other=float("-inf"))
    top = tl.max(logs, axis=0)
    weights = tl.exp(logs - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weights, axis=0)
    # Weightless parts may not have been written.
    inside = (weights > 0)[:, None] & (lane < HEAD_DIM)[None, :]
    part = tl.load(parts + part_row[:, None] * HEAD_DIM + lane[None, :], mask=inside, other=0.0)
    result = tl.sum(weights[:, None] * part, axis=0) / tl.where(total > 0, total, 1.0)
    target = out + ((start + token).to(tl.int64) * kv_heads * GROUP + kv_head * GROUP + row % GROUP) * HEAD_DIM + lane
    tl.store(target, result.to(out.dtype.element_ty), mask=lane < HEAD_DIM)


class _Shape(NamedTuple):
    """What a program takes at once, and with what."""

    rows: int  # queries x grouped heads, a power of two of at least 16, which tensor cores ask for
    keys: int
    num_warps: int
    # Where to find a tile of keys is loaded first, so tiles on their way are half of these.
    num_stages: int


class _Device(NamedTuple):
    num_processors: int
    shared_bytes: int  # that a program may use


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
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    most_few = max(1, _FEW_ROWS * kv.shape[2] // q.shape[1])
    has_many = max_query_len > most_few
    if len(q):
        arguments = (q, kv, block_tables, query_starts, context_lens, out, scale, window, softcap, most_few)
        if has_many:
            _launch(*arguments, False, max_query_len)
        if not has_many or len(block_tables) > 1:
            _launch(*arguments, True, min(max_query_len, most_few))
    return out


def _launch(
    q: Tensor,
    kv: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    out: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    most_few: int,
    has_few: bool,
    max_query_len: int,
) -> None:
    """Attention of the requests with at most `most_few` queries, or of those with more, into `out`."""
    tokens, heads, head_dim = q.shape
    requests, max_blocks = block_tables.shape
    kv_heads, block_size = kv.shape[2:4]
    group, device = heads // kv_heads, _device(q.device)
    rows = max(group, max_query_len * group if has_few else _MANY_ROWS)
    shape = _shape(has_few, rows, head_dim, q.element_size(), device)
    num_tiles = requests if has_few else tokens // (shape.rows // group) + requests
    # Context lengths stay on the device; the width of the tables bounds them.
    longest = max_blocks * block_size if window is None else min(max_blocks * block_size, window + max_query_len)
    splits = _num_splits(has_few, num_tiles * kv_heads, longest, device)
    parts, lse = out, out  # if there is one part, lse is not written
    if splits > 1:
        part_rows = (splits, num_tiles, kv_heads, shape.rows)
        parts = torch.empty((*part_rows, head_dim), dtype=torch.float32, device=q.device)
        lse = torch.empty(part_rows, dtype=torch.float32, device=q.device)
    kind = {
        "HAS_FEW": has_few, "MOST_FEW": most_few, "GROUP": group, "HEAD_DIM": head_dim, "ROWS": shape.rows,
        "DIM": max(16, next_power_of_2(head_dim)),
    }  # fmt: skip
    _attention_kernel[(num_tiles, kv_heads, splits)](
        q, kv, block_tables, query_starts, context_lens, parts, lse,
        q.stride(0), kv.stride(0), block_tables.stride(0), requests, splits, kv_heads, scale, softcap or 0.0,
        WINDOW=window or 0, HAS_SOFTCAP=softcap is not None, BLOCK_SIZE=block_size, PART_KEYS=_PART_KEYS,
        KEYS=shape.keys, IS_SPLIT=splits > 1, IS_WIDENED=IS_INTERPRETED, **kind,
        num_warps=shape.num_warps, num_stages=shape.num_stages,
    )  # fmt: skip
    if splits > 1:
        _merge_kernel[(num_tiles, kv_heads, shape.rows // group * group)](
            parts, lse, query_starts, out, requests, splits, kv_heads, SPLITS=next_power_of_2(splits), **kind
        )


def _shape(has_few: bool, rows: int, head_dim: int, element_bytes: int, device: _Device) -> _Shape:
    """For `rows` rows, at least. As large as registers allow; decoding has most keys on their way instead.

    Float32 products run without tensor cores, in small tiles.
    """
    dim = next_power_of_2(head_dim)
    rows = max(16, next_power_of_2(rows))
    if element_bytes == 4:
        keys, num_stages = 32 if dim <= 64 else 16, 2
    elif has_few:
        keys, num_stages = 64 if dim <= 128 else 32, 5
    else:
        keys, num_stages = 128 if dim <= 128 else 32, 3
    spare_bytes = 8 * 1024 if has_few else 0  # where the keys of more stages are
    # Queries, and keys and values twice.
    while keys > 16 and (rows + 4 * keys) * dim * element_bytes + spare_bytes > device.shared_bytes:
        keys //= 2
    return _Shape(rows, keys, 8 if rows >= 128 else 4, num_stages)


def _num_splits(has_few: bool, programs: int, longest: int, device: _Device) -> int:
    """Parts of the context of each tile, where there are `programs` without."""
    wanted = device.num_processors * (_FEW_PROGRAMS if has_few else _MANY_PROGRAMS) // programs
    return max(1, min(wanted, longest // _PART_KEYS, _MAX_SPLITS))


@functools.cache
def _device(device: torch.device) -> _Device:
    """Interpreted programs run one after another, and are let use what an H100 has."""
    if device.type != "cuda":
        return _Device(1, 227 * 1024)
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return _Device(properties["multiprocessor_count"], properties["max_shared_mem"])
