"""Writing new keys and values into the paged pool, and copying whole blocks of it."""

from __future__ import annotations

from torch import Tensor


def kv_write(
    k: Tensor,  # [tokens, kv_heads, head_dim]
    v: Tensor,  # [tokens, kv_heads, head_dim]
    kv: Tensor,  # [num_blocks, 2, kv_heads, block_size, head_dim], dense but for dimension 0
    slots: Tensor,  # [tokens] int64: block * block_size + offset, or -1 to write nothing
) -> None:
    """Write each token's key and value into its slot. `kv` is one layer of the pool.

    Raises ValueError where the shapes or dtypes of k, v and kv do not fit together.
    """
    _, two, kv_heads, block_size, head_dim = kv.shape
    if two != 2 or k.shape != v.shape or k.shape[1:] != (kv_heads, head_dim) or not k.dtype == v.dtype == kv.dtype:
        raise ValueError(
            f"kv_write needs k and v [tokens, {kv_heads}, {head_dim}] {kv.dtype} as the pool, "
            f"got {list(k.shape)} {k.dtype} and {list(v.shape)} {v.dtype}"
        )
    written = slots >= 0
    blocks, offsets = slots[written] // block_size, slots[written] % block_size
    kv[blocks, 0, :, offsets] = k[written]
    kv[blocks, 1, :, offsets] = v[written]


def copy_blocks(
    pool: Tensor,  # [num_blocks, ...]
    sources: Tensor,  # [n] int64
    targets: Tensor,  # [n] int64
) -> None:
    """Copy whole blocks inside the pool, all sources read before any target is written."""
    pool[targets] = pool[sources]
