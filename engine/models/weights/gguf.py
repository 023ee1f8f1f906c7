"""Weights from a GGUF file: memory-mapped and dequantized tensor by tensor, under Hugging Face's names."""

from __future__ import annotations

import functools
import mmap
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from torch import Tensor

from shoal.engine.config import ConfigError
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

# Architectures whose q and k rows the GGUF converter interleaves for llama.cpp's pairwise rotary embedding.
_INTERLEAVED = frozenset({"llama", "smollm3"})
# Architectures whose norm weights the GGUF converter stores with Gemma's 1 added.
_ONE_ADDED = frozenset({"gemma2", "gemma3"})


class GgufSource:
    """The weights of a GGUF file. Raises ConfigError naming the first tensor of a type that cannot be dequantized."""

    def __init__(self, file: GgufFile) -> None:
        self._architecture = str(file.metadata["general.architecture"])
        heads = int(file.metadata[f"{self._architecture}.attention.head_count"])
        kv_heads = int(file.metadata.get(f"{self._architecture}.attention.head_count_kv", heads))
        self._head_counts = {"q_proj": heads, "k_proj": kv_heads}
        self.tensors: Mapping[str, StoredTensor] = dict(
            part
            for name, tensor in file.tensors.items()
            if name not in _IN_METADATA_ONLY
            for part in _experts_apart(self._hugging_face_name(name), tensor)
        )
        self._bytes = _map(file.path)
        for name, tensor in self.tensors.items():
            if not _can_dequantize(tensor.dtype):
                raise ConfigError(
                    f"{file.path} stores {name} as {tensor.dtype}, which cannot be dequantized: use a file quantized "
                    "to Q4_0..Q8_0, Q2_K..Q6_K, F16 or BF16"
                )

    def read(self, name: str, rows: range | None = None, columns: range | None = None) -> Tensor:
        """Dequantized to float32 (a view of the file where it stores float32)."""
        stored = self.tensors[name]
        kind = GGMLQuantizationType[stored.dtype]
        raw = self._bytes[stored.offset : stored.offset + stored.num_bytes]
        if len(stored.shape) > 1:
            raw = raw.reshape(stored.shape[0], -1)
            if rows is not None:
                raw = raw[rows.start : rows.stop]
        values = torch.from_numpy(quants.dequantize(raw, kind))
        if len(stored.shape) == 1 and rows is not None:
            values = values[rows.start : rows.stop]
        if self._architecture in _ONE_ADDED and name.endswith("norm.weight"):
            values = values - 1.0
        if self._architecture in _INTERLEAVED:
            values = self._undo_interleaving(name, values, stored.shape[0])
        return values if columns is None else values[:, columns.start : columns.stop]

    def _undo_interleaving(self, name: str, values: Tensor, num_rows: int) -> Tensor:
        """Row pairs (2i, 2i+1) of each q or k head back to (i, i + head_dim/2); whole heads only."""
        head_count = self._head_counts.get(name.split(".")[-2])
        if head_count is None:
            return values
        half = num_rows // head_count // 2
        return values.view(-1, half, 2, *values.shape[1:]).transpose(1, 2).flatten(0, 2)

    def _hugging_face_name(self, name: str) -> str:
        if name in _WHOLE_NAMES:
            return _WHOLE_NAMES[name]
        match = _LAYER_PATTERN.fullmatch(name)
        names = _GEMMA_LAYER_NAMES if self._architecture in _ONE_ADDED else _LAYER_NAMES
        layer_names = {**names, **_EXPERT_NAMES.get(self._architecture, {})}
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


def _map(path: Path) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    with path.open("rb") as stream:
        # ACCESS_COPY: torch warns about arrays that it could not write to.
        return np.frombuffer(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY), dtype=np.uint8)


@functools.cache
def _can_dequantize(dtype: str) -> bool:
    kind = GGMLQuantizationType[dtype]
    try:
        quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
    except NotImplementedError:
        return False
    return True
