"""Triton twin of torch_ops.sampling, without sorting the vocabulary.

Many programs look at blocks of a row; then one a row decides. A greedy row is decided by the highest logits of blocks,
and one without truncation by their sums of weights and a look into one block. The thresholds of top_k and top_p come
from bisecting the ordered bit patterns of float32: exact, 32 passes over a row that is in cache, and only for rows that
ask for them.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.triton_ops.launch import next_power_of_2

_BLOCK = 4096


@triton.jit
def _load_keys(row, columns, vocab):
    """Logits and integers in the same order; -0 counts as 0."""
    logits = tl.load(row + columns, mask=columns < vocab, other=float("-inf")) + 0.0
    bits = logits.to(tl.int32, bitcast=True)
    return logits, tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).to(tl.int64)


@triton.jit
def _weigh(logits, keys, top, temperature, min_p, lowest):
    """float64 weights of the tokens kept so far."""
    weights = tl.exp((logits.to(tl.float64) - top.to(tl.float64)) / temperature.to(tl.float64))
    return tl.where((weights >= min_p.to(tl.float64)) & (keys >= lowest), weights, 0.0)


@triton.jit
def _mass(
    row, vocab, top, temperature, min_p, lowest, least, COUNTS: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Number, or kept weight, of the tokens with keys of at least `least`."""
    total = tl.zeros((), tl.float64)
    for begin in range(0, vocab, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        logits, keys = _load_keys(row, columns, vocab)
        if COUNTS:
            mass = tl.where(columns < vocab, 1.0, 0.0).to(tl.float64)
        else:
            mass = _weigh(logits, keys, top, temperature, min_p, lowest)
        total += tl.sum(tl.where(keys >= least, mass, 0.0), axis=0)
    return total


@triton.jit
def _threshold(
    row, vocab, top, temperature, min_p, lowest, target, COUNTS: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """The largest key whose tokens, with all above it, have a mass of at least `target`."""
    low = tl.full((), -(2**31), tl.int64)
    high = tl.full((), 2**31 - 1, tl.int64)
    for _ in range(32):
        middle = (low + high + 1) >> 1
        is_enough = _mass(row, vocab, top, temperature, min_p, lowest, middle, COUNTS, BLOCK) >= target
        low = tl.where(is_enough, middle, low)
        high = tl.where(is_enough, high, middle - 1)
    return low


@triton.jit
def _block_kernel(
    logits, temperatures, tops, firsts, sums, row_stride, vocab, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Of each block of a row [rows, blocks]: the highest logit, the first token that has it, and the sum of
    exp((logit - highest) / temperature) in float64.
    """
    index = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values, _ = _load_keys(logits + index * row_stride, columns, vocab)
    top = tl.max(values, axis=0)
    at = index * tl.num_programs(1) + tl.program_id(1)
    tl.store(tops + at, top)
    tl.store(firsts + at, tl.min(tl.where((values == top) & (columns < vocab), columns, 2**31 - 1), axis=0))
    temperature = tl.load(temperatures + index)
    if temperature > 0:
        shift = tl.where(top == float("-inf"), 0.0, top).to(tl.float64)
        tl.store(sums + at, tl.sum(tl.exp((values.to(tl.float64) - shift) / temperature.to(tl.float64)), axis=0))


@triton.jit
def _drawn(row, columns, vocab, top, temperature, min_p, lowest, before, target):
    """(the first token of a block whose running sum of weights, after those `before`, passes the target, or 2^31 - 1;
    the last token with a weight, or 0; the sum of weights).
    """
    values, keys = _load_keys(row, columns, vocab)
    weights = _weigh(values, keys, top, temperature, min_p, lowest)
    passes = (before + tl.cumsum(weights, axis=0) > target) & (weights > 0)
    first = tl.min(tl.where(passes, columns, 2**31 - 1), axis=0)
    return first, tl.max(tl.where(weights > 0, columns, 0), axis=0), tl.sum(weights, axis=0)


@triton.jit
def _sample_kernel(
    logits, temperatures, top_ks, top_ps, min_ps, uniforms, tops, firsts, sums, out, row_stride, vocab, num_blocks,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,  # noqa: N803
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    row = logits + index * row_stride
    temperature, top_k, top_p = tl.load(temperatures + index), tl.load(top_ks + index), tl.load(top_ps + index)
    min_p, uniform = tl.load(min_ps + index), tl.load(uniforms + index)

    block = tl.arange(0, BLOCKS)
    at = index * num_blocks + block
    block_tops = tl.load(tops + at, mask=block < num_blocks, other=float("-inf"))
    top = tl.max(block_tops, axis=0)
    lowest = tl.full((), -(2**31), tl.int64)
    is_truncated = ((top_k > 0) & (top_k < vocab)) | (top_p < 1) | (min_p > 0)

    if temperature == 0:
        block_firsts = tl.load(firsts + at, mask=(block < num_blocks) & (block_tops == top), other=2**31 - 1)
        chosen = tl.min(block_firsts, axis=0)
    elif not is_truncated:
        shares = tl.load(sums + at, mask=block < num_blocks, other=0.0)
        shares *= tl.exp((block_tops.to(tl.float64) - top.to(tl.float64)) / temperature.to(tl.float64))
        target = uniform.to(tl.float64) * tl.sum(shares, axis=0)
        passes = (tl.cumsum(shares, axis=0) > target) & (shares > 0)
        owner = tl.min(tl.where(passes, block, 2**31 - 1), axis=0)
        owner = tl.minimum(owner, tl.max(tl.where(shares > 0, block, 0), axis=0))  # as below
        running = tl.sum(tl.where(block < owner, shares, 0.0), axis=0)
        columns = owner * BLOCK + tl.arange(0, BLOCK)
        first, last, _ = _drawn(row, columns, vocab, top, temperature, min_p, lowest, running, target)
        chosen = tl.minimum(first, last)
    else:
        if (top_k > 0) & (top_k < vocab):
            lowest = _threshold(row, vocab, top, temperature, min_p, lowest, top_k.to(tl.float64), True, BLOCK)
        total = _mass(row, vocab, top, temperature, min_p, lowest, lowest, False, BLOCK)
        if top_p < 1:
            target = top_p.to(tl.float64) * total
            lowest = tl.maximum(lowest, _threshold(row, vocab, top, temperature, min_p, lowest, target, False, BLOCK))
            total = _mass(row, vocab, top, temperature, min_p, lowest, lowest, False, BLOCK)
        target = uniform.to(tl.float64) * total
        running = tl.zeros((), tl.float64)
        chosen = tl.full((), 2**31 - 1, tl.int32)
        last = tl.zeros((), tl.int32)  # the last kept token, should rounding leave the sum short of the target
        for begin in range(0, vocab, BLOCK):
            columns = begin + tl.arange(0, BLOCK)
            first, last_here, mass = _drawn(row, columns, vocab, top, temperature, min_p, lowest, running, target)
            chosen, last, running = tl.minimum(chosen, first), tl.maximum(last, last_here), running + mass
        chosen = tl.minimum(chosen, last)
    tl.store(out + index, chosen.to(tl.int64))


def sample(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor) -> Tensor:
    rows, vocab = logits.shape
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if not rows:
        return out
    block = min(_BLOCK, next_power_of_2(vocab))
    num_blocks = triton.cdiv(vocab, block)
    tops, firsts, sums = (
        torch.empty((rows, num_blocks), dtype=dtype, device=logits.device)
        for dtype in (torch.float32, torch.int32, torch.float64)
    )
    _block_kernel[(rows, num_blocks)](logits, temperature, tops, firsts, sums, logits.stride(0), vocab, BLOCK=block)
    _sample_kernel[(rows,)](
        logits, temperature, top_k, top_p, min_p, uniform, tops, firsts, sums, out, logits.stride(0), vocab, num_blocks,
        BLOCK=block, BLOCKS=next_power_of_2(num_blocks),
    )  # fmt: skip
    return out
