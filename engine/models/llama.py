"""Llama 2 and 3.x, and what is built like them (SmolLM2): the decoder without any difference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shoal.engine.config import ModelConfig
from shoal.engine.models.config_fields import activation, count, rotary
from shoal.engine.models.spec import DecoderSpec, Family, GatedMLPSpec


def _layer_windows(hf: Mapping[str, Any]) -> tuple[int | None, ...]:
    return (None,) * count(hf, "num_hidden_layers")


def _spec(config: ModelConfig) -> DecoderSpec:
    hf = config.hf_config
    mlp = GatedMLPSpec(count(hf, "intermediate_size"), activation(hf), has_bias=hf.get("mlp_bias", False))
    return DecoderSpec(
        mlp=(mlp,) * config.num_layers,
        rotary=(rotary(config),) * config.num_layers,
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        query_scale=config.head_dim**-0.5,
        has_qkv_bias=hf.get("attention_bias", False),
        has_output_bias=hf.get("attention_bias", False),
        is_tied=hf.get("tie_word_embeddings", False),
    )


FAMILY = Family(_layer_windows, _spec)
