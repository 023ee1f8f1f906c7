"""Whether what is about to be timed is right: kernels against their torch twins, graphs against plain launches."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from random_model import RandomExecutor, make_config, make_model
from timing import largest_difference
from torch import Tensor

from shoal.engine.core import EngineCore
from shoal.engine.request import Request, RequestId, SamplingParams
from shoal.engine.runner.cuda_graphs import GraphCapture
from shoal.kernels.dispatch import Operations, reference

TOLERANCE = 2e-2  # of bfloat16
NUM_NEW = 24


def check_all(
    ops: Operations, device: torch.device, capture: GraphCapture, *, is_tiny: bool
) -> Iterator[tuple[str, bool]]:
    """What was compared, and whether it was the same."""
    for name, results in _kernel_results(ops, device, is_tiny=is_tiny):
        difference = max(largest_difference(*pair) for pair in results)
        yield f"{name}: differs from its twin by {difference:.2g}", difference <= TOLERANCE
    for shape in ("Llama-3.1-8B", "Mixtral, 8 layers"):
        with_graphs, without = (_greedy(shape, ops, device, each, is_tiny=is_tiny) for each in (capture, None))
        same = sum(a == b for a, b in zip(with_graphs, without, strict=True))
        yield f"tiny {shape}: {same} of {len(without)} answers are the same with graphs", same == len(without)


def _kernel_results(
    ops: Operations, device: torch.device, *, is_tiny: bool
) -> Iterator[tuple[str, list[tuple[Tensor, Tensor]]]]:
    """Results of the same operation, ours and the twin's."""
    slow, hidden = reference(), 96 if is_tiny else 1024
    x, residual = (torch.randn(5, hidden, device=device).bfloat16() for _ in range(2))
    weight = torch.rand(hidden, device=device)
    yield "rms_norm", [(ops.rms_norm(x, weight, 1e-5), slow.rms_norm(x, weight, 1e-5))]
    sums = [residual.clone(), residual.clone()]
    norms = [table.add_rms_norm(x, each, weight, 1e-5) for table, each in zip((ops, slow), sums, strict=True)]
    yield "add_rms_norm", [(norms[0], norms[1]), (sums[0], sums[1])]
    yield "gated_activation", [(ops.gated_activation(x, "silu"), slow.gated_activation(x, "silu"))]
    heads = [residual.view(5, -1, 16)[:, :6].clone() for _ in range(2)]
    for table, each in zip((ops, slow), heads, strict=True):
        table.rotary(each[:, :1], each[:, 1:], torch.arange(5, device=device), weight.view(-1, 16))
    yield "rotary", [(heads[0], heads[1])]
    logits = torch.randn(3, 60 if is_tiny else 128_256, device=device)
    zeros = torch.zeros(3, device=device)
    settings = (zeros, zeros.int(), zeros + 1, zeros, zeros)
    yield "sample, greedy", [(ops.sample(logits, *settings), slow.sample(logits, *settings))]
    for name, lens in _attention_lens(is_tiny).items():
        yield f"attention, {name}", [_attention_results(ops, device, lens)]
    gate_up = torch.randn(4, 2 * 48, hidden, device=device).bfloat16() / hidden**0.5
    down = torch.randn(4, hidden, 48, device=device).bfloat16() / 7
    liked = torch.rand(5, 4, device=device)
    chosen = liked.topk(2).indices.sort().values
    results = [
        table.experts(x, table.pack_experts(gate_up.clone(), down.clone()), chosen, liked.gather(1, chosen), "silu")
        for table in (ops, slow)
    ]
    yield "experts", [(results[0], results[1])]


def _attention_lens(is_tiny: bool) -> dict[str, list[tuple[int, int]]]:
    """(queries, context) of each request."""
    if is_tiny:
        return {"decode": [(1, 9), (1, 30)], "mixed": [(1, 20), (40, 40)]}
    return {"decode": [(1, 4000), (1, 17), (1, 900)], "one long": [(1, 30_000)], "mixed": [(1, 5000), (700, 3000)]}


def _attention_results(ops: Operations, device: torch.device, lens: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    heads, kv_heads, dim, block = (4, 2, 16, 4) if device.type == "cpu" else (32, 8, 128, 16)
    counts = [-(-context // block) for _, context in lens]
    kv = torch.randn(sum(counts) + 1, 2, kv_heads, block, dim, device=device).bfloat16()
    order = torch.randperm(sum(counts)).int() + 1
    tables = torch.zeros(len(lens), max(counts), dtype=torch.int32)
    for row, blocks in enumerate(torch.split(order, counts)):
        tables[row, : len(blocks)] = blocks
    starts = torch.tensor([0, *(queries for queries, _ in lens)]).cumsum(0).int()
    contexts = torch.tensor([context for _, context in lens]).int()
    q = torch.randn(int(starts[-1]), heads, dim, device=device).bfloat16()
    most = max(queries for queries, _ in lens)
    arguments = (q, kv, tables.to(device), starts.to(device), contexts.to(device), most)
    results = [table.attention(*arguments, scale=dim**-0.5) for table in (ops, reference())]
    return results[0], results[1]


def _greedy(
    shape: str, ops: Operations, device: torch.device, capture: GraphCapture | None, *, is_tiny: bool
) -> list[list[int]]:
    """What a tiny model says to some prompts. In float32: in bfloat16, padding a batch can decide between tokens."""
    model = make_model(shape, ops, device, is_tiny=True, dtype=torch.float32)
    limits: dict[str, Any] = {"max_running_requests": 3, "max_step_tokens": 32} if is_tiny else {}
    config = make_config(model, dtype="float32", num_blocks=80, block_size=16, **limits)
    core = EngineCore(config, RandomExecutor(config, model, ops, device, capture))
    core.start()
    rng = random.Random(0)
    params = SamplingParams(temperature=0, max_tokens=4 if is_tiny else NUM_NEW, ignore_eos=True)
    requests = [
        Request(RequestId(str(index)), tuple(rng.randrange(60) for _ in range(3 + index)), params, 0, float(index))
        for index in range(3 if is_tiny else 13)
    ]
    for request in requests:
        core.add(request)
    while core.has_work:
        core.step()
    core.close()
    return [list(request.output_ids) for request in requests]
