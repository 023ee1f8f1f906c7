"""Mixtral: Mistral with experts (Jiang et al. 2024, arXiv:2401.04088)."""

from __future__ import annotations

from shoal.engine.config import ModelConfig
from shoal.engine.models.config_fields import moe, rotary
from shoal.engine.models.mistral import layer_windows
from shoal.engine.models.spec import DecoderSpec, Family, LayerNames, WeightNames

_NAMES = WeightNames(
    layer=LayerNames(
        router="block_sparse_moe.gate",
        expert_gate="block_sparse_moe.experts.{expert}.w1",
        expert_up="block_sparse_moe.experts.{expert}.w3",
        expert_down="block_sparse_moe.experts.{expert}.w2",
    )
)


def _spec(config: ModelConfig) -> DecoderSpec:
    hf = config.hf_config
    mlp = moe(hf, intermediate_size="intermediate_size", is_renormalized=True)
    return DecoderSpec(
        mlp=(mlp,) * config.num_layers,
        rotary=(rotary(config, theta=1e6),) * config.num_layers,
        norm_eps=hf.get("rms_norm_eps", 1e-5),
        query_scale=config.head_dim**-0.5,
        is_tied=hf.get("tie_word_embeddings", False),
        names=_NAMES,
    )


FAMILY = Family(layer_windows, _spec)
