"""Beam search says what transformers' `generate` says, however it is served, and shares what beams have in common."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.engine.config import EngineOptions, SpeculativeOptions
from shoal.engine.core import EngineCore
from shoal.engine.request import (
    FinishReason,
    RequestError,
    RequestId,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
    best_samples,
    requests_of,
)
from shoal.engine.scheduling.beam_search import BeamSearch
from shoal.engine.worker import LocalExecutor, resolve_options

VOCAB = 80
END, OTHER_END = 2, 3
NGRAM = SpeculativeOptions(method="ngram", num_speculative_tokens=3, adaptive=False)


def beams(n: int, width: int, **fields: Any) -> SamplingParams:
    return SamplingParams(n=n, best_of=width, use_beam_search=True, **fields)


# -- against transformers --------------------------------------------------------------------------------------


class Model(NamedTuple):
    options: EngineOptions
    oracle: transformers.LlamaForCausalLM


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A tiny Llama that ends a text every ten tokens or so."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        max_position_embeddings=2048,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=END,
    )
    oracle = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        oracle.lm_head.weight[END] *= 2.5
        oracle.lm_head.weight[OTHER_END] *= 2.0
    path: Path = tmp_path_factory.mktemp("tiny-llama")
    oracle.save_pretrained(path)
    return Model(EngineOptions(str(path), dtype="float32", num_threads=1, block_size=8, num_blocks=200), oracle)


def answer_of(oracle: transformers.LlamaForCausalLM, prompt: list[int], params: SamplingParams) -> list[list[int]]:
    """transformers' own."""
    ends = [*([] if params.ignore_eos else [END]), *params.stop_token_ids]
    sequences = oracle.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        num_beams=params.width,
        num_return_sequences=params.n,
        do_sample=False,
        max_new_tokens=params.max_tokens,
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
        eos_token_id=ends or -1,
        pad_token_id=0,
    )
    answers = []
    for sequence in sequences[:, len(prompt) :].tolist():
        length = next((i + 1 for i, token in enumerate(sequence) if token in ends), len(sequence))
        answers.append(sequence[:length])
    return answers


class Case(NamedTuple):
    prompt: list[int]
    params: SamplingParams
    answer: list[list[int]]


@pytest.fixture(scope="module")
def cases(model: Model) -> list[Case]:
    """Every width, length penalty and stopping rule, twice."""
    numbers = random.Random(0)
    settings = [
        (width, penalty, stopping)
        for width in range(2, 7)
        for penalty in (-1.0, 0.0, 0.5, 1.0, 2.0)
        for stopping in (False, True, "never")
    ]
    made = []
    for width, penalty, stopping in settings * 2:
        prompt = [numbers.randrange(4, VOCAB) for _ in range(numbers.randrange(1, 30))]
        params = beams(
            numbers.choice((1, width - 1, width, width)),
            width,
            length_penalty=penalty,
            early_stopping=stopping,
            max_tokens=numbers.choice((1, 8, 24, 24)),
            stop_token_ids=numbers.choice(((), (OTHER_END,))),
            ignore_eos=numbers.random() < 0.2,
        )
        made.append(Case(prompt, params, answer_of(model.oracle, prompt, params)))
    return made


class Engine:
    """An engine core, in this process, that answers prompts."""

    def __init__(self, options: EngineOptions, **fields: Any) -> None:
        config = resolve_options(replace(options, **fields))
        self.core = EngineCore(config, LocalExecutor(config))
        self.core.start()
        self._num_calls = 0

    def answer(
        self,
        prompts: Sequence[tuple[list[int], SamplingParams]],
        observe: Callable[[list[RequestOutput]], None] = lambda outputs: None,
    ) -> list[list[RequestOutput]]:
        """What each gets, all at once. `observe` sees each step's outputs."""
        names = []
        for prompt, params in prompts:
            self._num_calls += 1
            ids = tuple(RequestId(f"{self._num_calls}-{i}") for i in range(params.num_samples))
            for request in requests_of(ids, tuple(prompt), params, seed=0, arrival_s=float(self._num_calls)):
                self.core.check_request(request)
                self.core.add(request)
            names.append(ids)
        merged: dict[RequestId, RequestOutput] = {}
        while self.core.has_work:
            outputs = self.core.step()
            observe(outputs)
            for output in outputs:
                before = merged.get(output.request_id)
                if before is not None:
                    output = output._replace(
                        token_ids=before.token_ids + output.token_ids, logprobs=before.logprobs + output.logprobs
                    )
                merged[output.request_id] = output
        self.core.check()
        return [[merged[request_id] for request_id in ids] for ids in names]


