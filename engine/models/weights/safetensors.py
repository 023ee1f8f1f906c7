"""Weights from safetensors files: memory-mapped, so that only the slices asked for are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from shoal.engine.models.weights.safetensors_index import read_safetensors_index
from shoal.engine.models.weights.stored import StoredTensor


class SafetensorsSource:
    """The weights of a Hugging Face directory. Raises ConfigError as `read_safetensors_index` does."""

    def __init__(self, directory: Path) -> None:
        self.tensors: Mapping[str, StoredTensor] = read_safetensors_index(directory)
        self._files: dict[Path, Any] = {}

    def read(self, name: str, rows: range | None = None, columns: range | None = None) -> Tensor:
        stored = self.tensors[name]
        if stored.file not in self._files:
            self._files[stored.file] = safe_open(str(stored.file), framework="pt")
        whole = self._files[stored.file].get_slice(name)
        if columns is not None and len(columns) < stored.shape[1]:
            rows = rows if rows is not None else range(stored.shape[0])
            part: Tensor = whole[rows.start : rows.stop, columns.start : columns.stop]
        elif rows is not None and len(rows) < stored.shape[0]:
            part = whole[rows.start : rows.stop]
        else:
            part = whole[:]
        return part
