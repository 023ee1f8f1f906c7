"""Reading config.json's fields that several families share: rotary embeddings and attention windows. No torch.

transformers 5 writes `rope_parameters`, one or one per layer type; before, it was `rope_theta` and `rope_scaling`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from shoal.engine.config import ConfigError, ModelConfig
from shoal.engine.layers.rotary_spec import (
    DivisorScaling,
    LinearScaling,
    Llama3Scaling,
    RotaryScaling,
    RotarySpec,
    YarnScaling,
)
from shoal.engine.models.spec import Activation, MoESpec

FULL, SLIDING = "full_attention", "sliding_attention"

_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


def count(hf: Mapping[str, Any], name: str) -> int:
    """A positive whole number that must be there. Raises ConfigError naming the field."""
    value = hf.get(name)
    if not isinstance(value, int) or value < 1:
        raise ConfigError(
            f"config.json has {name} = {value!r} where a positive whole number is needed: download the checkpoint's "
            "own config.json again"
        )
    return value


def activation(hf: Mapping[str, Any], name: str = "hidden_act", default: str = "silu") -> Activation:
    """The gate's activation. Raises ConfigError for one that no kernel computes."""
    value = hf.get(name) or default
    if value not in _ACTIVATIONS:
        raise ConfigError(f"{name} {value!r} is not supported: {', '.join(sorted(_ACTIVATIONS))} are")
    return _ACTIVATIONS[value]


def moe(hf: Mapping[str, Any], *, intermediate_size: str, is_renormalized: bool) -> MoESpec:
    """The experts of a layer; `intermediate_size` is the field with the size of each. Raises ConfigError."""
    # transformers 5 writes num_local_experts for all families; before, it was num_experts in Qwen's.
    num_experts = count(hf, "num_local_experts" if "num_local_experts" in hf else "num_experts")
    experts_per_token = count(hf, "num_experts_per_tok")
    if experts_per_token > num_experts:
        raise ConfigError(
            f"config.json has num_experts_per_tok = {experts_per_token} of {num_experts} experts: download the "
            "checkpoint's own config.json again"
        )
    return MoESpec(num_experts, experts_per_token, count(hf, intermediate_size), is_renormalized, activation(hf))


def layer_types(hf: Mapping[str, Any], default: Sequence[str]) -> Sequence[str]:
    """The attention type of each layer. Raises ConfigError for types that are not attention over known tokens."""
    types: Sequence[str] = hf.get("layer_types") or default
    for layer, kind in enumerate(types):
        if kind not in (FULL, SLIDING):
            raise ConfigError(f"layer {layer} is of type {kind!r}: only {FULL} and {SLIDING} layers are supported")
    if len(types) != count(hf, "num_hidden_layers"):
        raise ConfigError(f"config.json names {len(types)} layer_types for {hf['num_hidden_layers']} layers")
    return types


def windows(hf: Mapping[str, Any], types: Sequence[str], window: int | None) -> tuple[int | None, ...]:
    """`window` for the sliding layers (a token sees itself and the window - 1 before it), None for the others."""
    return tuple(window if kind == SLIDING else None for kind in types)


def rotary(config: ModelConfig, *, theta: float = 10_000.0, layer_type: str | None = None) -> RotarySpec:
    """The rotary embedding that config.json describes, for `layer_type` where it has one per type.

    `theta` is the family's default. Raises ConfigError for a scaling that is not supported.
    """
    hf = config.hf_config
    parameters: Mapping[str, Any] = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if layer_type is not None and layer_type in parameters:
        parameters = parameters[layer_type] or {}
    fraction = parameters.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0
    try:
        scaling = _scaling(parameters, config.max_position)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"config.json's rotary scaling lacks or mistypes a field ({error}): {parameters}") from error
    return RotarySpec(
        theta=float(parameters.get("rope_theta") or hf.get("rope_theta") or theta),
        rotary_dim=int(config.head_dim * fraction),
        scaling=scaling,
    )


def _scaling(parameters: Mapping[str, Any], max_position: int) -> RotaryScaling | None:
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    original = int(parameters.get("original_max_position_embeddings") or max_position)
    match kind:
        case "default":
            return None
        case "linear":
            return LinearScaling(factor=float(parameters["factor"]))
        case "divisors":
            return DivisorScaling(divisors=tuple(parameters["divisors"]))
        case "llama3":
            return Llama3Scaling(
                factor=float(parameters["factor"]),
                low_freq_factor=float(parameters["low_freq_factor"]),
                high_freq_factor=float(parameters["high_freq_factor"]),
                original_max_position=original,
            )
        case "yarn":
            factor = float(parameters.get("factor") or max_position / original)
            return YarnScaling(
                factor=factor,
                original_max_position=original,
                beta_fast=float(parameters.get("beta_fast") or 32),
                beta_slow=float(parameters.get("beta_slow") or 1),
                attention_factor=_yarn_attention_factor(parameters, factor),
                is_truncated=bool(parameters.get("truncate", True)),
            )
    raise ConfigError(f"rope_type {kind!r} is not supported: default, linear, llama3 and yarn are")


def _yarn_attention_factor(parameters: Mapping[str, Any], factor: float) -> float:
    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    given = parameters.get("attention_factor")
    if given is not None:
        return float(given)
    scale, scale_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return magnitude(scale) / magnitude(scale_all) if scale and scale_all else magnitude(1.0)
