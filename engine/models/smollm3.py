"""SmolLM3: Llama that leaves the position embedding out in every fourth layer (NoPE, arXiv:2501.18795)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shoal.engine.config import ModelConfig
from shoal.engine.models.config_fields import FULL, SLIDING, activation, count, layer_types, rotary, windows
from shoal.engine.models.spec import DecoderSpec, Family, GatedMLPSpec


def _layer_windows(hf: Mapping[str, Any]) -> tuple[int | None, ...]:
    window = hf.get("sliding_window") if hf.get("use_sliding_window") else None
    default = [FULL if has_rotary else SLIDING for has_rotary in _has_rotary(hf)]
    return windows(hf, layer_types(hf, default), window)


def _spec(config: ModelConfig) -> DecoderSpec:
    hf = config.hf_config
    embedding = rotary(config, theta=2_000_000.0)
    mlp = GatedMLPSpec(count(hf, "intermediate_size"), activation(hf), has_bias=hf.get("mlp_bias", False))
    return DecoderSpec(
        mlp=(mlp,) * config.num_layers,
        rotary=tuple(embedding if has_rotary else None for has_rotary in _has_rotary(hf)),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        query_scale=config.head_dim**-0.5,
        has_qkv_bias=hf.get("attention_bias", False),
        has_output_bias=hf.get("attention_bias", False),
        is_tied=hf.get("tie_word_embeddings", True),
    )


def _has_rotary(hf: Mapping[str, Any]) -> Sequence[int]:
    """1 for layers with rotary embedding; config.json calls the list, despite that, no_rope_layers."""
    interval = hf.get("no_rope_layer_interval") or 4
    default = [int((layer + 1) % interval != 0) for layer in range(count(hf, "num_hidden_layers"))]
    return hf.get("no_rope_layers") or default


FAMILY = Family(_layer_windows, _spec)
