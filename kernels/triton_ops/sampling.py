"""Triton twin of torch_ops.sampling: one program a row, without sorting the vocabulary.

The thresholds of top_k and top_p come from bisecting the ordered bit patterns of float32: exact, 32 passes over a row
that is in cache, and only for rows that ask for them.
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
def _sample_kernel(
    logits, temperatures, top_ks, top_ps, min_ps, uniforms, out, row_stride, vocab, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    row = logits + index * row_stride
    temperature, top_k, top_p = tl.load(temperatures + index), tl.load(top_ks + index), tl.load(top_ps + index)
    min_p, uniform = tl.load(min_ps + index), tl.load(uniforms + index)

    top = tl.full((), float("-inf"), tl.float32)
    for begin in range(0, vocab, BLOCK):
        values, _ = _load_keys(row, begin + tl.arange(0, BLOCK), vocab)
        top = tl.maximum(top, tl.max(values, axis=0))

    chosen = tl.full((), 2**31 - 1, tl.int32)
    if temperature == 0:
        for begin in range(0, vocab, BLOCK):
            columns = begin + tl.arange(0, BLOCK)
            values, _ = _load_keys(row, columns, vocab)
            chosen = tl.minimum(
                chosen, tl.min(tl.where((values == top) & (columns < vocab), columns, 2**31 - 1), axis=0)
            )
    else:
        lowest = tl.full((), -(2**31), tl.int64)
        if (top_k > 0) & (top_k < vocab):
            lowest = _threshold(row, vocab, top, temperature, min_p, lowest, top_k.to(tl.float64), True, BLOCK)
        total = _mass(row, vocab, top, temperature, min_p, lowest, lowest, False, BLOCK)
        if top_p < 1:
            target = top_p.to(tl.float64) * total
            lowest = tl.maximum(lowest, _threshold(row, vocab, top, temperature, min_p, lowest, target, False, BLOCK))
            total = _mass(row, vocab, top, temperature, min_p, lowest, lowest, False, BLOCK)
        target = uniform.to(tl.float64) * total
        running = tl.zeros((), tl.float64)
        last = tl.zeros((), tl.int32)  # the last kept token, should rounding leave the sum short of the target
        for begin in range(0, vocab, BLOCK):
            columns = begin + tl.arange(0, BLOCK)
            values, keys = _load_keys(row, columns, vocab)
            weights = _weigh(values, keys, top, temperature, min_p, lowest)
            sums = running + tl.cumsum(weights, axis=0)
            chosen = tl.minimum(chosen, tl.min(tl.where((sums > target) & (weights > 0), columns, 2**31 - 1), axis=0))
            last = tl.maximum(last, tl.max(tl.where(weights > 0, columns, 0), axis=0))
            running += tl.sum(weights, axis=0)
        chosen = tl.minimum(chosen, last)
    tl.store(out + index, chosen.to(tl.int64))


def sample(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor) -> Tensor:
    rows, vocab = logits.shape
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        _sample_kernel[(rows,)](
            logits, temperature, top_k, top_p, min_p, uniform, out, logits.stride(0), vocab,
            BLOCK=min(_BLOCK, next_power_of_2(vocab)),
        )  # fmt: skip
    return out
