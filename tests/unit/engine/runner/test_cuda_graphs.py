"""Decode steps in graphs give what they give without. Recording is played by running the step anew on its buffers."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shoal.engine import worker
from shoal.engine.config import EngineOptions, SpeculativeOptions
from shoal.engine.core import EngineCore
from shoal.engine.request import Request, RequestId, SamplingParams
from shoal.engine.runner.cuda_graphs import decode_sizes
from shoal.engine.worker import LocalExecutor, resolve_options

EOS = 299


class _NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for values of the device, which no graph could repeat."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "masked_select"), func
        return func(*args, **(kwargs or {}))


class Recorder:
    """A Capture. As on a GPU a step is run once before it is recorded, and results stay where they are."""

    def __init__(self) -> None:
        self.num_captured = self.num_replayed = 0

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.num_captured += 1
        with _NoWaiting():
            run()
            result = run()

        def replay() -> Tensor:
            self.num_replayed += 1
            with _NoWaiting():
                # Tokens go to the host at once, which is a copy there and would be none here.
                return result.copy_(run()) if result.is_floating_point() else run()

        return replay


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=["llama", "mixtral"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    fields = {
        "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 512, "initializer_range": 0.2,
        "eos_token_id": EOS,
    }  # fmt: skip
    path: Path = tmp_path_factory.mktemp(request.param)
    if request.param == "llama":
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).save_pretrained(path)
    else:
        config = transformers.MixtralConfig(**fields, num_local_experts=4, sliding_window=20)
        transformers.MixtralForCausalLM(config).save_pretrained(path)
    return path


def generate(options: EngineOptions, settings: list[SamplingParams], *, has_graphs: bool) -> list[list[int]]:
    """The answers to random prompts, a request every other step, so that batches of all sizes occur."""
    config = replace(resolve_options(options), cuda_graphs=has_graphs)
    core = EngineCore(config, LocalExecutor(config))
    core.start()
    rng = random.Random(0)
    tokens: dict[str, list[int]] = {}
    waiting = list(enumerate(settings))
    step = 0
    while waiting or core.has_work:
        if waiting and step % 2 == 0:
            index, params = waiting.pop(0)
            prompt = tuple(rng.randrange(3, 290) for _ in range(rng.randrange(1, 40)))
            core.add(Request(RequestId(f"r{index}"), prompt, params, params.seed or 0, arrival_s=float(step)))
            tokens[f"r{index}"] = []
        for output in core.step():
            tokens[output.request_id] += output.token_ids
        step += 1
    core.close()
    return list(tokens.values())


def settings_of(index: int) -> SamplingParams:
    """Greedy, sampled, truncated, and what takes logits or more than a token: in turn."""
    params = SamplingParams(temperature=(index % 5 > 0) * 0.9, max_tokens=5 + index * 3 % 17, seed=index)
    changes: dict[int, dict[str, Any]] = {
        2: {"top_k": 30, "top_p": 0.9, "min_p": 0.01}, 3: {"presence_penalty": 0.5}, 4: {"logprobs": 3},
    }  # fmt: skip
    return replace(params, **changes.get(index % 5, {}))


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("num_blocks", [200, 22])
def test_tokens_are_those_without_graphs(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path, is_async: bool, num_blocks: int
) -> None:
    """Also with tokens that the coordinator does not know yet, and with requests that are preempted."""
    recorder = Recorder()
    monkeypatch.setattr(worker, "CudaCapture", lambda: recorder)
    options = EngineOptions(
        str(checkpoint), dtype="bfloat16", device="cpu", num_threads=1, block_size=8, num_blocks=num_blocks,
        max_running_requests=11, max_model_len=80, async_scheduling=is_async, watermark=0.0,
    )  # fmt: skip
    for settings in ([settings_of(index) for index in range(25)], [settings_of(index % 3) for index in range(25)]):
        assert generate(options, settings, has_graphs=True) == generate(options, settings, has_graphs=False)
    assert recorder.num_captured <= 2 * 2 * len(decode_sizes(11))  # a forward pass and a draw in each engine
    assert recorder.num_replayed > 100


def test_speculation_goes_without(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    """Steps with drafts have several tokens of a request; those between them run as graphs."""
    recorder = Recorder()
    monkeypatch.setattr(worker, "CudaCapture", lambda: recorder)
    options = EngineOptions(
        str(checkpoint), dtype="bfloat16", device="cpu", num_threads=1, block_size=8, num_blocks=200,
        max_running_requests=11, max_model_len=80,
    )  # fmt: skip
    settings = [settings_of(index % 3) for index in range(12)]
    speculative = SpeculativeOptions(method="ngram", prompt_lookup_min=1)
    drafted = generate(replace(options, speculative=speculative), settings, has_graphs=True)
    assert drafted == generate(options, settings, has_graphs=False)
    assert recorder.num_replayed > 0


@pytest.mark.parametrize("most", [1, 3, 8, 11, 256, 300])
def test_sizes_reach_every_batch(most: int) -> None:
    sizes = decode_sizes(most)
    assert sizes == sorted(set(sizes))
    assert (sizes[0], sizes[-1]) == (1, most)
    for count in range(64, most + 1):
        assert min(size for size in sizes if size >= count) <= count * 1.15
