"""Counter-based random numbers: a draw depends on (seed, stream, position) and on nothing else.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). With no state to carry, the batch
that a request runs in, the chunks of its prompt, preemption and a move to another replica cannot change a draw.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint32(0x9E3779B9), np.uint32(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)

U32 = npt.NDArray[np.uint32]


def philox4x32(counter: tuple[U32, U32, U32, U32], key: tuple[U32, U32]) -> tuple[U32, U32, U32, U32]:
    """Ten rounds over arrays of counters and keys, all of one shape."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    with np.errstate(over="ignore"):
        for _ in range(10):
            p0 = c0.astype(np.uint64) * _MULTIPLIERS[0]
            p1 = c2.astype(np.uint64) * _MULTIPLIERS[1]
            c0, c1, c2, c3 = (
                (p1 >> _SHIFT).astype(np.uint32) ^ c1 ^ k0,
                (p1 & _LOW).astype(np.uint32),
                (p0 >> _SHIFT).astype(np.uint32) ^ c3 ^ k1,
                (p0 & _LOW).astype(np.uint32),
            )
            k0, k1 = k0 + _WEYL[0], k1 + _WEYL[1]
    return c0, c1, c2, c3


def uniforms(
    seeds: npt.NDArray[np.uint64], streams: U32, positions: npt.NDArray[np.int64], purpose: int = 0
) -> npt.NDArray[np.float32]:
    """One number in [0, 1) per row, with 24 random bits. `purpose` separates several draws at one position."""
    key = ((seeds & _LOW).astype(np.uint32), (seeds >> _SHIFT).astype(np.uint32))
    zeros = np.zeros_like(streams)
    counter = (positions.astype(np.uint32), streams, zeros + np.uint32(purpose), zeros)
    word, *_ = philox4x32(counter, key)
    return (word >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)
