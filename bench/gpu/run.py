"""What a GPU does against what it could: attention, decoding with and without CUDA graphs, idle time between steps.

    PYTHONPATH=src python bench/gpu/run.py

Checks first that the kernels are right. Models have random weights. Takes a few minutes, and 32 GiB of GPU memory; the
result stays in bench/results/gpu.json. `--tiny` shows anywhere that the script works: kernels run in Triton's
interpreter, and no figure means anything. `--sweep` shows what attention does with other tiles than it takes: with that
they are chosen anew for a new device.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import itertools
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

IS_TINY = "--tiny" in sys.argv
if IS_TINY:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import torch  # noqa: E402
import triton  # noqa: E402
from checks import check_all  # noqa: E402
from random_model import SHAPES, RandomExecutor, RandomModel, make_config, make_model  # noqa: E402
from timing import Limits, device_seconds, idle_share, measure_limits  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention  # noqa: E402

from shoal.engine.core import EngineCore  # noqa: E402
from shoal.engine.request import Request, RequestId, SamplingParams  # noqa: E402
from shoal.engine.runner.cuda_graphs import CudaCapture, GraphCapture, Replay  # noqa: E402
from shoal.kernels.dispatch import Operations, operations  # noqa: E402
from shoal.kernels.triton_ops import attention  # noqa: E402

RESULTS = Path(__file__).parents[1] / "results"
BLOCK_SIZE = 16
Result = dict[str, Any]


class Sizes(NamedTuple):
    """How much of everything."""

    read_bytes: int = 4 * 2**30
    matrix: int = 8192
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    kv_layers: int = 16  # that attention goes through in turn, as a model does
    decode: tuple[tuple[int, int], ...] = ((64, 4096), (32, 8192), (8, 32768), (1, 32768))  # requests, context
    prefill: tuple[tuple[int, int], ...] = ((4, 2048), (1, 8192))  # requests, tokens
    prompt: int = 128
    steps: int = 64  # that are timed
    many: int = 256  # requests at once


TINY = Sizes(2**16, 16, 4, 2, 16, 2, ((2, 20), (1, 40)), ((1, 20),), 4, 3, 3)


class Line(NamedTuple):
    """One line of the table."""

    what: str
    value: str
    goal: str = ""
    is_met: bool | None = None  # None: there is no goal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="show that the script works; without a GPU too")
    parser.add_argument("--sweep", action="store_true", help="attention only, with tiles of many shapes")
    parser.add_argument("--results", type=Path, help=f"folder for the result (default: {RESULTS}; none with --tiny)")
    arguments = parser.parse_args()
    if not IS_TINY and not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device here: run this on one, or with --tiny")
    device, sizes = (torch.device("cpu"), TINY) if IS_TINY else (torch.device("cuda", 0), Sizes())
    started = time.perf_counter()
    if arguments.sweep:
        with torch.inference_mode():
            sweep(operations("cuda"), device, sizes)
        return
    with torch.inference_mode():
        result = measure(operations("cuda"), device, sizes)
    result["seconds"] = time.perf_counter() - started
    print(f"\n{'':52}{'measured':>24}  {'goal':18}")
    for what, value, goal, is_met in lines(result):
        verdict = "" if is_met is None or IS_TINY else "met" if is_met else "MISSED"
        print(f"{what:52}{value:>24}  {goal:18}{verdict}".rstrip())
    folder = arguments.results or (None if IS_TINY else RESULTS)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "gpu.json").write_text(json.dumps(result, indent=2) + "\n")


def measure(ops: Operations, device: torch.device, sizes: Sizes) -> Result:
    """Everything, one after the other. Exits where a check fails."""
    torch.manual_seed(0)
    for what, is_right in check_all(ops, device, _capture(), is_tiny=IS_TINY):
        print(f"{'right' if is_right else 'WRONG':6}{what}", flush=True)
        if not is_right:
            sys.exit(1)
    limits = measure_limits(device, num_bytes=sizes.read_bytes, size=sizes.matrix)
    result: Result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "interpreter",
        "torch": torch.__version__,
        "bytes_per_s": limits.bytes_per_s,
        "bfloat16_flops": limits.bfloat16_flops,
    }
    print(f"\n{result['device']}, torch {torch.__version__}", flush=True)
    result["attention_decode"] = [decode_attention(ops, device, sizes, limits, *each) for each in sizes.decode]
    result["attention_prefill"] = [prefill_attention(ops, device, sizes, limits, *each) for each in sizes.prefill]
    result["models"] = {}
    for name in SHAPES:
        print(f"decoding, {name}", flush=True)
        _free()
        model = make_model(name, ops, device, is_tiny=IS_TINY)
        result["models"][name] = decoding(model, ops, device, sizes, limits)
        del model
    return result


def sweep(ops: Operations, device: torch.device, sizes: Sizes) -> None:
    """Each shape of a tile, with the share of its limit that decoding or a prompt reaches."""
    limits = measure_limits(device, num_bytes=sizes.read_bytes, size=sizes.matrix)
    rows, chosen = (16, 64, 128), attention._shape
    print(f"{'rows':>6}{'keys':>6}{'warps':>6}{'stages':>7}{'decode':>9}{'prefill':>9}")
    for shape in itertools.product(rows, (32, 64, 128), (4, 8), (2, 3, 4, 5, 7)):
        attention._shape = lambda *_, shape=shape: attention._Shape(*shape)
        try:
            if shape[0] == rows[0]:
                share = f"{decode_attention(ops, device, sizes, limits, *sizes.decode[1])['share']:9.1%}"
            else:
                share = f"{prefill_attention(ops, device, sizes, limits, *sizes.prefill[-1])['share']:18.1%}"
        except triton.runtime.OutOfResources:
            share = "  too large"
        print("{:6}{:6}{:6}{:7}".format(*shape), share, flush=True)
        if IS_TINY:
            break
    attention._shape = chosen


def decode_attention(
    ops: Operations, device: torch.device, sizes: Sizes, limits: Limits, requests: int, context: int
) -> Result:
    """One token each of some requests with so much context, whose blocks lie anywhere."""
    _free()
    blocks_each = -(-context // BLOCK_SIZE)
    shape = (requests * blocks_each, sizes.kv_layers, 2, sizes.kv_heads, BLOCK_SIZE, sizes.head_dim)
    pool = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_()
    tables = torch.randperm(requests * blocks_each, device=device).int().view(requests, blocks_each)
    starts = torch.arange(requests + 1, dtype=torch.int32, device=device)
    contexts = torch.full((requests,), context, dtype=torch.int32, device=device)
    q = torch.randn(requests, sizes.heads, sizes.head_dim, device=device).bfloat16()
    scale = sizes.head_dim**-0.5

    def run(index: int) -> object:
        return ops.attention(q, pool[:, index % sizes.kv_layers], tables, starts, contexts, 1, scale=scale)

    seconds = device_seconds(run, calls=sizes.kv_layers)
    num_bytes = pool[:, 0].nbytes
    return {
        "requests": requests, "context": context, "seconds": seconds,
        "share": limits.seconds(num_bytes) / seconds,
    }  # fmt: skip


def prefill_attention(
    ops: Operations, device: torch.device, sizes: Sizes, limits: Limits, requests: int, tokens: int
) -> Result:
    """Whole prompts, beside torch's flash attention over the same keys and values in one piece."""
    _free()
    blocks_each = -(-tokens // BLOCK_SIZE)
    shape = (requests * blocks_each, 2, sizes.kv_heads, BLOCK_SIZE, sizes.head_dim)
    kv = torch.randn(shape, device=device).bfloat16()
    tables = torch.randperm(requests * blocks_each, device=device).int().view(requests, blocks_each)
    starts = torch.arange(requests + 1, dtype=torch.int32, device=device) * tokens
    contexts = torch.full((requests,), tokens, dtype=torch.int32, device=device)
    q = torch.randn(requests * tokens, sizes.heads, sizes.head_dim, device=device).bfloat16()
    scale = sizes.head_dim**-0.5
    seconds = device_seconds(lambda _: ops.attention(q, kv, tables, starts, contexts, tokens, scale=scale), calls=4)

    q, k, v = (torch.randn(requests, sizes.heads, tokens, sizes.head_dim, device=device).bfloat16() for _ in range(3))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        flash = device_seconds(lambda _: scaled_dot_product_attention(q, k, v, is_causal=True), calls=4)
    flops = 2 * requests * sizes.heads * sizes.head_dim * tokens**2  # two products of half a square each
    return {
        "requests": requests, "tokens": tokens, "seconds": seconds, "flops": flops / seconds,
        "share": flops / seconds / limits.bfloat16_flops, "torch_flash_flops": flops / flash,
    }  # fmt: skip


def decoding(model: RandomModel, ops: Operations, device: torch.device, sizes: Sizes, limits: Limits) -> Result:
    """Through the whole engine: one request with graphs and without, and many at once."""
    result: Result = {"weight_bytes": model.weight_bytes}
    for name, requests, has_graphs in (("one", 1, True), ("one_without_graphs", 1, False), ("many", sizes.many, True)):
        _free()
        max_model_len = min(model.config.max_position, 8192)
        blocks_each = (sizes.prompt + 4 * sizes.steps) // BLOCK_SIZE + 2
        config = make_config(
            model, block_size=BLOCK_SIZE, max_model_len=max_model_len, max_running_requests=sizes.many,
            num_blocks=max(requests * blocks_each, max_model_len // BLOCK_SIZE) + 1, enable_prefix_caching=False,
        )  # fmt: skip
        core = EngineCore(config, RandomExecutor(config, model, ops, device, _capture() if has_graphs else None))
        core.start()
        result[name] = decode(core, model, requests, sizes, limits)
        core.close()
        del core
    return result


def decode(core: EngineCore, model: RandomModel, requests: int, sizes: Sizes, limits: Limits) -> Result:
    """Steady decoding of so many requests, and a traced stretch behind it."""
    params = SamplingParams(temperature=0, max_tokens=4 * sizes.steps, ignore_eos=True)
    rng = random.Random(0)
    for index in range(requests):
        prompt = tuple(rng.randrange(model.config.vocab_size) for _ in range(sizes.prompt))
        core.add(Request(RequestId(str(index)), prompt, params, 0, float(index)))
    while core.stats().generation_tokens_total < requests * 2:  # prompts are computed, a graph is recorded
        core.step()
    for _ in range(sizes.steps // 4):
        core.step()
    start = time.perf_counter()
    for _ in range(sizes.steps):
        core.step()
    seconds = (time.perf_counter() - start) / sizes.steps
    idle = idle_share(lambda: [core.step() for _ in range(sizes.steps // 2)])
    context = sizes.prompt + sizes.steps // 4 + sizes.steps // 2
    least = limits.seconds(model.step_bytes(requests, context), model.step_flops(requests))
    return {
        "requests": requests, "step_s": seconds, "tokens_per_s": requests / seconds, "share": least / seconds,
        "idle_share": idle,
    }  # fmt: skip


def lines(result: Result) -> Iterator[Line]:
    yield Line("limit: memory", f"{result['bytes_per_s'] / 1e12:.2f} TB/s")
    yield Line("limit: bfloat16 products", f"{result['bfloat16_flops'] / 1e12:.0f} TFLOP/s")
    for each in result["attention_decode"]:
        what = f"attention, decode {each['requests']} x {each['context']}"
        # A single request is too little work for the whole device: no goal.
        goal = 0.85 if each["requests"] > 1 else None
        yield at_least(f"{what}: share of memory's limit", each["share"], goal)
    for each in result["attention_prefill"]:
        what = f"attention, prefill {each['requests']} x {each['tokens']}"
        yield Line(what, f"{each['flops'] / 1e12:.0f} TFLOP/s")
        yield at_least(f"{what}: share of products' limit", each["share"], 0.65)
        yield Line(f"{what}: against torch's flash", f"{each['flops'] / each['torch_flash_flops']:.2f} x")
    for name, model in result["models"].items():
        one, plain, many = model["one"], model["one_without_graphs"], model["many"]
        yield Line(f"{name}, 1 request", f"{one['tokens_per_s']:.0f} tokens/s")
        yield at_least(f"{name}, 1 request: share of the limit", one["share"], 0.85)
        yield Line(f"{name}, 1 request: without graphs", f"{plain['tokens_per_s']:.0f} tokens/s")
        yield Line(f"{name}, 1 request: graphs on / off", f"{one['tokens_per_s'] / plain['tokens_per_s']:.2f} x")
        yield Line(f"{name}, {many['requests']} requests", f"{many['tokens_per_s']:.0f} tokens/s")
        yield at_least(f"{name}, {many['requests']} requests: share of the limit", many["share"], 0.60)
        for each in (one, many):
            what, idle = f"{name}, {each['requests']} at once: GPU idle", each["idle_share"]
            if idle is None:
                yield Line(what, "not traced")
            else:
                yield Line(what, f"{idle:.1%}", "at most 2.0%", idle <= 0.02)
    yield Line("all of it", f"{result['seconds']:.0f} s", "below 480 s", result["seconds"] < 480)


def at_least(what: str, share: float, goal: float | None) -> Line:
    if goal is None:
        return Line(what, f"{share:.0%}")
    return Line(what, f"{share:.0%}", f"at least {goal:.0%}", share >= goal)


def _capture() -> GraphCapture:
    return _rerun if IS_TINY else CudaCapture()


def _rerun(run: Replay) -> Replay:
    """A GraphCapture where there are no graphs."""
    return run


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
