"""Which weights stay quantized in memory, and in how many bytes. No torch, so sizes of blocks stand here as well as in
kernels/torch_ops/quantized.py.

Q8_0, Q4_0 and Q4_1 are kept as they are stored. What is stored in another quantized type, or read by one product with
weights of another type (q, k and v; gate and up), is quantized again as Q8_0, whose steps are so fine that what was
quantized before loses next to nothing. Norms, biases and routers are dequantized.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeGuard

KeptType = Literal["Q8_0", "Q4_0", "Q4_1"]

BLOCK_INPUTS = 32  # inputs of an output that share a scale
BLOCK_BYTES: Mapping[KeptType, int] = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}
PLAIN_TYPES = frozenset({"F32", "F16", "BF16"})


def kept_type(stored: Sequence[str], columns: range) -> KeptType | None:
    """The type in which weights stored as `stored`, read by one product, are kept; None: in the model's dtype.

    `columns`: the input features that the rank has; blocks cannot be cut, or made of fewer inputs.
    """
    if len(columns) % BLOCK_INPUTS or not PLAIN_TYPES.isdisjoint(stored):
        return None
    first, *others = set(stored)
    return first if _can_be_kept(first) and not others and columns.start % BLOCK_INPUTS == 0 else "Q8_0"


def _can_be_kept(stored: str) -> TypeGuard[KeptType]:
    return stored in BLOCK_BYTES
