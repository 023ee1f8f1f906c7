"""What a weight file says about one tensor, before any of its bytes are read. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class StoredTensor(NamedTuple):
    """One tensor as stored: shape in torch's order (rows first), bytes [offset, offset + num_bytes) of `file`."""

    file: Path
    dtype: str  # the format's own word: "BF16", "Q4_K", ...
    shape: tuple[int, ...]
    offset: int
    num_bytes: int
