"""Attention over a paged pool: many requests of any length in one call, grouped query heads, window and soft-cap.

Softmax statistics are float32 as in FlashAttention (Dao, arXiv 2307.08691); paging is PagedAttention's (Kwon et al.,
arXiv 2309.06180).
"""

from __future__ import annotations

import torch
from torch import Tensor

# Scores are held for this many queries at a time, so that memory grows with the context and not with its square:
# 1.6 % of the full score matrix at 8,192 tokens.
QUERY_TILE = 128


def attention(
    q: Tensor,  # [tokens, heads, head_dim], heads and head_dim dense
    kv: Tensor,  # [num_blocks, 2, kv_heads, block_size, head_dim], dense but for dimension 0
    block_tables: Tensor,  # [requests, max_blocks] int32
    query_starts: Tensor,  # [requests + 1] int32
    context_lens: Tensor,  # [requests] int32, the new tokens included
    max_query_len: int,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:  # [tokens, heads, head_dim] contiguous
    """Causal attention of each request's newest tokens to all its tokens, whose keys and values are in the pool.

    Request r owns the queries query_starts[r] to query_starts[r + 1]; query i of n sits at position
    context_lens[r] - n + i and sees the keys up to its own position, with a window w only the last w of them, itself
    included. `softcap` bounds the scores: softcap * tanh(score / softcap). Query head h reads key head
    h // (heads / kv_heads). Table entries beyond the context, and those wholly before every window, are never read.
    Raises ValueError where heads, head_dim, dtype or window do not fit.
    """
    heads, head_dim = q.shape[1:]
    kv_heads = kv.shape[2]
    if heads % kv_heads or kv.shape[4] != head_dim or q.dtype != kv.dtype:
        raise ValueError(
            f"attention needs heads a multiple of the pool's {kv_heads}, head_dim {kv.shape[4]} and {kv.dtype}, "
            f"got {heads}, {head_dim} and {q.dtype}"
        )
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    starts, contexts = query_starts.tolist(), context_lens.tolist()
    for request, context in enumerate(contexts):
        start, end = starts[request], starts[request + 1]
        for first in range(start, end, QUERY_TILE):
            last = min(first + QUERY_TILE, end)
            positions = torch.arange(context - end + first, context - end + last, device=q.device)
            low = 0 if window is None else max(0, context - end + first - window + 1)
            high = context - end + last
            keys, values = _gather(kv, block_tables[request], low, high)
            out[first:last] = _attend(q[first:last], keys, values, positions, low, scale, window, softcap)
    return out


def merge_splits(
    outputs: Tensor,  # [splits, rows, head_dim] float32
    lses: Tensor,  # [splits, rows] float32: log of the sum of exp(score); -inf for a split without keys
) -> Tensor:  # [rows, head_dim] float32
    """Join attention over disjoint parts of the context (flash-decoding). Rows without any key come out as 0."""
    weights = torch.exp(lses - lses.max(dim=0).values.clamp(min=torch.finfo(torch.float32).min))
    total = weights.sum(dim=0).clamp(min=torch.finfo(torch.float32).tiny)
    return (outputs * (weights / total).unsqueeze(-1)).sum(dim=0)


def _gather(
    kv: Tensor,  # [num_blocks, 2, kv_heads, block_size, head_dim]
    table: Tensor,  # [max_blocks] int32
    low: int,
    high: int,
) -> tuple[Tensor, Tensor]:  # [kv_heads, high - low, head_dim] float32 each
    """Keys and values at positions [low, high) of one request."""
    block_size = kv.shape[3]
    first_block, end_block = low // block_size, -(-high // block_size)
    blocks = kv[table[first_block:end_block].long()]  # [n, 2, kv_heads, block_size, head_dim]
    rows = blocks.permute(1, 2, 0, 3, 4).flatten(2, 3)  # [2, kv_heads, n * block_size, head_dim]
    offset = first_block * block_size
    keys, values = rows[:, :, low - offset : high - offset].float()
    return keys, values


def _attend(
    q: Tensor,  # [n, heads, head_dim]
    keys: Tensor,  # [kv_heads, m, head_dim] float32
    values: Tensor,  # [kv_heads, m, head_dim] float32
    positions: Tensor,  # [n] of the queries
    low: int,  # position of the first key
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:  # [n, heads, head_dim]
    n, heads, head_dim = q.shape
    kv_heads, m, _ = keys.shape
    grouped = q.float().view(n, kv_heads, heads // kv_heads, head_dim)
    scores = torch.einsum("nkgd,kmd->kgnm", grouped, keys) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    distance = positions[:, None] - torch.arange(low, low + m, device=q.device)  # [n, m]
    hidden = distance < 0
    if window is not None:
        hidden |= distance >= window
    weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), dim=-1)
    return torch.einsum("kgnm,kmd->nkgd", weights, values).reshape(n, heads, head_dim).to(q.dtype)
