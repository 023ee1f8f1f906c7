"""The header of a GGUF file: its metadata as plain values and a directory of its tensors. No torch.

Written here because `gguf.GGUFReader` keeps every string of a vocabulary as numpy views: opening a file with 49
thousand tokens took it 3.0 s, this 0.1 s. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal.engine.config import ConfigError
from shoal.engine.models.weights.stored import StoredTensor

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

_STRING, _ARRAY = 8, 9
_SCALARS: Mapping[int, str] = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A GGUF file's header: `metadata` by key (lists for arrays), `tensors` by GGUF name."""

    path: Path
    metadata: Mapping[str, Any] = field(repr=False)
    tensors: Mapping[str, StoredTensor] = field(repr=False)


def read_gguf_file(path: Path) -> GgufFile:
    """Read the header. Raises ConfigError if the file is not GGUF, split, truncated, or of an unknown tensor type."""
    if path.stat().st_size < 24:
        raise ConfigError(f"{path} is not a GGUF file: it has only {path.stat().st_size} bytes")
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != MAGIC:
            raise ConfigError(f"{path} is not a GGUF file: it starts with {data[:4]!r} instead of {MAGIC!r}")
        try:
            return _read(path, data)
        except (struct.error, IndexError, OverflowError, MemoryError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is truncated or damaged in its header ({error}): download it again") from error


def _read(path: Path, data: mmap.mmap) -> GgufFile:
    cursor = _Cursor(data)
    version = cursor.scalar("<I")
    if version not in VERSIONS:
        raise ConfigError(f"{path} is GGUF version {version}: versions 2 and 3, little-endian, can be read")
    num_tensors, num_keys = cursor.scalar("<Q"), cursor.scalar("<Q")
    metadata = {}
    for _ in range(num_keys):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.scalar("<I"))
    if metadata.get("split.count", 1) > 1:
        raise ConfigError(f"{path} is one part of {metadata['split.count']}: join them with llama-gguf-split --merge")

    entries = [_tensor_entry(path, cursor) for _ in range(num_tensors)]
    alignment = int(metadata.get("general.alignment", DEFAULT_ALIGNMENT))
    start = -(-cursor.position // alignment) * alignment
    tensors = {name: tensor._replace(offset=start + tensor.offset) for name, tensor in entries}
    needed = max((tensor.offset + tensor.num_bytes for tensor in tensors.values()), default=start)
    if needed > len(data):
        raise ConfigError(f"{path} is truncated ({len(data)} bytes of {needed}): download it again")
    return GgufFile(path=path, metadata=metadata, tensors=tensors)


def _tensor_entry(path: Path, cursor: _Cursor) -> tuple[str, StoredTensor]:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    name = cursor.string()
    shape = tuple(reversed([cursor.scalar("<Q") for _ in range(cursor.scalar("<I"))]))
    type_id, offset = cursor.scalar("<I"), cursor.scalar("<Q")
    try:
        kind = GGMLQuantizationType(type_id)
    except ValueError as error:
        raise ConfigError(f"{path} stores {name} in type {type_id}, which gguf does not know: {_WAY_OUT}") from error
    values_per_block, bytes_per_block = GGML_QUANT_SIZES[kind]
    num_bytes = math.prod(shape) // values_per_block * bytes_per_block
    return name, StoredTensor(file=path, dtype=kind.name, shape=shape, offset=offset, num_bytes=num_bytes)


_WAY_OUT = "update the gguf package, or use a file quantized to Q4_0..Q8_0, Q2_K..Q6_K, F16 or BF16"


class _Cursor:
    """Reads little-endian values one after the other, from behind the magic on."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.position = len(MAGIC)

    def scalar(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self._data, self.position)
        self.position += struct.calcsize(form)
        return value

    def string(self) -> str:
        length = self.scalar("<Q")
        end = self.position + length
        if end > len(self._data):
            raise IndexError(f"a string of {length} bytes at {self.position}")
        text = self._data[self.position : end].decode("utf-8")
        self.position = end
        return text

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise IndexError(f"value type {kind} at {self.position}")
        return self.scalar(_SCALARS[kind])

    def _array(self) -> list[Any]:
        kind, length = self.scalar("<I"), self.scalar("<Q")
        if length > len(self._data):
            raise IndexError(f"an array of {length} values at {self.position}")
        if kind not in _SCALARS:
            return [self.value(kind) for _ in range(length)]
        form = f"<{length}{_SCALARS[kind][1]}"
        values = list(struct.unpack_from(form, self._data, self.position))
        self.position += struct.calcsize(form)
        return values
