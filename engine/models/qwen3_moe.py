"""Qwen3 with experts (arXiv:2505.09388), in all layers or some of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shoal.engine.config import ModelConfig
from shoal.engine.models.config_fields import activation, count, moe, rotary
from shoal.engine.models.spec import DecoderSpec, Family, GatedMLPSpec, MoESpec


def _layer_windows(hf: Mapping[str, Any]) -> tuple[int | None, ...]:
    window = hf.get("sliding_window") if hf.get("use_sliding_window") else None
    return (window,) * count(hf, "num_hidden_layers")


def _mlp(hf: Mapping[str, Any], layer: int) -> GatedMLPSpec | MoESpec:
    is_sparse = (layer + 1) % hf.get("decoder_sparse_step", 1) == 0 and layer not in (hf.get("mlp_only_layers") or ())
    if not is_sparse:
        return GatedMLPSpec(count(hf, "intermediate_size"), activation(hf))
    return moe(hf, intermediate_size="moe_intermediate_size", is_renormalized=hf.get("norm_topk_prob", False))


def _spec(config: ModelConfig) -> DecoderSpec:
    hf = config.hf_config
    return DecoderSpec(
        mlp=tuple(_mlp(hf, layer) for layer in range(config.num_layers)),
        rotary=(rotary(config),) * config.num_layers,
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        query_scale=config.head_dim**-0.5,
        has_qkv_bias=hf.get("attention_bias", False),
        has_output_bias=hf.get("attention_bias", False),
        has_qk_norm=True,
        is_tied=hf.get("tie_word_embeddings", False),
    )


FAMILY = Family(_layer_windows, _spec)
