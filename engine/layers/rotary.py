"""Tables of cosines and sines for rotary embeddings (Su et al. 2021, arXiv:2104.09864) and their scalings."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shoal.engine.layers.rotary_spec import (
    DivisorScaling,
    LinearScaling,
    Llama3Scaling,
    RotarySpec,
    YarnScaling,
)


def rotary_table(spec: RotarySpec, num_positions: int, device: torch.device) -> Tensor:
    """Cosines then sines of every position: [num_positions, rotary_dim] float32."""
    positions = torch.arange(num_positions, dtype=torch.float32)
    angles = torch.outer(positions, inverse_frequencies(spec))  # [positions, rotary_dim / 2]
    factor = spec.scaling.attention_factor if isinstance(spec.scaling, YarnScaling) else 1.0
    return (torch.cat((angles.cos(), angles.sin()), dim=1) * factor).to(device)


def inverse_frequencies(spec: RotarySpec) -> Tensor:
    """Radians per position of each pair of dimensions, scaling included: [rotary_dim / 2] float32."""
    exponents = torch.arange(0, spec.rotary_dim, 2, dtype=torch.float32) / spec.rotary_dim
    plain = 1.0 / spec.theta**exponents
    match spec.scaling:
        case None:
            return plain
        case LinearScaling(factor):
            return plain / factor
        case DivisorScaling(divisors):
            return plain / torch.tensor(divisors, dtype=torch.float32)
        case Llama3Scaling():
            return _llama3(plain, spec.scaling)
        case YarnScaling():
            return _yarn(plain, spec.theta, spec.scaling)


def _llama3(plain: Tensor, scaling: Llama3Scaling) -> Tensor:
    turns = scaling.original_max_position * plain / (2 * math.pi)  # within the original length
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0, 1)
    return (1 - keep) * plain / scaling.factor + keep * plain


def _yarn(plain: Tensor, theta: float, scaling: YarnScaling) -> Tensor:
    dim = 2 * len(plain)

    def dimension_of(turns: float) -> float:
        """The dimension whose frequency turns this often within the original length."""
        return dim * math.log(scaling.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension_of(scaling.beta_fast), dimension_of(scaling.beta_slow)
    if scaling.is_truncated:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    interpolate = ((torch.arange(len(plain), dtype=torch.float32) - low) / width).clamp(0, 1)
    return interpolate * plain / scaling.factor + (1 - interpolate) * plain
