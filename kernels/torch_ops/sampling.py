"""Drawing one token a row: temperature, min-p, top-k, top-p, then an inverse-CDF draw with a given uniform number."""

from __future__ import annotations

import torch
from torch import Tensor


def sample(
    logits: Tensor,  # [rows, vocab] float32; -inf forbids a token, at least one must be finite
    temperature: Tensor,  # [rows] float32, 0 is greedy
    top_k: Tensor,  # [rows] int32, 0 is off
    top_p: Tensor,  # [rows] float32, 1 is off
    min_p: Tensor,  # [rows] float32, 0 is off
    uniform: Tensor,  # [rows] float32 in [0, 1)
) -> Tensor:  # [rows] int64
    """Draw one token id a row. Pure: the same arguments give the same token in any batch.

    Greedy rows take the highest logit, the lowest id among equals. For the others weights are
    exp((logit - max) / temperature) in float64, so that all twins agree on the draw, and truncation follows vLLM V1's
    order: min_p keeps weights of at least min_p times the largest, top_k the k highest logits, top_p the fewest of
    the highest logits whose share of what is left reaches top_p. Tokens tied with the last one kept stay too. The
    token drawn is the first, in order of id, whose running sum of kept weights exceeds uniform * their total.
    Raises ValueError where logits are not float32 or a parameter has not one value a row.
    """
    rows, vocab = logits.shape
    if logits.dtype != torch.float32:
        raise ValueError(f"sample needs float32 logits, got {logits.dtype}")
    for name, value in (("temperature", temperature), ("top_k", top_k), ("top_p", top_p), ("min_p", min_p),
                        ("uniform", uniform)):  # fmt: skip
        if value.shape != (rows,):
            raise ValueError(f"sample needs one {name} for each of {rows} rows, got shape {list(value.shape)}")
    if rows == 0:
        return torch.empty(0, dtype=torch.int64, device=logits.device)
    greedy = temperature == 0
    divisor = torch.where(greedy, 1.0, temperature).double().unsqueeze(1)
    wide = logits.double()
    weights = torch.exp((wide - wide.max(dim=1, keepdim=True).values) / divisor)  # [rows, vocab]

    ordered, ids = logits.sort(dim=1, descending=True)
    sorted_weights = weights.gather(1, ids)
    rank = torch.arange(vocab, device=logits.device)
    kth = torch.where(top_k > 0, top_k, vocab).clamp(max=vocab).long().unsqueeze(1)
    kept = (sorted_weights >= min_p.double().unsqueeze(1)) & (ordered >= ordered.gather(1, kth - 1))
    running = torch.where(kept, sorted_weights, 0.0).cumsum(dim=1)
    enough = running >= top_p.double().unsqueeze(1) * running[:, -1:]
    last = torch.where(enough, rank, vocab).min(dim=1, keepdim=True).values
    last = torch.where(top_p.unsqueeze(1) < 1, last, vocab).minimum(kept.sum(dim=1, keepdim=True) - 1)
    kept_weights = torch.where(logits >= ordered.gather(1, last), weights, 0.0)

    running = kept_weights.cumsum(dim=1)
    drawn = (running > uniform.double().unsqueeze(1) * running[:, -1:]).int().argmax(dim=1)
    return torch.where(greedy, logits.argmax(dim=1), drawn)