def token_ids(outputs: list[list[RequestOutput]]) -> list[list[list[int]]]:
    return [[list(output.token_ids) for output in group] for group in outputs]


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"max_running_requests": 6, "enable_prefix_caching": False}, id="few at a time"),
        pytest.param({"max_running_requests": 64}, id="together"),
        pytest.param({"max_running_requests": 64, "async_scheduling": True}, id="planned ahead"),
        pytest.param({"max_running_requests": 7, "max_step_tokens": 9}, id="in chunks"),
        pytest.param({"max_running_requests": 24, "num_blocks": 40, "watermark": 0.0}, id="in little memory"),
        pytest.param(
            {
                "max_running_requests": 6, "num_blocks": 12, "watermark": 0.0, "max_model_len": 64,
                "enable_prefix_caching": False, "async_scheduling": True,
            },
            id="in next to no memory",
        ),
    ],
)  # fmt: skip
def test_hypotheses_are_those_of_transformers(model: Model, cases: list[Case], fields: dict[str, Any]) -> None:
    """Together, and cold and then from cached prefixes."""
    engine = Engine(model.options, **fields)
    for _ in range(2):
        assert token_ids(engine.answer([case[:2] for case in cases])) == [case.answer for case in cases]
    if "num_blocks" in fields:
        assert engine.core.stats().preemptions_total > 10
    num_ended = sum(ids[-1] in (END, OTHER_END) for case in cases for ids in case.answer)
    assert 0.2 < num_ended / sum(len(case.answer) for case in cases) < 0.9


def test_beams_among_samples_change_nobodys_tokens(model: Model, cases: list[Case]) -> None:
    sampled = SamplingParams(n=3, seed=1, max_tokens=12, ignore_eos=True)
    alone = token_ids(Engine(model.options).answer([(case.prompt, sampled) for case in cases[:20]]))
    mixed = [request for case in cases[:20] for request in ((case.prompt, sampled), case[:2])]
    answers = token_ids(Engine(model.options, num_blocks=60, max_running_requests=16, watermark=0.0).answer(mixed))
    assert answers[1::2] == [case.answer for case in cases[:20]]
    assert [len(ids) for group in answers[::2] for ids in group] == [12] * 60
    assert [ids for ids, *_ in answers[::2]] == [ids for ids, *_ in alone]


def test_log_probabilities_finish_reasons_and_times(model: Model, cases: list[Case]) -> None:
    engine = Engine(model.options)
    for case in cases[:10]:
        params = replace(case.params, logprobs=2)
        ends = {*params.stop_token_ids, *(() if params.ignore_eos else (END,))}
        (outputs,) = engine.answer([(case.prompt, params)])
        for output in outputs:
            with torch.inference_mode():
                logits = model.oracle(torch.tensor([[*case.prompt, *output.token_ids]])).logits[0]
            expected = torch.log_softmax(logits, -1)[len(case.prompt) - 1 : -1]
            for token, reported, row in zip(output.token_ids, output.logprobs, expected, strict=True):
                assert reported.logprob == pytest.approx(float(row[token]), abs=1e-4)
                assert reported.rank == 1 + int((row > row[token] + 1e-6).sum())
                assert list(reported.top_ids) == row.topk(2).indices.tolist()
            assert output.finish_reason is (FinishReason.STOP if output.token_ids[-1] in ends else FinishReason.LENGTH)
            assert output.times is not None
            assert output.times.num_output_tokens == len(output.token_ids)
            assert output.times.num_prompt_tokens == len(case.prompt)


