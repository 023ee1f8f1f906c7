"""The physical KV pool of one rank: its own layers and heads of every block."""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.engine.memory.kv_layout import KVLayout


class KVStore:
    """One tensor for all layers, so that a block is one contiguous region: copying, moving or offloading it is one
    move.

    pool: [num_blocks, layers, 2, kv_heads, block_size, head_dim]; `layers[i]` is a view of it.
    """

    def __init__(self, layout: KVLayout, num_blocks: int, dtype: torch.dtype, device: torch.device) -> None:
        self.pool = torch.empty(layout.shape(num_blocks), dtype=dtype, device=device)
        # [num_blocks, 2, kv_heads, block_size, head_dim] each
        self.layers: tuple[Tensor, ...] = self.pool.unbind(1)

    @property
    def num_bytes(self) -> int:
        return self.pool.numel() * self.pool.element_size()
