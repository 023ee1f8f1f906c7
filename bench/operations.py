"""Microseconds per operation on this machine: torch twins against the kernels that serve, in SmolLM2-135M's shapes.

    python bench/operations.py [--threads N] [--dtype bfloat16]

Each figure is the median of alternating runs; a busy machine moves both columns, their ratio less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from shoal.kernels.dispatch import Operations, operations, reference

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INTER, VOCAB = 9, 3, 64, 576, 1536, 49152
EXPERTS, EXPERTS_PER_TOKEN, EXPERT_INTER = 16, 4, 384  # each token gets as many features as in the dense layer
BLOCK_SIZE, LAYERS = 16, 4
REPEATS = 7


class Shape(NamedTuple):
    """One step: every request has the same number of new tokens and the same context."""

    name: str
    requests: int
    query_len: int
    context: int


SHAPES = (
    Shape("decode 1 request", 1, 1, 192),
    Shape("decode 32 requests", 32, 1, 192),
    Shape("prefill 128", 1, 128, 128),
    Shape("prefill 1024", 1, 1024, 1024),
)


def cases(shape: Shape, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[Operations], Callable[[], object]]]]:
    """Each operation as a function of the table; what it returns is what gets timed."""
    tokens, blocks_each = shape.requests * shape.query_len, -(-shape.context // BLOCK_SIZE)
    pool = torch.randn(shape.requests * blocks_each, LAYERS, 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM).to(dtype)
    kv = pool[:, 1]
    tables = torch.randperm(shape.requests * blocks_each).int().view(shape.requests, blocks_each)
    starts = torch.arange(shape.requests + 1, dtype=torch.int32) * shape.query_len
    contexts = torch.full((shape.requests,), shape.context, dtype=torch.int32)
    positions = torch.arange(shape.context - shape.query_len, shape.context).repeat(shape.requests)
    slots = tables.long()[:, (positions[: shape.query_len]) // BLOCK_SIZE] * BLOCK_SIZE
    slots = (slots + positions[: shape.query_len] % BLOCK_SIZE).flatten()
    qkv = torch.randn(tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM).to(dtype)
    q, k, v = (
        part.view(tokens, -1, HEAD_DIM)
        for part in torch.split(qkv, [HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM], dim=1)
    )
    cos_sin = torch.randn(2048, HEAD_DIM).clamp(-1, 1)
    x, residual = torch.randn(2, tokens, HIDDEN).to(dtype)
    norm_weight = torch.ones(HIDDEN)
    gate_up = torch.randn(tokens, 2 * INTER).to(dtype)
    weight = torch.randn(2 * INTER, HIDDEN).to(dtype)
    expert_gate_up = torch.randn(EXPERTS, 2 * EXPERT_INTER, HIDDEN).to(dtype)
    expert_down = torch.randn(EXPERTS, HIDDEN, EXPERT_INTER).to(dtype)
    chosen = torch.rand(tokens, EXPERTS).topk(EXPERTS_PER_TOKEN).indices.sort().values
    expert_weights = torch.rand(tokens, EXPERTS_PER_TOKEN)
    logits = torch.randn(shape.requests, VOCAB) * 3
    rows = shape.requests
    temperature, top_k, top_p = torch.full((rows,), 0.8), torch.full((rows,), 50).int(), torch.full((rows,), 0.95)
    off, uniform = torch.zeros(rows), torch.rand(rows)
    plain = (temperature, off.int(), torch.ones(rows), off, uniform)
    truncated = (temperature, top_k, top_p, off, uniform)

    def linear(ops: Operations) -> Callable[[], object]:
        packed = ops.pack_linear(weight)
        return lambda: ops.linear(x, packed)

    def experts(ops: Operations) -> Callable[[], object]:
        packed = ops.pack_experts(expert_gate_up, expert_down)
        return lambda: ops.experts(x, packed, chosen, expert_weights, "silu")

    yield "rms_norm", lambda ops: lambda: ops.rms_norm(x, norm_weight, 1e-5)
    yield "add_rms_norm", lambda ops: lambda: ops.add_rms_norm(x, residual, norm_weight, 1e-5)
    yield "rotary", lambda ops: lambda: ops.rotary(q, k, positions, cos_sin)
    yield "kv_write", lambda ops: lambda: ops.kv_write(k, v, kv, slots)
    yield (
        "attention",
        lambda ops: lambda: ops.attention(q, kv, tables, starts, contexts, shape.query_len, scale=HEAD_DIM**-0.5),
    )
    yield "gated_activation", lambda ops: lambda: ops.gated_activation(gate_up, "silu")
    yield "linear (gate_up)", linear
    yield "experts (4 of 16)", experts
    yield "sample, plain", lambda ops: lambda: ops.sample(logits, *plain)
    yield "sample, top-k and top-p", lambda ops: lambda: ops.sample(logits, *truncated)


def time_us(run: Callable[[], object]) -> float:
    """Microseconds of one call, from about 2 ms of calls."""
    start = time.perf_counter()
    run()
    calls = max(1, int(2e-3 / (time.perf_counter() - start)))
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    tables = (reference(), operations("cpu"))
    print(f"{arguments.dtype}, {arguments.threads} threads, microseconds")
    for shape in SHAPES:
        print(f"\n{shape.name:26}{'torch':>12}{'kernels':>12}{'ratio':>9}")
        for name, case in cases(shape, getattr(torch, arguments.dtype)):
            runs = [case(table) for table in tables]
            times = [[time_us(run) for run in runs] for _ in range(REPEATS)]
            slow, fast = (statistics.median(column) for column in zip(*times, strict=True))
            print(f"{name:26}{slow:12.1f}{fast:12.1f}{slow / fast:8.1f}x")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
