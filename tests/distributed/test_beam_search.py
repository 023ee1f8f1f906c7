"""Beam search over tensor ranks and pipeline stages finds what one rank finds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from shoal.engine.config import EngineOptions
from shoal.engine.core import EngineCore
from shoal.engine.group.coordinator import group_engine
from shoal.engine.group.launcher import Launcher
from shoal.engine.request import RequestId, SamplingParams, requests_of
from shoal.engine.worker import local_engine


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=97,
        max_position_embeddings=256,
        initializer_range=0.15,
        eos_token_id=2,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[2] *= 2.5
    path: Path = tmp_path_factory.mktemp("tiny-llama")
    model.save_pretrained(path)
    return path


def answers(checkpoint: Path, launcher: Launcher | None = None, **fields: Any) -> tuple[list[list[int]], int]:
    """The hypotheses about twelve prompts, asked at once, and how often a request was preempted."""
    options = EngineOptions(
        str(checkpoint), dtype="float32", num_threads=1, block_size=8, max_running_requests=12, **fields
    )
    factory = local_engine(options) if launcher is None else group_engine(options, launcher)
    core = EngineCore(*factory(lambda what, done, total: None))
    try:
        core.start()
        found: dict[RequestId, list[int]] = {}
        for index in range(12):
            params = SamplingParams(
                n=2,
                best_of=2 + index % 4,
                use_beam_search=True,
                max_tokens=16,
                length_penalty=(0.5, 1.0, 2.0)[index % 3],
            )
            ids = (RequestId(f"{index}-0"), RequestId(f"{index}-1"))
            prompt = tuple(3 + (index * 7 + position * position) % 90 for position in range(3 + 2 * index))
            found |= {request_id: [] for request_id in ids}
            for request in requests_of(ids, prompt, params, seed=0, arrival_s=float(index)):
                core.add(request)
        while core.has_work:
            for output in core.step():
                found[output.request_id] += output.token_ids
        core.check()
        return list(found.values()), core.stats().preemptions_total
    finally:
        core.close()


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(("tensor_ranks", "stages"), [(1, 2), (2, 1), (2, 2), (1, 3)])
def test_every_shape_finds_what_one_rank_finds(
    checkpoint: Path, thread_launcher: Callable[[], Launcher], tensor_ranks: int, stages: int, is_async: bool
) -> None:
    """With blocks for all, and with so few that beams are preempted."""
    expected, _ = answers(checkpoint, num_blocks=200)
    shape: dict[str, Any] = {
        "tensor_parallel": tensor_ranks, "pipeline_parallel": stages, "async_scheduling": is_async,
    }  # fmt: skip
    found, _ = answers(checkpoint, thread_launcher(), num_blocks=200, **shape)
    assert found == expected
    found, num_preemptions = answers(
        checkpoint, thread_launcher(), num_blocks=14, watermark=0.0, max_model_len=64, **shape
    )
    assert found == expected
    assert num_preemptions > 0
