"""The draft model on the ranks guesses what it would say alone, whatever happened to a request before; and its memory
is counted.

Tiny random-weight models through the whole engine on the CPU. An executor in between listens to plans and results.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from shoal.engine.config import ConfigError, EngineOptions, SpeculativeOptions
from shoal.engine.core import EngineCore
from shoal.engine.executor import Executor, ExecutorInfo
from shoal.engine.parallel.topology import SINGLE, Topology
from shoal.engine.plan import ContinuedRequest, NewRequest, StepPlan, StepResult
from shoal.engine.request import BlockId, Request, RequestId, SamplingParams
from shoal.engine.runner.drafter import Coverage, Drafter
from shoal.engine.shapes import check_shape, planned_config
from shoal.engine.sizing import ModelSizing, group_block_bytes, rank_block_bytes
from shoal.engine.worker import LocalExecutor, Worker, detect_machine, resolve_options

BLOCK = 8
VOCAB = 300
SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NOISE = 0.004  # on the weights of "near"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model; `near` is a little off, `far` another one, `short` has fewer positions, `other` another vocabulary, and
    `foreign` is of a family that only transformers knows.
    """
    torch.manual_seed(1)
    target = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    near = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    with torch.no_grad():
        for own, given in zip(near.parameters(), target.parameters(), strict=True):
            own.copy_(given + NOISE * torch.randn_like(given))
    models = {
        "target": target,
        "near": near,
        "far": transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**{**SIZES, "head_dim": 16})),
        "short": transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, "max_position_embeddings": 40})),
        "other": transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, "vocab_size": VOCAB + 1})),
        "foreign": transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**SIZES, pad_token_id=0)),
    }
    folder = tmp_path_factory.mktemp("models")
    for name, model in models.items():
        model.save_pretrained(folder / name)
    return {name: folder / name for name in models}


@dataclass(frozen=True)
class Drafted:
    """What the draft model guessed for one request in one step."""

    request: NewRequest
    known_ids: tuple[int, ...]
    asked: int
    draft_ids: tuple[int, ...]


class Listener:
    """An Executor in front of another one. `ask` may lower how much a plan asks to be drafted."""

    def __init__(self, inner: Executor, ask: Callable[[int], int]) -> None:
        self._inner = inner
        self._ask = ask
        self._plans: list[StepPlan] = []
        self._new: dict[RequestId, NewRequest] = {}
        self._known: dict[RequestId, list[int]] = {}
        self.drafted: list[Drafted] = []
        self.num_copies = 0

    def start(self) -> ExecutorInfo:
        return self._inner.start()

    def submit(self, plan: StepPlan) -> None:
        continued = tuple(each._replace(num_to_draft=self._ask(each.num_to_draft)) for each in plan.continued)
        plan = replace(plan, continued=continued)
        self.num_copies += len(plan.copies)
        for new in plan.new:
            self._new[new.request_id], self._known[new.request_id] = new, list(new.token_ids)
        for each in plan.continued:
            self._known[each.request_id] += each.new_token_ids
        self._plans.append(plan)
        self._inner.submit(plan)

    def collect(self) -> StepResult:
        result = self._inner.collect()
        plan = self._plans.pop(0)
        assert plan.step == result.step
        asked = {each.request_id: each.num_to_draft for each in plan.continued}
        for request_id, draft_ids in result.draft_ids.items():
            known = (*self._known[request_id], *result.token_ids[request_id])
            self.drafted.append(Drafted(self._new[request_id], known, asked[request_id], draft_ids))
        return result

    def check(self) -> None:
        self._inner.check()

    def close(self) -> None:
        self._inner.close()


class Engine:
    """An engine core whose requests are driven by the test."""

    def __init__(self, options: EngineOptions, ask: Callable[[int], int] = lambda count: count) -> None:
        config = resolve_options(options)
        self.listener = Listener(LocalExecutor(config), ask)
        self.core = EngineCore(config, self.listener)
        self.core.start()
        self.tokens: dict[str, list[int]] = {}

    def add(self, name: str, prompt: tuple[int, ...], params: SamplingParams, **fields: Any) -> None:
        seed = fields.pop("seed", params.seed or 0)
        self.core.add(Request(RequestId(name), prompt, params, seed, arrival_s=len(self.tokens), **fields))
        self.tokens[name] = []

    def step(self) -> None:
        for output in self.core.step():
            self.tokens[output.request_id] += output.token_ids

    def drain(self) -> dict[str, list[int]]:
        while self.core.has_work:
            self.step()
        self.core.check()
        return self.tokens


