"""Speculation on any shape of a replica group says what one rank says without it, token for token.

`make test` takes a part of the matrix in which every proposer meets every shape, and few prompts; `make soak` takes all
of it and 200 prompts. The ranks are threads of this process.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
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
from shoal.engine.request import EngineStats, Request, RequestId, SamplingParams
from shoal.engine.worker import local_engine

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
METHODS = ("ngram", "suffix", "draft_model")
SHAPES = [(tensor, stages) for tensor in (1, 2) for stages in (1, 2, 3)]
GAMMAS = range(1, 9)
CONDITIONS: dict[str, dict[str, Any]] = {
    "whole": {},
    "chunked": {"max_step_tokens": 67},
    "preempted": {"num_blocks": 60, "watermark": 0.0, "enable_prefix_caching": False, "max_model_len": 80},
}
FEW, ALL = 20, 200
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
DRAWN = SamplingParams(temperature=0.8, top_p=0.9, repetition_penalty=1.1, seed=5, max_tokens=12)

Answers = dict[str, list[int]]


def quick(method: str, shape: tuple[int, int], gamma: int, condition: str) -> bool:
    """Every method on every shape, each with another number of drafts; the conditions in turn."""
    number = METHODS.index(method) * len(SHAPES) + SHAPES.index(shape)
    return gamma == 1 + number % len(GAMMAS) and condition == list(CONDITIONS)[number % len(CONDITIONS)]


def prompts(count: int) -> list[tuple[int, ...]]:
    """Some repeat themselves, some begin like others, some are of any tokens."""
    numbers = random.Random(1)
    beginning = [numbers.randrange(3, 97) for _ in range(24)]
    made = []
    for index in range(count):
        own = [numbers.randrange(3, 97) for _ in range(numbers.randrange(2, 16))]
        made.append(tuple((own * 3)[:40] if index % 3 == 0 else (beginning + own if index % 3 == 1 else own)))
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and one that is close to it."""
    path = tmp_path_factory.mktemp("models")
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    model.save_pretrained(path / "target")
    with torch.no_grad():
        for weights in model.parameters():
            weights.add_(0.02 * torch.randn_like(weights))
    model.save_pretrained(path / "draft_model")
    return path


def options(folder: Path, **fields: Any) -> EngineOptions:
    given = EngineOptions(
        str(folder / "target"), dtype="float32", num_threads=1, block_size=8, num_blocks=600, max_running_requests=64
    )
    return replace(given, **fields)


def answers(engine: EngineOptions, launcher: Launcher | None, count: int) -> Iterator[tuple[Answers, EngineStats]]:
    """What `count` prompts get, every fourth of them drawn; then the same once more, with the prefix cache."""
    factory = local_engine(engine) if launcher is None else group_engine(engine, launcher)
    core = EngineCore(*factory(lambda what, done, total: None))
    try:
        core.start()
        for turn in "ab":
            said: Answers = {}
            for index, prompt in enumerate(prompts(count)):
                name = RequestId(f"{turn}{index}")
                params = DRAWN if index % 4 == 3 else GREEDY
                core.add(Request(name, prompt, params, seed=index, arrival_s=float(index)))
                said[name[1:]] = []
            while core.has_work:
                for output in core.step():
                    said[output.request_id[1:]] += output.token_ids
            core.check()
            yield said, core.stats()
    finally:
        core.close()


@pytest.fixture(scope="module")
def plain(folder: Path) -> Callable[[int], Answers]:
    known: dict[int, Answers] = {}

    def say(count: int) -> Answers:
        if count not in known:
            known[count], _ = next(answers(options(folder, enable_prefix_caching=False), None, count))
        return known[count]

    return say


@pytest.mark.parametrize(
    ("method", "shape", "gamma", "condition", "count"),
    [
        pytest.param(
            method, shape, gamma, condition, count,
            id=f"{method}-TP{shape[0]}-PP{shape[1]}-{gamma}-{condition}-{count}",
            marks=() if count == FEW else pytest.mark.soak,
        )
        for method in METHODS
        for shape in SHAPES
        for gamma in GAMMAS
        for condition in CONDITIONS
        for count in (FEW, ALL)
        if count == ALL or quick(method, shape, gamma, condition)
    ],
)  # fmt: skip
def test_any_shape_says_what_one_rank_says_without(
    folder: Path,
    plain: Callable[[int], Answers],
    thread_launcher: Callable[[], Launcher],
    method: str,
    shape: tuple[int, int],
    gamma: int,
    condition: str,
    count: int,
) -> None:
    speculative = SpeculativeOptions.of(
        {
            "method": method,
            "num_speculative_tokens": gamma,
            "prompt_lookup_min": 1,
            "adaptive": False,
            "model": str(folder / method) if method == "draft_model" else None,
        }
    )
    engine = options(
        folder, tensor_parallel=shape[0], pipeline_parallel=shape[1], speculative=speculative, **CONDITIONS[condition]
    )
    launcher = None if shape == (1, 1) else thread_launcher()
    turns = list(answers(engine, launcher, count))
    assert [said for said, _ in turns] == [plain(count)] * 2
    stats = turns[-1][1]
    assert 0 < stats.drafts.num_accepted < stats.drafts.num_drafted
    if condition == "preempted":
        assert stats.preemptions_total > 0
    else:
        assert stats.cached_tokens_total > 0
