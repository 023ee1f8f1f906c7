"""A GGUF file's tensors under Hugging Face's names. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from shoal.engine.models.weights.gguf_file import GgufFile
from shoal.engine.models.weights.stored import StoredTensor

_WHOLE_NAMES: Mapping[str, str] = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES: Mapping[str, str] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_LAYER_NAMES: Mapping[str, str] = {
    **_LAYER_NAMES,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# By architecture. Matrices of experts are merged, expert by expert.
_EXPERT_NAMES: Mapping[str, Mapping[str, str]] = {
    "llama": {
        "ffn_gate_inp": "block_sparse_moe.gate",
        "ffn_gate_exps": "block_sparse_moe.experts.{expert}.w1",
        "ffn_up_exps": "block_sparse_moe.experts.{expert}.w3",
        "ffn_down_exps": "block_sparse_moe.experts.{expert}.w2",
    },
    "qwen3moe": {
        "ffn_gate_inp": "mlp.gate",
        "ffn_gate_exps": "mlp.experts.{expert}.gate_proj",
        "ffn_up_exps": "mlp.experts.{expert}.up_proj",
        "ffn_down_exps": "mlp.experts.{expert}.down_proj",
    },
}
_LAYER_PATTERN = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_IN_METADATA_ONLY = frozenset({"rope_freqs.weight"})  # belongs to the rotary configuration
# Architectures whose norm weights the GGUF converter stores with Gemma's 1 added; they have norms behind layers too.
GEMMA_ARCHITECTURES = frozenset({"gemma2", "gemma3"})


def hugging_face_tensors(file: GgufFile) -> dict[str, StoredTensor]:
    """All weights by name; a matrix for each expert, though they are stored as one tensor."""
    architecture = str(file.metadata["general.architecture"])
    return dict(
        part
        for name, tensor in file.tensors.items()
        if name not in _IN_METADATA_ONLY
        for part in _experts_apart(_hugging_face_name(architecture, name), tensor)
    )


def _hugging_face_name(architecture: str, name: str) -> str:
    if name in _WHOLE_NAMES:
        return _WHOLE_NAMES[name]
    match = _LAYER_PATTERN.fullmatch(name)
    names = _GEMMA_LAYER_NAMES if architecture in GEMMA_ARCHITECTURES else _LAYER_NAMES
    layer_names = {**names, **_EXPERT_NAMES.get(architecture, {})}
    if match is None or match[2] not in layer_names:
        return name  # reported as superfluous by whoever compares names
    return f"model.layers.{match[1]}.{layer_names[match[2]]}.{match[3]}"


def _experts_apart(name: str, tensor: StoredTensor) -> Iterator[tuple[str, StoredTensor]]:
    """A tensor under its name, or the matrix of each expert where `name` stands for all of them."""
    if "{expert}" not in name:
        yield name, tensor
        return
    num_experts, *shape = tensor.shape
    num_bytes = tensor.num_bytes // num_experts
    for expert in range(num_experts):
        part = tensor._replace(shape=tuple(shape), offset=tensor.offset + expert * num_bytes, num_bytes=num_bytes)
        yield name.replace("{expert}", str(expert)), part
