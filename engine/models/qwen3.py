"""Qwen3, dense (arXiv:2505.09388): norms on query and key heads instead of biases."""

from __future__ import annotations

from shoal.engine.config import ModelConfig
from shoal.engine.models.config_fields import activation, count, rotary
from shoal.engine.models.qwen2 import layer_windows
from shoal.engine.models.spec import DecoderSpec, Family, GatedMLPSpec, MoESpec


def spec_around(config: ModelConfig, mlp: tuple[GatedMLPSpec | MoESpec, ...]) -> DecoderSpec:
    """All but the feed-forward layers, which are given."""
    hf = config.hf_config
    return DecoderSpec(
        mlp=mlp,
        rotary=(rotary(config),) * config.num_layers,
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        query_scale=config.head_dim**-0.5,
        has_qkv_bias=hf.get("attention_bias", False),
        has_output_bias=hf.get("attention_bias", False),
        has_qk_norm=True,
        is_tied=hf.get("tie_word_embeddings", False),
    )


def _spec(config: ModelConfig) -> DecoderSpec:
    mlp = GatedMLPSpec(count(config.hf_config, "intermediate_size"), activation(config.hf_config))
    return spec_around(config, (mlp,) * config.num_layers)


FAMILY = Family(layer_windows, _spec)