def options_of(checkpoints: dict[str, Path], model: str = "target", draft: str | None = None, **fields: Any) -> Any:
    speculative = fields.pop("speculative", {})
    if draft is not None:
        fields["speculative"] = SpeculativeOptions(
            method="draft_model", model=str(checkpoints[draft]), **{"adaptive": False, **speculative}
        )
    given: dict[str, Any] = {
        "dtype": "float32", "num_threads": 1, "block_size": BLOCK, "num_blocks": 200, "max_running_requests": 16,
        "max_model_len": 128, "device": "cpu",
    }  # fmt: skip
    return EngineOptions(str(checkpoints[model]), **{**given, **fields})


def settings_of(index: int, **fields: Any) -> SamplingParams:
    """Greedy, and drawn in two ways, in turn."""
    ways: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": index},
        {"temperature": 0.7, "seed": index, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
    ]
    return SamplingParams(**{"max_tokens": 24, "ignore_eos": True, **ways[index % 3], **fields})


def assert_said_alone(checkpoints: dict[str, Path], draft: str, drafted: list[Drafted], **fields: Any) -> None:
    """Every draft is what the draft model goes on with by itself, with the same settings and random numbers."""
    alone = Engine(options_of(checkpoints, draft, enable_prefix_caching=False, **fields))
    for index, each in enumerate(drafted):
        params = replace(each.request.params, max_tokens=len(each.draft_ids), ignore_eos=True, min_tokens=0)
        alone.add(str(index), each.known_ids, params, seed=each.request.seed, stream=each.request.stream)
    answers = alone.drain()
    assert drafted
    for index, each in enumerate(drafted):
        assert tuple(answers[str(index)]) == each.draft_ids


def prompts_of(count: int, rng: random.Random) -> list[tuple[int, ...]]:
    """Some begin as others do."""
    shared = [rng.randrange(3, VOCAB) for _ in range(3 * BLOCK)]
    return [
        (*shared[: rng.randrange(len(shared))], *(rng.randrange(3, VOCAB) for _ in range(rng.randrange(1, 20))))
        for _ in range(count)
    ]


def ask_all(count: int) -> int:
    return count


def ask_now_and_then(rng: random.Random) -> Callable[[int], int]:
    return lambda count: rng.choice((0, 0, 1, count, count))


