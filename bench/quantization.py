"""Weights in 4 and 8 bits against the same model in bfloat16: tokens per second, memory, and what it costs in quality.

    python bench/quantization.py [--repeats 5] [--threads N] [--quick]

All variants are loaded in one process and take turns; ratios are of medians. The embedded model is stored as Q4_1 with
a table in Q8_0: "bfloat16" expands it, "Q4_1" keeps it, and the other two are made of it by the gguf package.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Everything is read from the model package: nothing is asked of the network.
os.environ["HF_HUB_OFFLINE"] = "1"

import machine
import numpy as np
import torch
from gguf import GGMLQuantizationType, quants
from machine import Workload

from shoal.cluster.config import EMBEDDED_MODEL, locate_model
from shoal.engine import LLM, SamplingParams
from shoal.engine.config import EngineOptions
from shoal.engine.gguf_header import open_gguf_header
from shoal.engine.layers.attention import AttentionBatch
from shoal.engine.models.registry import load_model
from shoal.engine.models.weights.gguf_file import DEFAULT_ALIGNMENT, read_gguf_file
from shoal.engine.parallel.collectives import SingleRank
from shoal.engine.parallel.topology import SINGLE
from shoal.engine.sizing import rank_layout
from shoal.engine.tokenizer import Tokenizer
from shoal.engine.worker import resolve_options
from shoal.kernels.dispatch import operations

KV_BYTES = 2**28
BLOCK_SIZE = 16
BASE = "bfloat16"
TEXTS = Path(__file__).parent / "prompts" / "quote"
COUNTS = (1, 32)  # requests that decode at once

Seconds = dict[str, list[float]]  # by variant, one per repeat


def requantized(source: Path, target: Path, kind: str) -> Path:
    """Write `source` again with its matrices as `kind`; Q4_0 leaves the embedding table as it is. Answers `target`."""
    file = read_gguf_file(source)
    with open_gguf_header(source) as (_, _, cursor):
        whole, head = bytes(cursor.data), bytes(cursor.data[: cursor.position])
    entries, data = bytearray(), bytearray()
    for name, tensor in file.tensors.items():
        raw = whole[tensor.offset : tensor.offset + tensor.num_bytes]
        stored = tensor.dtype
        if len(tensor.shape) == 2 and not (kind == "Q4_0" and name == "token_embd.weight"):
            values = quants.dequantize(np.frombuffer(raw, np.uint8), GGMLQuantizationType[stored])
            raw, stored = quants.quantize(values.reshape(tensor.shape), GGMLQuantizationType[kind]).tobytes(), kind
        encoded = name.encode()
        entries += len(encoded).to_bytes(8, "little") + encoded + len(tensor.shape).to_bytes(4, "little")
        for size in reversed(tensor.shape):
            entries += size.to_bytes(8, "little")
        entries += int(GGMLQuantizationType[stored]).to_bytes(4, "little") + len(data).to_bytes(8, "little")
        data += raw + bytes(-len(raw) % DEFAULT_ALIGNMENT)
    padding = bytes(-(len(head) + len(entries)) % DEFAULT_ALIGNMENT)
    target.write_bytes(head + entries + padding + data)
    return target


def variants(folder: Path) -> Mapping[str, EngineOptions]:
    stored = Path(locate_model(EMBEDDED_MODEL))
    files = {
        BASE: stored,
        "Q8_0": requantized(stored, folder / "Q8_0.gguf", "Q8_0"),
        "Q4_0": requantized(stored, folder / "Q4_0.gguf", "Q4_0"),
        "Q4_1": stored,
    }
    return {
        name: EngineOptions(
            str(path), dtype="bfloat16", quantization="none" if name == BASE else "gguf", device="cpu",
            kv_memory_bytes=KV_BYTES, block_size=BLOCK_SIZE,
        )
        for name, path in files.items()
    }  # fmt: skip


def perplexity(options: EngineOptions) -> float:
    """Of TEXTS one after the other, each token after all before it."""
    config = resolve_options(options)
    text = "".join(path.read_text() for path in sorted(TEXTS.iterdir()))
    ids = torch.tensor(Tokenizer.load(options.model).encode(text))  # [tokens]
    model = load_model(config, operations("cpu"), SINGLE, SingleRank())
    num_blocks = -(-len(ids) // BLOCK_SIZE)
    pool = torch.zeros(rank_layout(config, SINGLE).shape(num_blocks), dtype=torch.bfloat16)
    batch = AttentionBatch(
        slots=torch.arange(len(ids)),
        block_tables=torch.arange(num_blocks, dtype=torch.int32)[None],
        query_starts=torch.tensor([0, len(ids)], dtype=torch.int32),
        context_lens=torch.tensor([len(ids)], dtype=torch.int32),
        max_query_len=len(ids),
    )
    with torch.inference_mode():
        hidden = model.forward(ids, torch.arange(len(ids)), batch, pool.unbind(1))
        loss = torch.nn.functional.cross_entropy(model.logits(hidden)[:-1], ids[1:])
    return float(loss.exp())


def seconds(llm: LLM, prompts: list[list[int]], num_new: int) -> float:
    params = SamplingParams(max_tokens=num_new, temperature=0, ignore_eos=True)
    start = time.perf_counter()
    results = llm.generate(prompts, params, use_tqdm=False)
    taken = time.perf_counter() - start
    assert all(len(result.outputs[0].token_ids) == num_new for result in results)
    return taken


def measure(llms: Mapping[str, LLM], workload: Workload, count: int, length: int, num_new: int) -> Seconds:
    """Seconds of each variant for `count` prompts of `length` tokens at once, in turn."""
    times: Seconds = {name: [] for name in llms}
    for repeat in range(workload.repeats):
        prompts = workload.prompts(count, length, seed=repeat + 1000 * num_new)
        for name, llm in llms.items():
            times[name].append(seconds(llm, prompts, num_new))
        last = "  ".join(f"{name} {taken[-1]:6.3f} s" for name, taken in times.items())
        print(f"  {count:2d} x ({length} + {num_new} tokens), {repeat + 1}/{workload.repeats}:  {last}", flush=True)
    return times


def compared(rates: Mapping[str, float], times: Mapping[str, Seconds]) -> dict[str, Any]:
    ratios = {name: rate / rates[BASE] for name, rate in rates.items()}
    return {"tokens_per_s": rates, "ratio_to_bfloat16": ratios, "seconds": times}


def decode(llms: Mapping[str, LLM], workload: Workload, count: int) -> dict[str, Any]:
    """Tokens per second without the prompts: what all but the first token of each request took."""
    whole = measure(llms, workload, count, workload.num_prompt, workload.num_new)
    first = measure(llms, workload, count, workload.num_prompt, 1)
    rates = {
        name: count * (workload.num_new - 1) / (statistics.median(whole[name]) - statistics.median(first[name]))
        for name in llms
    }
    return compared(rates, {"whole": whole, "first_token": first})


def run(workload: Workload, threads: int, folder: Path) -> dict[str, Any]:
    """Measure everything; answers what goes into the result file."""
    torch.set_num_threads(threads)
    given = variants(folder)
    result: dict[str, Any] = {
        "machine": machine.facts(threads),
        "model": EMBEDDED_MODEL,
        "num_prompt": workload.num_prompt,
        "num_new": workload.num_new,
        "repeats": workload.repeats,
        "perplexity": {name: perplexity(options) for name, options in given.items()},
    }
    print(f"perplexity: {result['perplexity']}", flush=True)
    llms = {
        name: LLM(
            options.model, dtype=options.dtype, quantization=options.quantization, device=options.device,
            kv_memory_bytes=KV_BYTES, block_size=BLOCK_SIZE, num_threads=threads,
        )
        for name, options in given.items()
    }  # fmt: skip
    result["weight_bytes"] = {name: llm.ranks[0].weight_bytes for name, llm in llms.items()}
    for llm in llms.values():
        seconds(llm, workload.prompts(1, 16, seed=0), 4)  # warm up
    for count in COUNTS:
        result[f"decode_{count}"] = decode(llms, workload, count)
    prefill = measure(llms, workload, 1, workload.num_prefill, 1)
    rates = {name: workload.num_prefill / statistics.median(taken) for name, taken in prefill.items()}
    result["prefill"] = compared(rates, {"whole": prefill})
    for llm in llms.values():
        llm.close()
    return result


def table(result: Mapping[str, Any]) -> str:
    columns = [f"decode, {count}" for count in COUNTS] + ["prefill"]
    keys = [f"decode_{count}" for count in COUNTS] + ["prefill"]
    rows = [f"{'':10}{'weights':>10}{'perplexity':>12}" + "".join(f"{column:>22}" for column in columns)]
    for name, num_bytes in result["weight_bytes"].items():
        cells = [
            f"{result[key]['tokens_per_s'][name]:.0f}/s ({result[key]['ratio_to_bfloat16'][name]:.2f} x)"
            for key in keys
        ]
        quality = result["perplexity"][name]
        rows.append(
            f"{name:10}{num_bytes / 2**20:>6.0f} MiB{quality:>12.3f}" + "".join(f"{cell:>22}" for cell in cells)
        )
    return "\n".join(rows)


def main() -> None:
    given = machine.options(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        result = run(given.workload, given.threads, Path(folder))
    print(table(result))
    print(machine.write_result(given.results, "quantization", result))


if __name__ == "__main__":
    main()
