"""How many drafts are worth their time."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.engine.config import SpeculativeOptions
from shoal.engine.request import Request, RequestId, SamplingParams
from shoal.engine.speculation import speculator as module
from shoal.engine.speculation.acceptance import PRIOR_CHANCE, Acceptance
from shoal.engine.speculation.draft_model import FIRST_PROBE_STEPS, DraftModelProposer, DraftRounds
from shoal.engine.speculation.proposer import NO_DRAFT, Draft
from shoal.engine.speculation.speculator import MARGIN, PATIENCE, PROBE_PERIOD, Speculator
from shoal.engine.step_time import StepTime, StepTimeFit

GAMMA = 4


class KnownTime:
    """A step's time as it is, instead of learned."""

    def __init__(self, base: float, per_token: float, per_round: float = 0.0) -> None:
        self._time = StepTime(base, 0.0, per_token, 0.0, per_round)

    def estimate(self) -> StepTime:
        return self._time

    def has_varied(self, index: int) -> bool:
        return True


class Copier:
    """Guesses the same tokens for every request, each with a level of its own."""

    def __init__(self, levels: Sequence[int] = (0, 1, 2, 3)) -> None:
        self.levels = levels
        self.num_calls = 0

    def propose(self, request: Request, most: int) -> Draft:
        self.num_calls += 1
        count = min(most, len(self.levels))
        return Draft(tuple(range(count)), tuple(self.levels[:count])) if count > 0 else NO_DRAFT

    def forget(self, request: Request) -> None:
        pass


def request(name: str, max_tokens: int = 100) -> Request:
    made = Request(RequestId(name), (1, 2, 3), SamplingParams(max_tokens=max_tokens), seed=0, arrival_s=0.0)
    made.max_known = 3 + max_tokens
    return made


def make(time: Any, proposer: Any = None, **options: Any) -> Speculator:
    given = SpeculativeOptions(method="ngram", num_speculative_tokens=GAMMA, **options)
    return Speculator(given, proposer or Copier(), cast(StepTimeFit, time))


def teach(speculator: Speculator, each: Request, levels: Sequence[int], chances: Sequence[float]) -> None:
    """Let a request show how often guesses of these levels are right."""
    for level, chance in zip(levels, chances, strict=True):
        for trial in range(400):
            is_right = int((trial + 1) * chance) > int(trial * chance)
            speculator._acceptance.observe(each.request_id, Draft((7,), (level,)), (7,) if is_right else (8,))


def rate(survivals: Sequence[float], count: int, time: KnownTime) -> float:
    step = time.estimate()
    return (1 + sum(survivals[:count])) / (step.seconds(0, 1, 0) + MARGIN * step.per_decode_token * count)


@given(
    chances=st.lists(st.floats(0.05, 0.95), min_size=GAMMA, max_size=GAMMA),
    base=st.floats(1e-3, 1.0),
    per_token=st.floats(1e-4, 1.0),
)
def test_one_request_gets_as_many_as_are_best(chances: list[float], base: float, per_token: float) -> None:
    time, each = KnownTime(base, per_token), request("a")
    speculator = make(time)
    teach(speculator, each, range(GAMMA), chances)
    survivals = list(
        itertools.accumulate(speculator._acceptance.chances(each.request_id, range(GAMMA)), lambda a, b: a * b)
    )
    chosen = speculator.choose([each], 1, 100).get(each.request_id, ())
    best = max(rate(survivals, count, time) for count in range(GAMMA + 1))
    assert rate(survivals, len(chosen), time) == pytest.approx(best, rel=1e-3)


def test_who_is_likelier_to_be_right_gets_more() -> None:
    speculator, sure, unsure = make(KnownTime(1.0, 0.15)), request("sure"), request("unsure")
    teach(speculator, sure, range(GAMMA), [0.95] * GAMMA)
    teach(speculator, unsure, range(GAMMA), [0.1] * GAMMA)
    assert {name: len(ids) for name, ids in speculator.choose([sure, unsure], 2, 100).items()} == {"sure": GAMMA}


def test_keeps_to_the_budget_and_to_what_a_request_may_say() -> None:
    speculator, one, other = make(KnownTime(1.0, 0.0)), request("a"), request("b", max_tokens=3)
    chosen = speculator.choose([one, other], 2, 100)
    assert {name: len(ids) for name, ids in chosen.items()} == {"a": GAMMA, "b": 2}
    assert sum(map(len, speculator.choose([one, other], 2, 3).values())) == 3
    assert speculator.choose([one, other], 2, 0) == {}


def test_where_a_token_more_costs_as_much_as_it_can_bring_nothing_is_even_proposed() -> None:
    proposer = Copier()
    speculator = make(KnownTime(0.0, 1.0), proposer)
    assert speculator.choose([request("a")], 1, 100) == {}
    assert proposer.num_calls == 0


def test_always_as_much_as_there_is_if_not_adaptive() -> None:
    speculator, each = make(KnownTime(0.0, 1.0), adaptive=False), request("a")
    teach(speculator, each, range(GAMMA), [0.0] * GAMMA)
    assert len(speculator.choose([each], 1, 100)["a"]) == GAMMA


