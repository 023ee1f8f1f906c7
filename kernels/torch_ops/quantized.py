"""Weights of 4 and 8 bits as GGUF stores them (llama.cpp's ggml-common.h): blocks of 32 inputs of one output.

A block is a float16 scale, in Q4_1 a float16 minimum, and the weights: 32 signed bytes in Q8_0; in Q4_0 and Q4_1 16
bytes, of which byte i holds input i in its lower and input i + 16 in its upper half.

    Q8_0: scale * q        Q4_0: scale * (q - 8)        Q4_1: scale * q + minimum
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

QuantizedType = Literal["Q8_0", "Q4_0", "Q4_1"]

BLOCK_INPUTS = 32
BLOCK_BYTES: Mapping[QuantizedType, int] = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight [out, in] in blocks [out, in / 32 * bytes of a block] uint8. Blocks of zeros are zero weights."""

    blocks: Tensor
    type: QuantizedType

    @property
    def nbytes(self) -> int:
        return self.blocks.nbytes

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]."""
        return self.blocks.shape[0], self.blocks.shape[1] // BLOCK_BYTES[self.type] * BLOCK_INPUTS


def dequantize(
    blocks: Tensor,  # [rows, in / 32 * bytes of a block] uint8
    kind: QuantizedType,
) -> Tensor:  # [rows, in] float32
    """The numbers that blocks stand for, as the gguf package computes them."""
    num_blocks = blocks.shape[1] // BLOCK_BYTES[kind]
    split = blocks.reshape(len(blocks), num_blocks, BLOCK_BYTES[kind])
    scale = split[..., :2].contiguous().view(torch.float16).float()  # [rows, blocks, 1]
    if kind == "Q8_0":
        return (scale * split[..., 2:].contiguous().view(torch.int8)).flatten(1)
    halves = split[..., -16:]
    weights = torch.cat((halves & 15, halves >> 4), dim=-1).float()  # [rows, blocks, 32]
    if kind == "Q4_0":
        return (scale * (weights - 8)).flatten(1)
    minimum = split[..., 2:4].contiguous().view(torch.float16).float()  # [rows, blocks, 1]
    return (scale * weights + minimum).flatten(1)