@pytest.mark.parametrize("ask", ["all", "now and then"])
@pytest.mark.parametrize("draft", ["near", "far"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_drafts_are_what_the_draft_model_says_alone(
    checkpoints: dict[str, Path], draft: str, dtype: str, ask: str
) -> None:
    """Chunked prompts, cached prefixes, forks with copies, rejections, preemption, drafting paused and resumed."""
    rng = random.Random(0)
    fields = {"num_blocks": 26, "watermark": 0.0, "max_step_tokens": 24, "dtype": dtype}
    plain = Engine(options_of(checkpoints, **fields))
    engine = Engine(
        options_of(checkpoints, draft=draft, speculative={"num_speculative_tokens": 4}, **fields),
        ask_all if ask == "all" else ask_now_and_then(rng),
    )
    for each in (plain, engine):
        for index, prompt in enumerate(prompts_of(12, random.Random(1))):
            each.add(f"r{index}", prompt, settings_of(index))
            if index % 4 == 0:
                for stream in (1, 2):
                    params = settings_of(1, seed=index)
                    each.add(f"r{index}/{stream}", prompt, params, stream=stream, fork_of=RequestId(f"r{index}"))
    assert engine.drain() == plain.drain()
    stats, drafted = engine.core.stats(), engine.listener.drafted
    assert stats.preemptions_total > 0
    assert stats.cached_tokens_total > 0
    assert engine.listener.num_copies > 0
    assert stats.drafts.num_accepted < stats.drafts.num_drafted
    assert_said_alone(checkpoints, draft, drafted, dtype=dtype)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_model_that_drafts_for_itself_is_always_right_drawn_tokens_too(
    checkpoints: dict[str, Path], index: int
) -> None:
    engine = Engine(options_of(checkpoints, draft="target", speculative={"num_speculative_tokens": 5}))
    plain = Engine(options_of(checkpoints))
    for each in (engine, plain):
        each.add("r", (5, 6, 7), settings_of(index, max_tokens=40))
    assert engine.drain() == plain.drain()
    drafts = engine.core.stats().drafts
    assert drafts.num_accepted == drafts.num_drafted > 30
    assert engine.core.stats().steps_total < 12


def test_known_tokens_are_computed_once(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Forks share what the first of them computes, right guesses are not computed again, and rounds count for nothing
    else.
    """
    computed: list[int] = []
    forward = Drafter._forward

    def counting(self: Drafter, input_ids: torch.Tensor, *given: Any) -> torch.Tensor:
        computed.append(len(input_ids))
        return forward(self, input_ids, *given)

    monkeypatch.setattr(Drafter, "_forward", counting)
    engine = Engine(options_of(checkpoints, draft="target", speculative={"num_speculative_tokens": 3}))
    prompt = tuple(range(3, 3 + 5 * BLOCK + 3))
    engine.add("r", prompt, settings_of(0, max_tokens=2))
    for stream in range(1, 5):
        engine.add(f"r/{stream}", prompt, settings_of(1, max_tokens=2), stream=stream, fork_of=RequestId("r"))
    engine.drain()
    assert not computed  # there is nothing to guess for the last token
    engine.add("s", prompt, settings_of(0, max_tokens=40))
    for stream in range(1, 5):
        engine.add(f"s/{stream}", prompt, settings_of(1, max_tokens=40), stream=stream, fork_of=RequestId("s"))
    engine.drain()
    # The prompt's shared blocks once, and a few tokens behind them and every token that came once for each request.
    assert sum(computed) <= len(prompt) + 5 * (40 + 4)


def test_drafts_end_with_the_draft_models_positions(checkpoints: dict[str, Path]) -> None:
    engine = Engine(options_of(checkpoints, draft="short", speculative={"num_speculative_tokens": 6}))
    engine.add("r", tuple(range(3, 33)), settings_of(0, max_tokens=30))
    engine.drain()
    drafted = engine.listener.drafted
    assert max(len(each.known_ids) + len(each.draft_ids) for each in drafted) == 41  # the last one is not computed
    assert max(len(each.known_ids) for each in drafted) <= 40
    assert_said_alone(checkpoints, "short", drafted[:3], max_model_len=40)


def test_a_model_that_only_transformers_knows_can_draft(checkpoints: dict[str, Path]) -> None:
    plain, engine = Engine(options_of(checkpoints)), Engine(options_of(checkpoints, draft="foreign"))
    for each in (plain, engine):
        each.add("r", (5, 6, 7), settings_of(0))
    assert engine.drain() == plain.drain()
    assert_said_alone(checkpoints, "foreign", engine.listener.drafted)


def plan_of(step: int, *entries: NewRequest | ContinuedRequest, **fields: Any) -> StepPlan:
    new = tuple(entry for entry in entries if isinstance(entry, NewRequest))
    continued = tuple(entry for entry in entries if isinstance(entry, ContinuedRequest))
    return StepPlan(step, new, continued, **fields)


def new_of(name: str, num_computed: int, *blocks: int) -> NewRequest:
    ids = tuple(BlockId(block) for block in blocks)
    return NewRequest(RequestId(name), (), 0, num_computed, 1, ids, SamplingParams(), 0, 0)


def table(*blocks: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.array(blocks, np.int32)


def test_coverage_follows_blocks_from_request_to_request() -> None:
    coverage = Coverage(num_blocks=10, block_size=4)
    assert coverage.follow(plan_of(1, new_of("a", 0, 1, 2, 3))) == []
    coverage.cover(table(1, 2, 3), 10)
    assert coverage.num_covered(table(1, 2, 3)) == 10
    # A fork shares the first block and has a copy of the second, of which one token is its own too.
    copies = ((BlockId(2), BlockId(4)), (BlockId(5), BlockId(6)))
    assert coverage.follow(plan_of(2, new_of("b", 5, 1, 4, 7), copies=copies)) == [(2, 4)]
    assert coverage.num_covered(table(1, 4, 7)) == 5
    assert coverage.num_covered(table(1, 2, 3)) == 10
    # What is handed out again is empty: at once, and while a request runs. A found prefix stays.
    coverage.follow(plan_of(3, new_of("c", 4, 1, 2)))
    assert coverage.num_covered(table(1, 2)) == 4
    coverage.cover(table(1, 2), 8)
    coverage.follow(plan_of(4, ContinuedRequest(RequestId("c"), 8, 1, (), (BlockId(3),))))
    assert coverage.num_covered(table(1, 2, 3)) == 8


# -- memory and settings -----------------------------------------------------------------------------------------------


def rank_topologies(tensor_parallel: int, pipeline_parallel: int) -> Iterator[Topology]:
    for stage in range(pipeline_parallel):
        for tensor_rank in range(tensor_parallel):
            yield Topology(tensor_rank, tensor_parallel, stage, pipeline_parallel)


@pytest.mark.parametrize(("tensor_parallel", "draft_tensor_parallel", "stages"), [(1, 1, 2), (2, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_is_counted_where_it_is_taken(
    checkpoints: dict[str, Path], dtype: str, tensor_parallel: int, draft_tensor_parallel: int, stages: int
) -> None:
    options = options_of(
        checkpoints, draft="far", dtype=dtype, tensor_parallel=tensor_parallel, pipeline_parallel=stages,
        speculative={"draft_tensor_parallel": draft_tensor_parallel},
    )  # fmt: skip
    config = planned_config(options, detect_machine("cpu"))
    sizing, plain = ModelSizing(config), ModelSizing(replace(config, speculative=None, draft_model=None))
    pool_bytes = 0
    for topology in rank_topologies(tensor_parallel, stages):
        worker = Worker(config, topology)
        worker.load()
        kv_bytes = worker.allocate(50)
        need = sizing.rank(topology)
        assert worker.weight_bytes == need.weight_bytes
        assert kv_bytes == 50 * BLOCK * need.kv_bytes_per_token == 50 * rank_block_bytes(config, topology)
        has_draft = topology.is_last_stage and topology.tensor_rank < draft_tensor_parallel
        assert (need.weight_bytes > plain.rank(topology).weight_bytes) == has_draft
        pool_bytes += kv_bytes
    assert pool_bytes == 50 * group_block_bytes(config)


def test_kv_memory_is_of_both_models(checkpoints: dict[str, Path]) -> None:
    options = options_of(checkpoints, draft="target", num_blocks=None, kv_memory_bytes=2**20)
    config = resolve_options(options)
    plain = resolve_options(replace(options, speculative=None))
    assert group_block_bytes(config) == 2 * group_block_bytes(plain)
    worker = Worker(config)
    worker.load()
    assert worker.num_blocks_possible() == 2**20 // group_block_bytes(config)
    check_shape(config, detect_machine("cpu"))


def check(options: EngineOptions) -> None:
    """What is refused before any rank starts."""
    machine = detect_machine("cpu")
    check_shape(planned_config(options, machine), machine)


@pytest.mark.parametrize(
    ("draft", "speculative", "fields", "message"),
    [
        ("other", {}, {}, "vocabulary"),
        ("near", {"draft_tensor_parallel": 2}, {}, "must be 1 or tensor_parallel"),
        ("near", {"draft_tensor_parallel": 2}, {"tensor_parallel": 4}, "must be 1 or tensor_parallel"),
        ("near", {"draft_tensor_parallel": 3}, {"tensor_parallel": 3, "model": "wide"}, "cannot share 6 heads"),
        ("foreign", {"draft_tensor_parallel": 2}, {"tensor_parallel": 2}, "one rank only"),
        ("missing", {}, {}, "does not exist"),
    ],
)
def test_drafts_that_cannot_work_are_refused(
    checkpoints: dict[str, Path],
    tmp_path: Path,
    draft: str,
    speculative: dict[str, Any],
    fields: dict[str, Any],
    message: str,
) -> None:
    wide = transformers.LlamaConfig(**{**SIZES, "hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3})
    transformers.LlamaForCausalLM(wide).save_pretrained(tmp_path / "wide")
    paths = checkpoints | {"missing": tmp_path / "missing", "wide": tmp_path / "wide"}
    with pytest.raises(ConfigError, match=message) as caught:
        check(options_of(paths, draft=draft, speculative=speculative, **fields))
    assert caught.value.field == "speculative"


def test_the_draft_model_is_on_the_last_stage(checkpoints: dict[str, Path]) -> None:
    shared = options_of(checkpoints, draft="far", tensor_parallel=2, speculative={"draft_tensor_parallel": 2})
    config = planned_config(replace(shared, pipeline_parallel=2), detect_machine("cpu"))
    assert [topology.of_draft(config) for topology in rank_topologies(2, 2)] == [
        None, None, Topology(0, 2, 0, 1), Topology(1, 2, 0, 1),
    ]  # fmt: skip
    alone = options_of(checkpoints, draft="far", tensor_parallel=2, pipeline_parallel=2)
    config = planned_config(alone, detect_machine("cpu"))
    assert [topology.of_draft(config) for topology in rank_topologies(2, 2)] == [None, None, SINGLE, None]
