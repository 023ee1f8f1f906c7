"""Rows of a table."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def embedding(
    ids: Tensor,  # [tokens] int64
    table: Tensor,  # [rows, dim], contiguous
    scale: float = 1.0,
) -> Tensor:  # [tokens, dim]
    """table[ids] * scale, rounded once."""
    rows = F.embedding(ids, table)
    return rows if scale == 1 else rows.mul_(scale)


def take_rows(
    x: Tensor,  # [tokens, ...], rows dense
    rows: Tensor,  # [taken] int64
) -> Tensor:  # [taken, ...] contiguous
    """x[rows]"""
    return x.index_select(0, rows)
