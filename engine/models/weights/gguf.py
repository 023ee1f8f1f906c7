"""Weights from a GGUF file under Hugging Face's names: memory-mapped, dequantized tensor by tensor or not at all."""

from __future__ import annotations

import functools
import mmap
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from torch import Tensor

from shoal.engine.config import ConfigError
from shoal.engine.models.weights.gguf_file import GgufFile
from shoal.engine.models.weights.gguf_names import GEMMA_ARCHITECTURES, hugging_face_tensors
from shoal.engine.models.weights.stored import StoredTensor
from shoal.kernels.dispatch import QuantizedType

# Architectures whose q and k rows the GGUF converter interleaves for llama.cpp's pairwise rotary embedding.
_INTERLEAVED = frozenset({"llama", "smollm3"})


class GgufSource:
    """The weights of a GGUF file. Raises ConfigError naming the first tensor of a type that cannot be dequantized."""

    def __init__(self, file: GgufFile) -> None:
        self._architecture = str(file.metadata["general.architecture"])
        heads = int(file.metadata[f"{self._architecture}.attention.head_count"])
        kv_heads = int(file.metadata.get(f"{self._architecture}.attention.head_count_kv", heads))
        self._head_counts = {"q_proj": heads, "k_proj": kv_heads}
        self.tensors: Mapping[str, StoredTensor] = hugging_face_tensors(file)
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
        values = torch.from_numpy(quants.dequantize(self._stored_rows(name, rows), GGMLQuantizationType[stored.dtype]))
        if len(stored.shape) == 1 and rows is not None:
            values = values[rows.start : rows.stop]
        if self._architecture in GEMMA_ARCHITECTURES and name.endswith("norm.weight"):
            values = values - 1.0
        if self._architecture in _INTERLEAVED:
            values = self._undo_interleaving(name, values, stored.shape[0])
        return values if columns is None else values[:, columns.start : columns.stop]

    def read_blocks(
        self, name: str, kind: QuantizedType, rows: range | None = None, columns: range | None = None
    ) -> Tensor:
        """Blocks of `kind` as in QuantizedWeight: as stored where the file has such ones, otherwise quantized again.

        `columns` are whole blocks of 32 in number, and also where they start if they are not to be quantized again.
        """
        stored = self.tensors[name]
        width, num_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        if stored.dtype != kind or (columns is not None and columns.start % width):
            values = self.read(name, rows, columns).contiguous()
            return torch.from_numpy(quants.quantize(values.numpy(), GGMLQuantizationType[kind]))
        blocks = torch.from_numpy(self._stored_rows(name, rows))
        if self._architecture in _INTERLEAVED:
            blocks = self._undo_interleaving(name, blocks, stored.shape[0])
        if columns is None:
            return blocks
        return blocks[:, columns.start // width * num_bytes : columns.stop // width * num_bytes]

    def _stored_rows(self, name: str, rows: range | None) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        """The bytes of a tensor: all of a vector, [rows, bytes of a row] of a matrix."""
        stored = self.tensors[name]
        raw = self._bytes[stored.offset : stored.offset + stored.num_bytes]
        if len(stored.shape) == 1:
            return raw
        matrix = raw.reshape(stored.shape[0], -1)
        return matrix if rows is None else matrix[rows.start : rows.stop]

    def _undo_interleaving(self, name: str, values: Tensor, num_rows: int) -> Tensor:
        """Row pairs (2i, 2i+1) of each q or k head back to (i, i + head_dim/2); whole heads only."""
        head_count = self._head_counts.get(name.split(".")[-2])
        if head_count is None:
            return values
        half = num_rows // head_count // 2
        return values.view(-1, half, 2, *values.shape[1:]).transpose(1, 2).flatten(0, 2)


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
