"""Speculation never changes what is said, leaks nothing, and keeps to its limits, whoever guesses: on the fake device,
which checks every slot that is read.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from shoal.engine.config import SpeculativeOptions
from shoal.engine.plan import StepPlan, StepResult
from shoal.engine.request import FinishReason, Request, RequestId
from shoal.engine.speculation.draft_model import DraftModelProposer
from shoal.engine.speculation.proposer import NO_DRAFT, Draft

Guess = Callable[[tuple[int, ...], int], Sequence[int]]  # known tokens, how many -> guesses
Expected = Callable[[tuple[int, ...], int], list[int]]
MakeHarness = Callable[..., Any]


class Guesser:
    """A proposer that guesses whatever a function says."""

    def __init__(self, guess: Guess) -> None:
        self._guess = guess
        self.seen: set[str] = set()

    def propose(self, request: Request, most: int) -> Draft:
        if most < 1:
            return NO_DRAFT
        assert request.num_known < request.max_known
        self.seen.add(request.request_id)
        token_ids = tuple(self._guess(request.known_ids(0, request.num_known), most))[:most]
        return Draft(token_ids, (3,) * len(token_ids))

    def forget(self, request: Request) -> None:
        self.seen.discard(request.request_id)


def guesses(expected: Expected) -> dict[str, Guess]:
    def wrong(known: tuple[int, ...], most: int) -> list[int]:
        return [token + 1 for token in expected(known, most)]

    def half(known: tuple[int, ...], most: int) -> list[int]:
        return [*expected(known, most)[: most // 2], *wrong(known, most)[most // 2 :]]

    def any_tokens(known: tuple[int, ...], most: int) -> list[int]:
        numbers = random.Random(hash(known))
        said = expected(known, most)
        return [token if numbers.random() < 0.7 else 5 for token in said][: numbers.randrange(most + 1)]

    def end(known: tuple[int, ...], most: int) -> list[int]:
        return [0] * most

    return {"right": expected, "wrong": wrong, "half": half, "random": any_tokens, "end": end}


KINDS = ("right", "wrong", "half", "random", "end")
MakeSpeculative = Callable[..., Any]


@pytest.fixture
def speculative(make_harness: MakeHarness, expected: Expected) -> MakeSpeculative:
    def make(kind: str, *, num_drafts: int = 4, **options: Any) -> Any:
        return make_harness(
            proposer=Guesser(guesses(expected)[kind]),
            speculative=SpeculativeOptions(method="ngram", num_speculative_tokens=num_drafts, adaptive=False),
            **options,
        )

    return make


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("num_drafts", [1, 3, 8])
def test_says_what_it_says_without(
    speculative: MakeSpeculative, expected: Expected, kind: str, stages: int, is_async: bool, num_drafts: int
) -> None:
    harness = speculative(
        kind, num_drafts=num_drafts, pipeline_parallel=stages, async_scheduling=is_async, num_blocks=48,
        max_step_tokens=24, max_running_requests=8,
    )  # fmt: skip
    prompts = {f"r{i}": tuple(range(1 + i, 4 + 3 * i)) for i in range(6)}
    for name, prompt in prompts.items():
        harness.add(name, prompt, max_tokens=20)
    harness.drain()
    for name, prompt in prompts.items():
        assert harness.outputs[name] == expected(prompt, 20)
        assert harness.finished[name].finish_reason is FinishReason.LENGTH
    counts = harness.core.stats().drafts
    assert counts.num_drafted > 0
    if kind == "right":
        assert counts.num_accepted == counts.num_drafted
    if kind == "wrong":
        assert counts.num_accepted == 0
    assert not harness.core._proposer.seen  # every request was forgotten


def test_right_guesses_save_steps(speculative: MakeSpeculative, make_harness: MakeHarness) -> None:
    plain, fast = make_harness(), speculative("right", num_drafts=4)
    for harness in (plain, fast):
        harness.add("a", (1, 2, 3), max_tokens=31)
        harness.drain()
    assert plain.core.stats().steps_total == 31
    assert fast.core.stats().steps_total == 1 + 6  # the prompt's, then 5 tokens each
    assert fast.core.stats().drafts.accepted_at == (6, 6, 6, 6)


@pytest.mark.parametrize("num_drafts", [1, 4, 8])
def test_ends_inside_an_accepted_run(speculative: MakeSpeculative, expected: Expected, num_drafts: int) -> None:
    prompt = (5, 6, 7)
    said = expected(prompt, 30)
    for place in range(2, 12):
        harness = speculative("right", num_drafts=num_drafts)
        harness.add("a", prompt, max_tokens=30, params={"stop_token_ids": [said[place]]})
        harness.drain()
        first = said.index(said[place])
        assert harness.outputs["a"] == said[: first + 1]
        assert harness.finished["a"].finish_reason is FinishReason.STOP


@pytest.mark.parametrize("max_tokens", range(1, 12))
def test_never_says_more_than_asked(speculative: MakeSpeculative, expected: Expected, max_tokens: int) -> None:
    harness = speculative("right", num_drafts=8, max_model_len=16)
    harness.add("a", (1, 2, 3), max_tokens=max_tokens)
    harness.drain()
    assert harness.outputs["a"] == expected((1, 2, 3), max_tokens)


def test_drafts_preempt_nobody(speculative: MakeSpeculative) -> None:
    harness = speculative("wrong", num_drafts=8, num_blocks=14, enable_prefix_caching=False, watermark=0.0)
    for name in "abc":
        harness.add(name, (1, 2, 3, ord(name)), max_tokens=8)  # 3 blocks each at the end
    harness.drain()
    assert harness.core.stats().preemptions_total == 0


def test_guesses_for_a_request_that_left_meanwhile_are_not_kept(make_harness: MakeHarness) -> None:
    proposer = DraftModelProposer()
    harness = make_harness(proposer=proposer, speculative=SpeculativeOptions(method="ngram", adaptive=False))
    harness.add("stays", (1, 2, 3))
    harness.add("goes", (4, 5, 6))
    harness.step()
    execute = harness.executor.execute

    def abort_meanwhile(plan: StepPlan) -> StepResult:
        result = execute(plan)
        harness.core.abort(RequestId("goes"))
        return replace(result, draft_ids={RequestId("stays"): (7,), RequestId("goes"): (8,)})

    harness.executor.execute = abort_meanwhile
    harness.step()
    assert list(proposer._guessed) == ["stays"]


class Speculation(RuleBasedStateMachine):
    """Requests come, go and are preempted in any order, while guesses of any kind are verified and rolled back."""

    def __init__(self, speculative: MakeSpeculative, expected: Expected) -> None:
        super().__init__()
        self.make, self.expected = speculative, expected

    @initialize(
        kind=st.sampled_from(KINDS),
        num_drafts=st.integers(1, 8),
        num_blocks=st.integers(12, 40),
        stages=st.integers(1, 3),
        window=st.sampled_from([None, None, 5]),
    )
    def start(self, kind: str, num_drafts: int, num_blocks: int, stages: int, window: int | None) -> None:
        self.harness = self.make(
            kind, num_drafts=num_drafts, num_blocks=num_blocks, block_size=4, window=window,
            pipeline_parallel=stages, async_scheduling=stages > 1,
            max_model_len=40, max_step_tokens=16, max_running_requests=6,
        )  # fmt: skip
        self.prompts: dict[str, tuple[tuple[int, ...], int]] = {}
        self.num_added = 0

    @rule(length=st.integers(1, 20), shared=st.integers(0, 20), max_tokens=st.integers(1, 18), n=st.integers(1, 3))
    def add(self, length: int, shared: int, max_tokens: int, n: int) -> None:
        self.num_added += 1
        number = self.num_added
        prompt = tuple(range(1, min(shared, length) + 1)) + tuple(200 + number + i for i in range(length - shared))
        prompt = prompt or (9,)
        for i in range(n):
            name = f"r{number}-{i}"
            self.harness.add(name, prompt, max_tokens, fork_of=f"r{number}-0" if i else None)
            self.prompts[name] = (prompt, max_tokens)

    @rule(count=st.integers(1, 8))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.harness.step()

    @rule(which=st.integers(0, 50))
    def abort(self, which: int) -> None:
        alive = [name for name in self.prompts if name not in self.harness.finished]
        if alive:
            name = alive[which % len(alive)]
            if self.harness.core.abort(name) is not None:
                del self.prompts[name]

    @invariant()
    def has_said_nothing_else(self) -> None:
        for name, (prompt, max_tokens) in getattr(self, "prompts", {}).items():
            said = self.harness.outputs[name]
            assert said == self.expected(prompt, max_tokens)[: len(said)]

    def teardown(self) -> None:
        if hasattr(self, "harness"):
            self.harness.drain()
            for name, (prompt, max_tokens) in self.prompts.items():
                assert self.harness.outputs[name] == self.expected(prompt, max_tokens)
            assert self.harness.core.stats().kv_usage == 0.0
            assert not self.harness.core._proposer.seen


def test_any_order_of_events(speculative: MakeSpeculative, expected: Expected) -> None:
    run_state_machine_as_test(
        lambda: Speculation(speculative, expected),
        settings=settings(max_examples=60, stateful_step_count=30, deadline=None),
    )
