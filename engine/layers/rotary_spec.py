"""Which rotary embedding a layer uses, as plain values. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """All frequencies divided by `factor` (position interpolation, Chen et al. 2023, arXiv:2306.15595)."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Low frequencies divided by `factor`, high ones kept, those between blended (Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """Frequencies blended by how often they turn within the original length (Peng et al. 2023, arXiv:2309.00071)."""

    factor: float
    original_max_position: int
    beta_fast: float
    beta_slow: float
    attention_factor: float  # multiplies cosines and sines
    is_truncated: bool  # correction dimensions rounded to whole ones


@dataclass(frozen=True, slots=True)
class DivisorScaling:
    """One divisor per frequency, as GGUF files store Llama 3's scaling."""

    divisors: tuple[float, ...]


RotaryScaling = LinearScaling | Llama3Scaling | YarnScaling | DivisorScaling


@dataclass(frozen=True, slots=True)
class RotarySpec:
    """Rotary embedding (Su et al. 2021, arXiv:2104.09864) of the first `rotary_dim` dimensions of each head."""

    theta: float
    rotary_dim: int
    scaling: RotaryScaling | None = None
