"""Shoal's offline engine against transformers' generate: one process, the same weights in bfloat16, the same threads.

    python bench/offline.py [--repeats 5] [--threads N] [--quick]

The two take turns, and medians are compared, so that a busy moment of the machine meets both. Also: which share of what
the machine's memory and arithmetic allow Shoal's steps reach.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

# Everything is read from the model package: nothing is asked of the network.
os.environ["HF_HUB_OFFLINE"] = "1"

import machine
import torch
import transformers
from machine import Workload

from shoal.cluster.config import EMBEDDED_MODEL, locate_model
from shoal.engine import LLM, SamplingParams
from shoal.engine.config import DTYPE_BYTES, ModelConfig
from shoal.engine.memory.kv_layout import KVLayout

KV_BYTES = 2**30
BLOCK_SIZE = 16
DTYPE_SIZE = DTYPE_BYTES["bfloat16"]

Seconds = dict[str, list[float]]  # by peer, one per repeat


class Peer(Protocol):
    """A program that completes prompts greedily, whatever end-of-text token comes."""

    name: str

    def run(self, prompts: Sequence[list[int]], num_new: int) -> list[list[int]]: ...


class Shoal:
    name = "shoal"

    def __init__(self, model: str, threads: int) -> None:
        self._llm = LLM(model, dtype="bfloat16", num_threads=threads, kv_memory_bytes=KV_BYTES, block_size=BLOCK_SIZE)
        self.model_config = self._llm.config.model

    def run(self, prompts: Sequence[list[int]], num_new: int) -> list[list[int]]:
        params = SamplingParams(max_tokens=num_new, temperature=0, ignore_eos=True)
        return [result.outputs[0].token_ids for result in self._llm.generate(prompts, params, use_tqdm=False)]


class Transformers:
    """Static batches, as `generate` makes them; all prompts of a batch have one length, so nothing is padded."""

    name = "transformers"

    def __init__(self, model: str) -> None:
        path = Path(model)
        load = transformers.AutoModelForCausalLM
        stored = load.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        # A model that was read from a GGUF file goes on as a quantized one: take plain dense modules instead.
        config = stored.config
        config.__dict__.pop("quantization_config", None)
        self._model = load.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
        self._model.load_state_dict(stored.state_dict())

    @torch.inference_mode()
    def run(self, prompts: Sequence[list[int]], num_new: int) -> list[list[int]]:
        ids = torch.tensor(prompts)  # [requests, prompt]
        generated: list[list[int]] = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_new,
            min_new_tokens=num_new,
            do_sample=False,
            pad_token_id=2,
        )[:, ids.shape[1] :].tolist()
        return generated


def measure(peers: Sequence[Peer], workload: Workload, count: int, length: int, num_new: int) -> Seconds:
    """Seconds of each peer for `count` prompts of `length` tokens at once, in turn."""
    seconds: Seconds = {peer.name: [] for peer in peers}
    for repeat in range(workload.repeats):
        prompts = workload.prompts(count, length, seed=repeat + 1000 * num_new)
        for peer in peers:
            start = time.perf_counter()
            generated = peer.run(prompts, num_new)
            seconds[peer.name].append(time.perf_counter() - start)
            assert [len(ids) for ids in generated] == [num_new] * count, f"{peer.name} stopped early"
        last = "  ".join(f"{name} {times[-1]:7.3f} s" for name, times in seconds.items())
        print(f"  {count:2d} x ({length} + {num_new} tokens), {repeat + 1}/{workload.repeats}:  {last}", flush=True)
    return seconds


def share_of_equal_tokens(peers: Sequence[Peer], workload: Workload) -> float:
    """How much two peers agree, 0 to 1, up to each prompt's first difference: the same weights, rounded differently."""
    prompts = workload.prompts(8, workload.num_prompt, seed=0)
    first, second = (peer.run(prompts, workload.num_new) for peer in peers)
    equal = 0
    for ours, theirs in zip(first, second, strict=True):
        different = (i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        equal += next(different, workload.num_new)
    return equal / (len(prompts) * workload.num_new)


class Limits:
    """The least seconds that this machine needs, for what has to be read and computed: whichever takes longer.

    Weights are read once a step and KV once per request. The embedding table counts as the head, which is tied to it.
    """

    def __init__(self, model: ModelConfig) -> None:
        self.read_bytes_per_s = machine.read_bytes_per_s()
        self.flops = machine.bfloat16_flops()
        layout = KVLayout(model.num_layers, model.num_kv_heads, model.head_dim, BLOCK_SIZE, DTYPE_SIZE)
        self._kv_bytes_per_token = layout.bytes_per_token
        self._weight_bytes = model.num_parameters * DTYPE_SIZE
        self._head_parameters = model.vocab_size * model.hidden_size
        self._body_parameters = model.num_parameters - self._head_parameters
        self._attention_flops = 4 * model.num_layers * model.num_heads * model.head_dim  # per query and key

    def decode_s(self, count: int, context: float) -> float:
        """A step that gives each of `count` requests a token."""
        num_bytes = self._weight_bytes + count * context * self._kv_bytes_per_token
        products = 2 * (self._body_parameters + self._head_parameters) + self._attention_flops * context
        return max(num_bytes / self.read_bytes_per_s, count * products / self.flops)

    def prefill_s(self, length: int) -> float:
        """A prompt of `length` tokens and the logits of its last one."""
        num_bytes = self._weight_bytes + length * self._kv_bytes_per_token
        products = 2 * (self._body_parameters * length + self._head_parameters) + self._attention_flops * length**2 / 2
        return max(num_bytes / self.read_bytes_per_s, products / self.flops)


def run(workload: Workload, threads: int) -> dict[str, Any]:
    """Measure everything; answers what goes into the result file."""
    torch.set_num_threads(threads)
    model = locate_model(EMBEDDED_MODEL)
    print(f"loading {model} twice", flush=True)
    shoal = Shoal(model, threads)
    peers: tuple[Peer, ...] = (Transformers(model), shoal)
    equal = share_of_equal_tokens(peers, workload)  # also warms both up
    result: dict[str, Any] = {
        "machine": machine.facts(threads),
        "model": EMBEDDED_MODEL,
        "dtype": "bfloat16",
        "num_prompt": workload.num_prompt,
        "num_new": workload.num_new,
        "repeats": workload.repeats,
        "share_of_equal_tokens": equal,
    }
    limits = Limits(shoal.model_config)
    result["limits"] = {"read_gb_per_s": limits.read_bytes_per_s / 1e9, "bfloat16_tflops": limits.flops / 1e12}
    context = workload.num_prompt + workload.num_new / 2
    for count in workload.request_counts:
        whole = measure(peers, workload, count, workload.num_prompt, workload.num_new)
        first = measure(peers, workload, count, workload.num_prompt, 1)
        steps = {name: _step_seconds(whole[name], first[name], workload.num_new) for name in whole}
        result[f"requests_{count}"] = {
            "seconds": whole,
            "tokens_per_s": _rates(whole, count * workload.num_new),
            "ratio": _ratio(whole),
            "decode_tokens_per_s": {name: count / step for name, step in steps.items()},
            "decode_share_of_limit": limits.decode_s(count, context) / steps["shoal"],
        }
    prefill = measure(peers, workload, 1, workload.num_prefill, 1)
    result["prefill"] = {
        "seconds": prefill,
        "tokens_per_s": _rates(prefill, workload.num_prefill),
        "ratio": _ratio(prefill),
        "share_of_limit": limits.prefill_s(workload.num_prefill) / statistics.median(prefill["shoal"]),
    }
    return result


def _step_seconds(whole: Sequence[float], first: Sequence[float], num_new: int) -> float:
    """One decode step: what all but the first token took."""
    return (statistics.median(whole) - statistics.median(first)) / (num_new - 1)


def _rates(seconds: Seconds, num_tokens: int) -> Mapping[str, float]:
    return {name: num_tokens / statistics.median(times) for name, times in seconds.items()}


def _ratio(seconds: Seconds) -> float:
    """How many times as fast as transformers: the ratio of the medians."""
    return statistics.median(seconds["transformers"]) / statistics.median(seconds["shoal"])


def main() -> None:
    given = machine.options(__doc__)
    print(machine.write_result(given.results, "offline", run(given.workload, given.threads)))


if __name__ == "__main__":
    main()
