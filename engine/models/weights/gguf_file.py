"""A GGUF file as a directory of tensors. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal.engine.config import ConfigError
from shoal.engine.gguf_header import GgufCursor, open_gguf_header
from shoal.engine.models.weights.stored import StoredTensor

DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A GGUF file's header: `metadata` by key (lists for arrays), `tensors` by GGUF name."""

    path: Path
    metadata: Mapping[str, Any] = field(repr=False)
    tensors: Mapping[str, StoredTensor] = field(repr=False)


def read_gguf_file(path: Path) -> GgufFile:
    """Read the header. Raises ConfigError if the file is not GGUF, split, truncated, or of an unknown tensor type."""
    with open_gguf_header(path) as (metadata, num_tensors, cursor):
        if metadata.get("split.count", 1) > 1:
            raise ConfigError(
                f"{path} is one part of {metadata['split.count']}: join them with llama-gguf-split --merge"
            )
        entries = [_tensor_entry(path, cursor) for _ in range(num_tensors)]
        alignment = int(metadata.get("general.alignment", DEFAULT_ALIGNMENT))
        start = -(-cursor.position // alignment) * alignment
        tensors = {name: tensor._replace(offset=start + tensor.offset) for name, tensor in entries}
        needed = max((tensor.offset + tensor.num_bytes for tensor in tensors.values()), default=start)
        if needed > len(cursor.data):
            raise ConfigError(f"{path} is truncated ({len(cursor.data)} bytes of {needed}): download it again")
        return GgufFile(path=path, metadata=metadata, tensors=tensors)


def _tensor_entry(path: Path, cursor: GgufCursor) -> tuple[str, StoredTensor]:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    name = cursor.string()
    shape = tuple(reversed([cursor.scalar("Q") for _ in range(cursor.scalar("I"))]))
    type_id, offset = cursor.scalar("I"), cursor.scalar("Q")
    try:
        kind = GGMLQuantizationType(type_id)
    except ValueError as error:
        raise ConfigError(f"{path} stores {name} in type {type_id}, which gguf does not know: {_WAY_OUT}") from error
    values_per_block, bytes_per_block = GGML_QUANT_SIZES[kind]
    num_bytes = math.prod(shape) // values_per_block * bytes_per_block
    return name, StoredTensor(file=path, dtype=kind.name, shape=shape, offset=offset, num_bytes=num_bytes)


_WAY_OUT = "update the gguf package, or use a file quantized to Q4_0..Q8_0, Q2_K..Q6_K, F16 or BF16"