def test_the_length_of_the_model_ends_beams(model: Model, cases: list[Case]) -> None:
    prompt = cases[0].prompt
    limit = len(prompt) + 10
    params = beams(3, 3, max_tokens=None, ignore_eos=True)
    (outputs,) = Engine(model.options, max_model_len=limit).answer([(prompt, params)])
    assert token_ids([outputs]) == [answer_of(model.oracle, prompt, replace(params, max_tokens=10))]


@pytest.mark.parametrize("fields", [{"n": 8}, {"n": 2, "best_of": 8}, {"n": 2, "best_of": 8, "use_beam_search": True}])
def test_eight_ways_on_from_1000_tokens_share_their_blocks(model: Model, fields: dict[str, Any]) -> None:
    """At most 1.15 times the prompt blocks of one."""
    block_size, num_prompt = 16, 1000
    one = -(-num_prompt // block_size)
    engine = Engine(model.options, num_blocks=400, block_size=block_size, max_running_requests=8)
    peak = 0

    def measure(outputs: list[RequestOutput]) -> None:
        nonlocal peak
        tables = [engine.core._kv.table(request_id) for request_id in engine.core._scheduler._running]
        if len(tables) == 8:
            peak = max(peak, len({block for table in tables for block in table[:one]}))

    params = SamplingParams(max_tokens=40, ignore_eos=True, **fields)
    engine.answer([([4 + i * i % 70 for i in range(num_prompt)], params)], measure)
    assert one < peak <= 1.15 * one


@pytest.mark.parametrize(("stopping", "is_over"), [(False, True), (True, True), ("never", False)])
def test_a_search_is_over_where_no_beam_is_better_now_or_none_can_become_better(
    stopping: bool | str, is_over: bool
) -> None:
    search = BeamSearch(beams(1, 1, early_stopping=stopping), frozenset({0}), 4)
    search.advance([TokenLogprobs(-1.0, 1, (0, 5), (-1.0, -1.2))])
    assert search.is_over == is_over


@pytest.mark.parametrize(("stopping", "is_over"), [(False, False), (True, True), ("never", False)])
@pytest.mark.parametrize("penalty", [1.0, -1.0])
def test_a_full_search_goes_on_while_a_beam_is_better_unless_it_shall_stop_early(
    stopping: bool | str, is_over: bool, penalty: float
) -> None:
    search = BeamSearch(beams(2, 2, early_stopping=stopping, length_penalty=penalty), frozenset({0}), 4)
    search.advance([TokenLogprobs(-0.4, 1, (5, 0, 6), (-0.4, -0.5, -1.1))])
    assert not search.is_over
    search.advance([TokenLogprobs(-0.1, 1, (8, 0), (-0.05, -0.1)), TokenLogprobs(-3.0, 1, (9, 10), (-3.0, -4.0))])
    assert len(search.finished) == 2
    assert search.is_over == is_over


# -- against a device that checks every slot -------------------------------------------------------------------


def prompt_of(seed: int, length: int) -> tuple[int, ...]:
    numbers = random.Random(seed)
    return tuple(numbers.randrange(1, 997) for _ in range(length))


def names_of(name: str, n: int) -> tuple[RequestId, ...]:
    return tuple(RequestId(name if i == 0 else f"{name}.{i}") for i in range(n))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_nothing_leaks_or_hangs_and_all_is_exact(make_harness, expected, expected_hypotheses, data) -> None:
    """Searches and plain requests come, go on and are aborted in any order, where blocks and places are scarce."""
    harness = make_harness(
        num_blocks=data.draw(st.integers(12, 30)),
        max_step_tokens=data.draw(st.integers(6, 24)),
        max_running_requests=data.draw(st.integers(4, 6)),
        max_model_len=40,
        enable_prefix_caching=data.draw(st.booleans()),
        watermark=0.0,
        window=data.draw(st.sampled_from([None, None, 5])),
        pipeline_parallel=data.draw(st.integers(1, 3)),
        async_scheduling=data.draw(st.booleans()),
        scheduling_policy=data.draw(st.sampled_from(["shortest_first", "priority", "fcfs"])),
        speculative=data.draw(st.sampled_from([None, NGRAM])),
    )
    live: dict[str, tuple[tuple[int, ...], SamplingParams | None, int]] = {}
    count = 0
    for _ in range(data.draw(st.integers(5, 30))):
        match data.draw(st.sampled_from(["beams", "plain", "step", "step", "step", "preempt", "abort"])):
            case "beams":
                width = data.draw(st.integers(1, 4))
                fields = {
                    "n": data.draw(st.integers(1, width)),
                    "best_of": width,
                    "use_beam_search": True,
                    "length_penalty": data.draw(st.sampled_from([-1.0, 0.5, 1.0, 3.0])),
                    "early_stopping": data.draw(st.sampled_from([False, True, "never"])),
                }
                ids, max_tokens = prompt_of(data.draw(st.integers(0, 2)), data.draw(st.integers(1, 20))), 12
                name, names = f"r{count}", names_of(f"r{count}", fields["n"])
                harness.add(name, ids, max_tokens, params=fields, hypothesis_ids=names)
                live[name] = (ids, SamplingParams(**fields), max_tokens)
                count += 1
            case "plain":
                ids, max_tokens = prompt_of(data.draw(st.integers(0, 2)), data.draw(st.integers(1, 20))), 8
                live[f"r{count}"] = (ids, None, max_tokens)
                harness.add(f"r{count}", ids, max_tokens, params={"ignore_eos": True})
                count += 1
            case "preempt" if running := list(harness.core._scheduler._running.values()):
                harness.core._scheduler._preempt(data.draw(st.sampled_from(running)))
            case "abort" if live:
                name = data.draw(st.sampled_from(sorted(live)))
                harness.core.abort(RequestId(name))
                del live[name]
            case _:
                harness.step()
    harness.drain()
    for name, (ids, params, max_tokens) in live.items():
        if params is None:
            assert harness.outputs[name] == expected(ids, max_tokens)
        else:
            answers = [harness.outputs[each] for each in names_of(name, params.n)]
            assert answers == expected_hypotheses(ids, params, max_tokens)
    stats = harness.core.stats()
    assert stats.num_free_blocks == stats.num_blocks
    assert not harness.core._scheduler._beams
    assert not any(entry.draft_ids for plan in harness.executor.plans for entry in plan.continued if "/" in entry[0])


def test_two_searches_that_hold_all_blocks_both_end(make_harness, expected_hypotheses) -> None:
    harness = make_harness(
        num_blocks=10, watermark=0.0, max_running_requests=8, max_model_len=36, enable_prefix_caching=False
    )
    params = {"n": 4, "use_beam_search": True}
    for name in ("a", "b"):
        harness.add(name, prompt_of(1, 12), 20, params=params, hypothesis_ids=names_of(name, 4))
    harness.drain()
    for name in ("a", "b"):
        answers = [harness.outputs[each] for each in names_of(name, 4)]
        assert answers == expected_hypotheses(prompt_of(1, 12), SamplingParams(**params), 20)
    assert harness.core.stats().preemptions_total > 0


def test_a_search_begins_when_there_are_places_for_all_its_beams(make_harness) -> None:
    """Else they would hold each other up: with all places taken by first beams, none could have a second one."""
    harness = make_harness(num_blocks=400, max_running_requests=8)
    for i in range(8):
        params = {"n": 4, "use_beam_search": True, "ignore_eos": True}
        harness.add(f"r{i}", prompt_of(i, 8), 10, params=params, hypothesis_ids=names_of(f"r{i}", 4))
    harness.drain()
    assert len(harness.executor.plans) == 4 * 10
    assert harness.core.stats().preemptions_total == 0


def test_a_search_says_first_that_its_prompt_is_computed_and_then_all(make_harness) -> None:
    harness = make_harness(max_step_tokens=8, max_running_requests=8)
    names = names_of("a", 2)
    harness.add("a", prompt_of(1, 20), 6, params={"n": 2, "use_beam_search": True}, hypothesis_ids=names)
    outputs = []
    while harness.core.has_work:
        outputs.append(harness.step())
    assert [[output.request_id for output in step] for step in outputs if step] == [["a"], list(names)]
    assert [output.token_ids for output in outputs[2]] == [()]
    assert harness.core.stats().requests_finished_total == 2


def test_abort_frees_all_beams(make_harness) -> None:
    for is_async in (False, True):
        harness = make_harness(async_scheduling=is_async)
        harness.add("a", prompt_of(1, 20), params={"n": 4, "use_beam_search": True}, hypothesis_ids=names_of("a", 4))
        for _ in range(4):
            harness.step()
        assert harness.core.stats().num_running > 1
        assert harness.core.abort(RequestId("a")) is not None
        assert harness.core.abort(RequestId("a")) is None
        harness.drain()
        assert not harness.finished
        assert harness.core.stats().num_free_blocks == harness.core.stats().num_blocks


def test_a_search_that_can_never_run_is_refused(make_harness) -> None:
    harness = make_harness(num_blocks=12, max_running_requests=4, max_step_tokens=16)

    def add(width: int, num_prompt: int = 4, **params: Any) -> None:
        fields = {"best_of": width, "use_beam_search": True, **params}
        harness.add("a", prompt_of(1, num_prompt), params=fields)

    with pytest.raises(RequestError, match="more than the 4 requests") as caught:
        add(5)
    assert caught.value.param == "best_of"
    with pytest.raises(RequestError, match="take 12 KV blocks; this model has 11"):
        add(4, num_prompt=32)
    with pytest.raises(RequestError, match="fewer stop_token_ids") as caught:
        add(4, stop_token_ids=tuple(range(1, 17)))
    assert caught.value.param == "stop_token_ids"
    add(4, num_prompt=28)
    harness.drain()


# -- choosing --------------------------------------------------------------------------------------------------


def test_the_best_samples_have_the_highest_mean() -> None:
    assert best_samples([[-1.0], [-0.5, -0.7], [-0.2, -0.2, -3.0], [-0.6]], 2) == [1, 3]
    assert best_samples([[-1.0], [-1.0, -1.0], [-1.0]], 3) == [0, 1, 2]


def test_what_the_ranks_report_is_not_what_the_client_asked_for() -> None:
    assert SamplingParams(n=2, best_of=4).num_reported == 0
    assert SamplingParams(n=2, best_of=4, logprobs=3).num_reported == 3
    assert SamplingParams(n=2, best_of=2).num_reported is None
    assert beams(1, 3).num_reported == 20


def test_log_probabilities_of_a_hypothesis_are_those_of_its_own_tokens() -> None:
    search = BeamSearch(beams(1, 2, logprobs=1), frozenset({0}), 2)
    assert search.advance([TokenLogprobs(-0.1, 1, (5, 6, 7), (-0.1, -2.0, -4.0))]) == [0, 0]
    search.advance([TokenLogprobs(-3.0, 1, (1, 2), (-3.0, -3.5)), TokenLogprobs(-0.1, 1, (3, 4), (-0.1, -9.0))])
    assert search.is_over
    token_ids, logprobs = search.finished[0].tokens()
    assert token_ids == (6, 3)
    assert logprobs == (TokenLogprobs(-2.0, 2, (5,), (-0.1,)), TokenLogprobs(-0.1, 1, (3,), (-0.1,)))
    assert search.finished[0].score == pytest.approx(-2.1 / 2)