def test_acceptance_is_learned_from_drafts_that_were_not_verified() -> None:
    speculator, each = make(KnownTime(1.0, 0.9)), request("a")
    assert speculator.choose([each], 1, 100) == {}  # as likely wrong as right
    for _ in range(10):
        speculator.observe(each, (0,))  # the first guess would have been right
        chosen = speculator.choose([each], 1, 100)
    assert len(chosen["a"]) == 1


def test_steps_are_planned_ahead_where_drafts_do_not_pay_but_for_a_try_now_and_then() -> None:
    speculator, each = make(KnownTime(1.0, 0.9)), request("a")
    waited = []
    for _ in range(2 * PROBE_PERIOD):
        waited.append(speculator.wants_tokens)
        speculator.choose([each], 1, 100)
        speculator.observe(each, (9,))
    assert [step for step, waits in enumerate(waited) if waits] == [*range(PATIENCE), PROBE_PERIOD]


def test_gains_less_than_proposing_costs_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(step=1.0)
    proposer = Copier()
    speculator, each = make(KnownTime(1.0, 0.1), proposer), request("a")
    teach(speculator, each, range(GAMMA), [0.9] * GAMMA)
    assert speculator.choose([each], 1, 100)
    monkeypatch.setattr(module.time, "perf_counter", lambda: 5.0 * next(clock))  # five steps' time, each
    for _ in range(4 * PROBE_PERIOD):
        chosen = speculator.choose([each], 1, 100)
        assert not chosen or speculator._propose_s < 4.0
    assert not chosen
    assert proposer.num_calls < PROBE_PERIOD


def test_what_is_forgotten_counts_for_nothing() -> None:
    acceptance = Acceptance()
    for _ in range(50):
        acceptance.observe(RequestId("a"), Draft((1,), (3,)), (2,))
    own, all_ = acceptance.chances(RequestId("a"), (3,)), acceptance.chances(RequestId("b"), (3,))
    acceptance.forget(RequestId("a"))
    assert own < all_ == acceptance.chances(RequestId("a"), (3,)) < [PRIOR_CHANCE]


# -- the draft model --------------------------------------------------------------------------------------------


@given(
    chance=st.floats(0.05, 0.95),
    token_cost=st.floats(0.001, 1.0),
    round_cost=st.floats(0.001, 1.0),
    n=st.integers(1, 8),
)
def test_rounds_are_as_many_as_are_best(chance: float, token_cost: float, round_cost: float, n: int) -> None:
    requests, acceptance = [request(str(i)) for i in range(n)], Acceptance()
    for _ in range(600):
        for place in range(GAMMA):
            acceptance.observe(
                RequestId("other"), Draft((1,), (place,)), (1 if hash((_, place)) % 100 < chance * 100 else 2,)
            )
    chain = list(itertools.accumulate(acceptance.chances(requests[0].request_id, range(GAMMA)), lambda a, b: a * b))

    def tokens_per_s(rounds: int) -> float:
        return n * (1 + sum(chain[:rounds])) / (1.0 + rounds * (round_cost + n * token_cost))

    chosen = DraftRounds(GAMMA).choose(requests, acceptance, 1.0, token_cost, round_cost)
    rounds = max(chosen.values(), default=0)
    assert tokens_per_s(rounds) == pytest.approx(max(map(tokens_per_s, range(GAMMA + 1))), rel=1e-6)


def test_a_draft_model_that_does_not_pay_is_asked_now_and_then_and_ever_rarer() -> None:
    rounds, acceptance = DraftRounds(GAMMA), Acceptance()
    requests = [request("a"), request("b")]
    asked = [step for step in range(600) if rounds.choose(requests, acceptance, 1.0, 0.1, 10.0)]
    gaps = [after - before for before, after in itertools.pairwise(asked)]
    assert asked[0] == FIRST_PROBE_STEPS - 1
    assert gaps == [FIRST_PROBE_STEPS * 2**i for i in range(1, len(gaps) + 1)]


def test_guesses_of_the_draft_model_are_proposed_once_and_where_they_belong() -> None:
    proposer, each = DraftModelProposer(), request("a")
    proposer.take(each, (5, 6, 7))
    assert proposer.propose(each, 2) == Draft((5, 6), (0, 1))
    assert proposer.propose(each, 2) == NO_DRAFT
    proposer.take(each, (5,))
    each.num_known += 1  # it went on without them
    assert proposer.propose(each, 2) == NO_DRAFT
    proposer.take(each, (5,))
    proposer.forget(each)
    assert proposer.propose(each, 2) == NO_DRAFT


def test_a_step_that_is_said_to_take_no_time_is_none() -> None:
    """Where the fit explains all that it saw by prompts, nothing is divided by zero."""
    speculator = Speculator(
        SpeculativeOptions(method="draft_model", model="m", num_speculative_tokens=GAMMA),
        DraftModelProposer(), cast(StepTimeFit, KnownTime(0.0, 0.0)),
    )  # fmt: skip
    assert 0 < speculator.choose_rounds([request("a")])["a"] <= GAMMA
