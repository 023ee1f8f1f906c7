"""Gemma 3, text (arXiv:2503.19786): five windowed layers to one full, each kind with its own rotary base, q/k norms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shoal.engine.config import ModelConfig
from shoal.engine.layers.rotary_spec import RotarySpec
from shoal.engine.models.config_fields import FULL, SLIDING, activation, count, layer_types, rotary, windows
from shoal.engine.models.gemma2 import GEMMA_NAMES
from shoal.engine.models.spec import DecoderSpec, Family, GatedMLPSpec


def _layer_windows(hf: Mapping[str, Any]) -> tuple[int | None, ...]:
    return windows(hf, _layer_types(hf), hf.get("sliding_window", 4096))


def _spec(config: ModelConfig) -> DecoderSpec:
    hf = config.hf_config
    by_type = {FULL: rotary(config, theta=1_000_000.0, layer_type=FULL), SLIDING: _local_rotary(config)}
    mlp = GatedMLPSpec(count(hf, "intermediate_size"), activation(hf, "hidden_activation", "gelu_pytorch_tanh"))
    return DecoderSpec(
        mlp=(mlp,) * config.num_layers,
        rotary=tuple(by_type[kind] for kind in _layer_types(hf)),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        query_scale=hf.get("query_pre_attn_scalar", 256) ** -0.5,
        norm_offset=1.0,
        has_qkv_bias=hf.get("attention_bias", False),
        has_output_bias=hf.get("attention_bias", False),
        has_qk_norm=True,
        attention_softcap=hf.get("attn_logit_softcapping"),
        final_softcap=hf.get("final_logit_softcapping"),
        embedding_scale=config.hidden_size**0.5,
        is_tied=hf.get("tie_word_embeddings", True),
        names=GEMMA_NAMES,
    )


def _layer_types(hf: Mapping[str, Any]) -> Sequence[str]:
    pattern = hf.get("sliding_window_pattern") or hf.get("_sliding_window_pattern") or 6
    default = [SLIDING if (layer + 1) % pattern else FULL for layer in range(count(hf, "num_hidden_layers"))]
    return layer_types(hf, default)


def _local_rotary(config: ModelConfig) -> RotarySpec:
    """Windowed layers keep the short base and are never scaled."""
    if SLIDING in (config.hf_config.get("rope_parameters") or {}):
        return rotary(config, layer_type=SLIDING)
    return RotarySpec(float(config.hf_config.get("rope_local_base_freq", 10_000.0)), config.head_dim)


FAMILY = Family(_layer_windows, _spec)
