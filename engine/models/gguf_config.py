"""GGUF metadata in config.json's words. No torch.

What llama.cpp knows by heart and no file says (window patterns, NoPE layers) is the families' own default.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

from shoal.engine.config import ConfigError
from shoal.engine.models.weights.gguf_file import GgufFile

ARCHITECTURES: Mapping[str, str] = {
    "llama": "LlamaForCausalLM",  # Mistral and SmolLM2 too
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3moe": "Qwen3MoeForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}
_WITH_EXPERTS: Mapping[str, str] = {"llama": "MixtralForCausalLM", "qwen3moe": "Qwen3MoeForCausalLM"}
_FIELDS: Mapping[str, str] = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_weights_norm": "norm_topk_prob",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
}
_REQUIRED = (
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)  # fmt: skip
# Gemma's 27B models scale queries by hidden_size / heads instead of head_dim; layers by which llama.cpp knows them.
_GEMMA_27B_LAYERS: Mapping[str, int] = {"gemma2": 46, "gemma3": 62}


def hugging_face_fields(file: GgufFile) -> tuple[str, Mapping[str, Any]]:
    """The architecture's Hugging Face name and config.json's fields.

    Raises ConfigError for an architecture that has no family here, with experts too, and for missing metadata.
    """
    kind = str(file.metadata.get("general.architecture"))
    if kind not in ARCHITECTURES:
        raise ConfigError(
            f"{file.path} is of architecture {kind!r}; from GGUF files these can be served: "
            f"{', '.join(ARCHITECTURES)}. Use the model's Hugging Face directory instead"
        )
    metadata = {key.removeprefix(f"{kind}."): value for key, value in file.metadata.items()}
    lost = [f"{kind}.{key}" for key in _REQUIRED if key not in metadata]
    lost += [name for name in ("token_embd.weight", "blk.0.attn_q.weight") if name not in file.tensors]
    if lost:
        raise ConfigError(f"{file.path} lacks {', '.join(lost)}: convert the model to GGUF again")
    has_experts = bool(metadata.get("expert_count"))
    if has_experts and kind not in _WITH_EXPERTS:
        raise ConfigError(
            f"{file.path} is a mixture of experts of architecture {kind!r}: with experts, {', '.join(_WITH_EXPERTS)} "
            "can be served"
        )
    varying = [key for key in _FIELDS if isinstance(metadata.get(key), list)]
    if varying:
        raise ConfigError(f"{file.path} varies {kind}.{varying[0]} over its layers, which is not supported")

    fields = {name: metadata[key] for key, name in _FIELDS.items() if key in metadata}
    fields["vocab_size"] = file.tensors["token_embd.weight"].shape[0]
    fields["tie_word_embeddings"] = "output.weight" not in file.tensors
    fields["attention_bias"] = kind != "qwen2" and "blk.0.attn_q.bias" in file.tensors
    fields["mlp_bias"] = "blk.0.ffn_up.bias" in file.tensors
    scaling = _rope_scaling(file, metadata)
    if scaling is not None:
        fields["rope_scaling"] = scaling
    if kind in _GEMMA_27B_LAYERS:
        head_dim = fields.setdefault("head_dim", 256)
        is_27b = fields["num_hidden_layers"] == _GEMMA_27B_LAYERS[kind]
        fields["query_pre_attn_scalar"] = fields["hidden_size"] / fields["num_attention_heads"] if is_27b else head_dim
    if has_experts:
        fields.setdefault("norm_topk_prob", True)  # as llama.cpp computes them
        return _WITH_EXPERTS[kind], fields
    is_mistral = kind == "llama" and "sliding_window" in fields
    return "MistralForCausalLM" if is_mistral else ARCHITECTURES[kind], fields


def _rope_scaling(file: GgufFile, metadata: Mapping[str, Any]) -> Mapping[str, Any] | None:
    divisors = file.tensors.get("rope_freqs.weight")
    if divisors is not None:
        if divisors.dtype != "F32":
            raise ConfigError(f"{file.path} stores rope_freqs.weight as {divisors.dtype}: F32 is expected")
        with file.path.open("rb") as stream:
            stream.seek(divisors.offset)
            values = struct.unpack(f"<{divisors.shape[0]}f", stream.read(divisors.num_bytes))
        return {"rope_type": "divisors", "divisors": values}
    kind = metadata.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    scaling = {"rope_type": kind, "factor": metadata.get("rope.scaling.factor", 1.0)}
    if "rope.scaling.original_context_length" in metadata:
        scaling["original_max_position_embeddings"] = metadata["rope.scaling.original_context_length"]
    return scaling
