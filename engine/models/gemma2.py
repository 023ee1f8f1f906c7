"""Gemma 2 (arXiv:2408.00118): soft-caps, norms on both sides of each part, windows in every other layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shoal.engine.config import ModelConfig
from shoal.engine.models.config_fields import FULL, SLIDING, activation, count, layer_types, rotary, windows
from shoal.engine.models.spec import DecoderSpec, Family, GatedMLPSpec, LayerNames, WeightNames

GEMMA_NAMES = WeightNames(
    layer=LayerNames(
        attention_post_norm="post_attention_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        mlp_post_norm="post_feedforward_layernorm",
    )
)


def _layer_windows(hf: Mapping[str, Any]) -> tuple[int | None, ...]:
    default = [FULL if layer % 2 else SLIDING for layer in range(count(hf, "num_hidden_layers"))]
    return windows(hf, layer_types(hf, default), hf.get("sliding_window", 4096))


def _spec(config: ModelConfig) -> DecoderSpec:
    hf = config.hf_config
    mlp = GatedMLPSpec(count(hf, "intermediate_size"), activation(hf, "hidden_activation", "gelu_pytorch_tanh"))
    return DecoderSpec(
        mlp=(mlp,) * config.num_layers,
        rotary=(rotary(config),) * config.num_layers,
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        query_scale=hf.get("query_pre_attn_scalar", 256) ** -0.5,
        norm_offset=1.0,
        has_qkv_bias=hf.get("attention_bias", False),
        has_output_bias=hf.get("attention_bias", False),
        attention_softcap=hf.get("attn_logit_softcapping", 50.0),
        final_softcap=hf.get("final_logit_softcapping", 30.0),
        embedding_scale=config.hidden_size**0.5,
        is_tied=hf.get("tie_word_embeddings", True),
        names=GEMMA_NAMES,
    )


FAMILY = Family(_layer_windows, _spec)
