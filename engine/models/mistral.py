"""Mistral: Llama with one attention window for all layers (Jiang et al. 2023, arXiv:2310.06825)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shoal.engine.config import ModelConfig
from shoal.engine.models.config_fields import activation, count, rotary
from shoal.engine.models.spec import DecoderSpec, Family, GatedMLPSpec


def layer_windows(hf: Mapping[str, Any]) -> tuple[int | None, ...]:
    return (hf.get("sliding_window"),) * count(hf, "num_hidden_layers")


def _spec(config: ModelConfig) -> DecoderSpec:
    hf = config.hf_config
    mlp = GatedMLPSpec(count(hf, "intermediate_size"), activation(hf))
    return DecoderSpec(
        mlp=(mlp,) * config.num_layers,
        rotary=(rotary(config),) * config.num_layers,
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        query_scale=config.head_dim**-0.5,
        is_tied=hf.get("tie_word_embeddings", False),
    )


FAMILY = Family(layer_windows, _spec)
