"""What lies at a path, from its headers alone: a Hugging Face directory or a GGUF file. No torch."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from shoal.engine.config import ConfigError, DTypeName
from shoal.engine.gguf_header import end_of_text_ids
from shoal.engine.models.gguf_config import hugging_face_fields
from shoal.engine.models.weights.gguf_file import GgufFile, read_gguf_file
from shoal.engine.models.weights.safetensors_index import read_safetensors_index
from shoal.engine.models.weights.stored import StoredTensor

_PLAIN_DTYPES: Mapping[str, DTypeName] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One model as stored. `fields` are config.json's, whatever the format; `tensors` have the file's own names."""

    path: Path
    architecture: str
    fields: Mapping[str, Any] = field(repr=False)
    tensors: Mapping[str, StoredTensor] = field(repr=False)
    eos_token_ids: tuple[int, ...]
    gguf: GgufFile | None = field(default=None, repr=False)

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def stored_dtype(self) -> DTypeName | Literal["quantized"]:
        """What most bytes are stored as."""
        sizes: Counter[str] = Counter()
        for tensor in self.tensors.values():
            sizes[tensor.dtype] += tensor.num_bytes
        return _PLAIN_DTYPES.get(sizes.most_common(1)[0][0], "quantized")


def read_checkpoint(path: Path) -> Checkpoint:
    """Raises ConfigError saying what is missing, damaged or not supported, and what to change."""
    if path.is_dir():
        return _read_directory(path)
    if path.is_file():
        return _read_gguf(path)
    raise ConfigError(f"{path} does not exist: give a directory with config.json and *.safetensors, or a .gguf file")


def _read_directory(directory: Path) -> Checkpoint:
    config_path = directory / "config.json"
    if not config_path.is_file():
        raise ConfigError(f"{directory} holds no config.json: give a Hugging Face model directory or a .gguf file")
    fields = _read_json(config_path)
    architectures = fields.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise ConfigError(f'{config_path} lacks "architectures": download the checkpoint\'s own config.json again')
    if "quantization_config" in fields:
        method = fields["quantization_config"].get("quant_method", "an unnamed method")
        raise ConfigError(f"{directory} is quantized by {method}: use its unquantized weights or a GGUF file")
    tensors = read_safetensors_index(directory)
    if not tensors:
        raise ConfigError(f"{directory} holds no tensors: download the weights again")
    packed = [name for name, tensor in tensors.items() if tensor.dtype not in _PLAIN_DTYPES]
    if packed:
        raise ConfigError(
            f"{directory} stores {packed[0]} as {tensors[packed[0]].dtype}: safetensors are read in F32, BF16 and F16"
        )
    generation_path = directory / "generation_config.json"
    generation = _read_json(generation_path) if generation_path.is_file() else {}
    eos = _token_ids(fields.get("eos_token_id")) | _token_ids(generation.get("eos_token_id"))
    return Checkpoint(
        path=directory,
        architecture=str(architectures[0]),
        fields=fields,
        tensors=tensors,
        eos_token_ids=tuple(sorted(eos)),
    )


def _read_gguf(path: Path) -> Checkpoint:
    file = read_gguf_file(path)
    architecture, fields = hugging_face_fields(file)
    return Checkpoint(
        path=path,
        architecture=architecture,
        fields=fields,
        tensors=file.tensors,
        eos_token_ids=end_of_text_ids(file.metadata),
        gguf=file,
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path} is not readable JSON ({error}): download it again") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is not a JSON object: download it again")
    return value


def _token_ids(value: int | list[int] | None) -> set[int]:
    if value is None:
        return set()
    return set(value) if isinstance(value, list) else {value}
