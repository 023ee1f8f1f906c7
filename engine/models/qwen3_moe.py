"""Qwen3 with experts (arXiv:2505.09388), in all layers or some of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shoal.engine.config import ModelConfig
from shoal.engine.models.config_fields import activation, count, moe
from shoal.engine.models.qwen3 import spec_around
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
    return spec_around(config, tuple(_mlp(config.hf_config, layer) for layer in range(config.num_layers)))


FAMILY = Family(_layer_windows, _spec)
