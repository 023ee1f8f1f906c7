"""What a directory of safetensors files holds, from their headers alone. No torch.

Format: 8 bytes little-endian header length, the header as JSON, then the data that it points into
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoal.engine.config import ConfigError
from shoal.engine.models.weights.stored import StoredTensor

INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit


def read_safetensors_index(directory: Path) -> Mapping[str, StoredTensor]:
    """Every tensor of a checkpoint directory by name.

    Reads the shards that the index names, or all *.safetensors without one. Raises ConfigError for no weights, a
    missing shard, a tensor that its shard lacks, and a truncated or malformed file.
    """
    index_path = directory / INDEX_NAME
    if not index_path.is_file():
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise ConfigError(_no_weights(directory))
        return {name: tensor for file in files for name, tensor in read_safetensors_header(file).items()}

    weight_map = _weight_map(index_path)
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(weight_map.values())):
        file = directory / shard
        if not file.is_file():
            raise ConfigError(f"{file} is missing, though {INDEX_NAME} names it: download the checkpoint again")
        tensors |= read_safetensors_header(file)
    lost = [name for name, shard in weight_map.items() if name not in tensors or tensors[name].file.name != shard]
    if lost:
        raise ConfigError(f"{index_path} places tensors where they are not, such as {lost[0]}: download it again")
    return tensors


def read_safetensors_header(file: Path) -> Mapping[str, StoredTensor]:
    """The tensors of one file by name. Raises ConfigError if the file is truncated or is not safetensors."""
    file_bytes = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise ConfigError(_truncated(file, f"{file_bytes} bytes"))
        (header_bytes,) = struct.unpack("<Q", prefix)
        if header_bytes > MAX_HEADER_BYTES:
            raise ConfigError(f"{file} is not a safetensors file: its header claims {header_bytes} bytes")
        if 8 + header_bytes > file_bytes:
            raise ConfigError(_truncated(file, f"{file_bytes} bytes, its header alone needs {8 + header_bytes}"))
        raw = stream.read(header_bytes)
    data_start = 8 + header_bytes
    try:
        entries: dict[str, Any] = json.loads(raw)
        entries.pop("__metadata__", None)
        tensors = {name: _stored(file, data_start, entry) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file} is not a safetensors file: its header cannot be read ({error})") from error
    needed = max((tensor.offset + tensor.num_bytes for tensor in tensors.values()), default=data_start)
    if needed > file_bytes:
        raise ConfigError(_truncated(file, f"{file_bytes} bytes of {needed}"))
    return tensors


def _stored(file: Path, data_start: int, entry: Mapping[str, Any]) -> StoredTensor:
    start, end = entry["data_offsets"]
    return StoredTensor(
        file=file,
        dtype=str(entry["dtype"]),
        shape=tuple(int(size) for size in entry["shape"]),
        offset=data_start + int(start),
        num_bytes=int(end) - int(start),
    )


def _weight_map(index_path: Path) -> Mapping[str, str]:
    try:
        weight_map = json.loads(index_path.read_bytes())["weight_map"]
        return {str(name): str(shard) for name, shard in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{index_path} cannot be read as an index of shards ({error}): download it again") from error


def _truncated(file: Path, found: str) -> str:
    return f"{file} is truncated ({found}): download it again"


def _no_weights(directory: Path) -> str:
    if any(directory.glob("*.bin")):
        return (
            f"{directory} holds only pickled weights (*.bin), which run code when loaded: convert them with "
            "transformers' save_pretrained, which writes safetensors"
        )
    return f"{directory} holds no *.safetensors files: download the weights beside config.json"
