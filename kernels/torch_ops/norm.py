"""The residual add, and root-mean-square normalisation (Zhang and Sennrich, arXiv 1910.07467), alone and fused."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(
    x: Tensor,  # [..., dim]
    weight: Tensor,  # [dim] float32
    eps: float,
) -> Tensor:  # [..., dim] contiguous, dtype of x
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32 and rounded once.

    Dimensions but the last may be strided. Raises ValueError where weight is not float32 of x's last dimension.
    """
    if weight.dtype != torch.float32 or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"rms_norm needs a float32 weight of shape [{x.shape[-1]}], got {weight.dtype} {list(weight.shape)}"
        )
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * scale * weight).to(x.dtype).contiguous()


def add_rms_norm(
    x: Tensor,  # [tokens, dim]
    residual: Tensor,  # [tokens, dim], same dtype; becomes residual + x
    weight: Tensor,  # [dim] float32
    eps: float,
) -> Tensor:  # [tokens, dim]
    """Add x to the residual in place (rounded to its dtype) and return the norm of the sum.

    Raises ValueError where x and residual differ in shape or dtype, or the weight does not fit.
    """
    if x.shape != residual.shape or x.dtype != residual.dtype:
        raise ValueError(
            f"add_rms_norm needs x and residual alike, got {x.dtype} {list(x.shape)} "
            f"and {residual.dtype} {list(residual.shape)}"
        )
    residual.copy_(residual.float() + x.float())
    return rms_norm(residual, weight, eps)


def add(
    x: Tensor,  # [tokens, dim]
    residual: Tensor,  # [tokens, dim], same dtype; becomes residual + x
) -> None:
    """Add x to the residual in place."""
    residual.add_(x)
