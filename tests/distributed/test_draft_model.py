"""A draft model beside a model that many ranks share: on one of them or on all of the last stage.

Real messages, real gloo, real kernels; the ranks are threads of this process.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from shoal.engine.config import EngineOptions, SpeculativeOptions
from shoal.engine.core import EngineCore
from shoal.engine.group.coordinator import group_engine
from shoal.engine.group.launcher import Launcher
from shoal.engine.request import DraftCounts, Request, RequestId, SamplingParams
from shoal.engine.worker import local_engine

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 199,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NOISE = 0.004


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    target = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    near = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    with torch.no_grad():
        for own, given in zip(near.parameters(), target.parameters(), strict=True):
            own.copy_(given + NOISE * torch.randn_like(given))
    path = tmp_path_factory.mktemp("models")
    target.save_pretrained(path / "target")
    near.save_pretrained(path / "near")
    return path


def answer(options: EngineOptions, launcher: Launcher | None) -> tuple[dict[str, list[int]], DraftCounts]:
    """What eight requests get, greedy ones and drawn ones, and what became of drafts."""
    factory = local_engine(options) if launcher is None else group_engine(options, launcher)
    core = EngineCore(*factory(lambda what, done, total: None))
    numbers = random.Random(0)
    tokens: dict[str, list[int]] = {}
    try:
        core.start()
        for index in range(8):
            params = SamplingParams(temperature=(0.0, 0.8)[index % 2], seed=index, max_tokens=14, ignore_eos=True)
            prompt = tuple(numbers.randrange(3, 199) for _ in range(numbers.randrange(2, 40)))
            core.add(Request(RequestId(str(index)), prompt, params, index, arrival_s=index))
            tokens[str(index)] = []
        while core.has_work:
            for output in core.step():
                tokens[output.request_id] += output.token_ids
        core.check()
        return tokens, core.stats().drafts
    finally:
        core.close()


@pytest.mark.parametrize("draft", ["target", "near"])
@pytest.mark.parametrize(
    ("tensor_parallel", "draft_tensor_parallel", "stages"),
    [(2, 1, 1), (2, 2, 1), (1, 1, 2), (2, 2, 2), pytest.param(2, 1, 3, marks=pytest.mark.soak)],
)
@pytest.mark.parametrize("is_async", [False, True])
def test_a_draft_model_drafts_for_every_shape(
    folder: Path,
    thread_launcher: Callable[[], Launcher],
    draft: str,
    tensor_parallel: int,
    draft_tensor_parallel: int,
    stages: int,
    is_async: bool,
) -> None:
    plain = EngineOptions(
        str(folder / "target"), dtype="float32", num_threads=1, block_size=8, num_blocks=100, max_running_requests=8,
        max_step_tokens=24,
    )  # fmt: skip
    expected, _ = answer(plain, None)
    speculative = SpeculativeOptions(
        method="draft_model",
        model=str(folder / draft),
        draft_tensor_parallel=draft_tensor_parallel,
        num_speculative_tokens=4,
        adaptive=False,
    )
    shape = replace(
        plain, tensor_parallel=tensor_parallel, pipeline_parallel=stages, async_scheduling=is_async,
        speculative=speculative,
    )  # fmt: skip
    tokens, drafts = answer(shape, thread_launcher())
    assert tokens == expected
    assert drafts.num_drafted > 40
    if draft == "target":
        assert drafts.num_accepted == drafts.num_drafted
    else:
        assert 0.3 * drafts.num_drafted < drafts.num_accepted < drafts.num_drafted
