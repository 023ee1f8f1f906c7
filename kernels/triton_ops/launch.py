"""What every kernel launch here needs to know."""

from __future__ import annotations

import os

# The interpreter computes bfloat16 tl.dot wrongly without an error (triton 3.6 to 3.9, upstream issues 4972 and 11584):
# kernels widen the operands of interpreted products. Goes when those issues do.
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
