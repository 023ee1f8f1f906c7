"""Rotary position embedding (Su et al., arXiv 2104.09864), half-split pairs as in GPT-NeoX and Llama."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary(
    q: Tensor,  # [tokens, heads, head_dim]
    k: Tensor,  # [tokens, kv_heads, head_dim]
    positions: Tensor,  # [tokens] int64
    cos_sin: Tensor,  # [max_position, rotary_dim] float32: rotary_dim/2 cosines, then as many sines
) -> None:
    """Rotate q and k in place by their positions, in float32 and rounded once.

    Only the first rotary_dim dimensions turn; dimension i pairs with i + rotary_dim/2. The token dimension may be
    strided. Raises ValueError where rotary_dim is odd or larger than head_dim, or cos_sin is not float32.
    """
    rotary_dim = cos_sin.shape[1]
    if cos_sin.dtype != torch.float32 or rotary_dim % 2 or rotary_dim > q.shape[-1]:
        raise ValueError(
            f"rotary needs float32 cos_sin of an even width up to head_dim {q.shape[-1]}, "
            f"got {cos_sin.dtype} of width {rotary_dim}"
        )
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)  # [tokens, 1, rotary_dim / 2] each
    for x in (q, k):
        first, second = x[..., :rotary_dim].float().chunk(2, dim=-1)
        x[..., :rotary_dim] = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
