"""Qwen2 and Qwen2.5 (arXiv:2407.10671): biases on q, k and v; windows from some layer on, where switched on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shoal.engine.config import ModelConfig
from shoal.engine.models.config_fields import FULL, SLIDING, activation, count, layer_types, rotary, windows
from shoal.engine.models.spec import DecoderSpec, Family, GatedMLPSpec


def layer_windows(hf: Mapping[str, Any]) -> tuple[int | None, ...]:
    window = hf.get("sliding_window") if hf.get("use_sliding_window") else None
    num_layers = count(hf, "num_hidden_layers")
    first_sliding = hf.get("max_window_layers", 28)
    default = [SLIDING if layer >= first_sliding else FULL for layer in range(num_layers)]
    return windows(hf, layer_types(hf, default), window)


def _spec(config: ModelConfig) -> DecoderSpec:
    hf = config.hf_config
    mlp = GatedMLPSpec(count(hf, "intermediate_size"), activation(hf))
    return DecoderSpec(
        mlp=(mlp,) * config.num_layers,
        rotary=(rotary(config),) * config.num_layers,
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        query_scale=config.head_dim**-0.5,
        has_qkv_bias=True,
        is_tied=hf.get("tie_word_embeddings", False),
    )


FAMILY = Family(layer_windows, _spec)
