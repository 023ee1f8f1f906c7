"""Who gets a request: costs, policies, and what the router remembers of requests on their way."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given

from shoal.cluster.routing.cost import estimate
from shoal.cluster.routing.load import LEASE_S, ReplicaLoad, Reservation
from shoal.cluster.routing.policies import POLICIES, ConsistentHash, RoundRobin, make_policy
from shoal.cluster.routing.router import Decision, Router
from shoal.engine.config import ConfigError
from shoal.engine.load import EngineLoad
from shoal.engine.request import RequestId
from shoal.engine.step_time import StepTime

BLOCK = 16
IDLE = EngineLoad(
    prefills=(),
    more_prefill_tokens=0,
    num_running=0,
    max_running_requests=64,
    num_waiting=0,
    num_waiting_tokens=0,
    num_decoding=0,
    num_context_tokens=0,
    num_free_blocks=1000,
    num_empty_blocks=1000,
    num_blocks=1000,
    block_size=BLOCK,
    max_step_tokens=512,
    step_time=StepTime(base=0.01, per_prefill_token=1e-3, per_decode_token=1e-3, per_context_token=0.0),
    finished_per_s=0.0,
)


def busy(*prefills: int) -> EngineLoad:
    return replace(IDLE, prefills=tuple((RequestId(f"other-{i}"), n) for i, n in enumerate(prefills)))


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def router(clock: Clock) -> Router:
    router = Router(clock=clock)
    for key in ("a", "b", "c"):
        router.add(key)
        router.report(key, IDLE)
    return router


def decide(router: Router, prompt: range, name: str = "request", **options: str) -> Decision:
    decision = router.decide(router.describe(name, tuple(prompt), block_size=BLOCK, max_tokens=8, **options))
    assert decision is not None
    return decision


def hold(router: Router, key: str, prompt: range) -> None:
    """The replica reports to have computed this prompt."""
    slot = decide(router, prompt).ranked
    (target,) = [one.target for one in slot if one.target.key == key]
    router.index.store(target.slot, router.describe("", tuple(prompt), block_size=BLOCK).block_hashes)


def test_the_holder_of_a_prefix_gets_it(router: Router) -> None:
    hold(router, "b", range(400))
    decision = decide(router, range(500))
    assert decision.target.key == "b"
    assert decision.best.num_matched == 384
    assert decision.best.num_uncached == 116


def test_a_prefix_is_computed_anew_where_its_holder_is_busier_than_that_takes(router: Router) -> None:
    hold(router, "b", range(400))
    router.report("b", busy(50, 60))
    assert decide(router, range(500)).target.key == "b"
    router.report("b", busy(300, 310, 320, 330))
    assert decide(router, range(500)).target.key != "b"


def test_what_every_replica_holds_decides_nothing(router: Router) -> None:
    for key in ("a", "b", "c"):
        hold(router, key, range(400))
    router.report("a", busy(300))
    router.report("b", busy(200))
    assert decide(router, range(500)).target.key == "c"


def test_siblings_of_a_burst_stay_together_where_it_takes_longer_to_compute_their_prefix_again(router: Router) -> None:
    first = decide(router, range(400), "first")
    router.reserve(first)
    for key in {"a", "b", "c"} - {first.target.key}:
        router.report(key, busy(100))
    second = decide(router, range(410), "second")
    assert second.target.key == first.target.key
    assert second.best.num_matched == 384


def test_strangers_of_a_burst_spread(router: Router) -> None:
    chosen = set()
    for number in range(3):
        decision = decide(router, range(1000 * number, 1000 * number + 400), f"request-{number}")
        router.reserve(decision)
        chosen.add(decision.target.key)
    assert chosen == {"a", "b", "c"}


def test_a_settled_request_leaves_nothing_behind(router: Router) -> None:
    before = decide(router, range(400)).ranked
    router.reserve(decide(router, range(400), "first"))
    router.settle("first")
    after = decide(router, range(400)).ranked
    assert {(t.key, e) for t, e in before} == {(t.key, e) for t, e in after}
    assert router.routed("first") is None


def test_a_request_on_its_way_is_counted_once_when_its_replica_reports_it(router: Router) -> None:
    decision = decide(router, range(300), "first")
    router.reserve(decision)
    load = decision.target.load
    assert load.backlog == 300
    router.report(decision.target.key, replace(IDLE, prefills=((RequestId("first"), 200),)))
    assert load.backlog == 200
    router.report(decision.target.key, IDLE)
    assert load.backlog == 0


def test_a_request_that_never_arrives_is_forgotten(router: Router, clock: Clock) -> None:
    decision = decide(router, range(300), "first")
    router.reserve(decision)
    router.report(decision.target.key, IDLE)
    assert decision.target.load.backlog == 300, "its replica cannot know it yet"
    clock.now += LEASE_S + 1
    router.report(decision.target.key, IDLE)
    assert decision.target.load.backlog == 0


def test_a_removed_replica_is_not_chosen_and_its_requests_are_settled(router: Router) -> None:
    decision = decide(router, range(300), "first")
    router.reserve(decision)
    router.remove(decision.target.key)
    assert router.routed("first") is None
    assert decide(router, range(300)).target.key != decision.target.key


def test_reserving_at_another_replica_than_the_best_counts_there(router: Router) -> None:
    decision = decide(router, range(300), "first")
    other = decision.ranked[-1].target
    router.reserve(decision, other.key)
    assert other.load.backlog == 300
    assert decision.target.load.backlog == 0


def test_no_replica_no_decision() -> None:
    assert Router().decide(Router().describe("request", range(5), block_size=BLOCK)) is None


def test_a_new_replica_is_as_fast_as_the_others_until_it_knows_better(router: Router) -> None:
    router.add("d")
    hold(router, "a", range(400))
    decision = decide(router, range(4000, 4400))
    costs = {target.key: one.ttft_s for target, one in decision.ranked if one is not None}
    assert costs["d"] == pytest.approx(costs["a"], rel=0.2)


def test_explanations_hold_every_candidate(router: Router) -> None:
    router.reserve(decide(router, range(300), "first"))
    (explanation,) = router.explain()
    assert explanation["request_id"] == "first"
    assert {one["replica"] for one in explanation["candidates"]} == {"a", "b", "c"}
    assert all(one["cost_s"] > 0 for one in explanation["candidates"])


@given(
    prefills=st.lists(st.integers(1, 5000), max_size=5),
    num_prompt=st.integers(1, 5000),
    num_matched=st.integers(0, 5000),
    more=st.integers(1, 1000),
)
def test_more_cached_never_costs_more(prefills: list[int], num_prompt: int, num_matched: int, more: int) -> None:
    load = ReplicaLoad(0.0)
    load.apply(busy(*prefills), 0.0)
    num_matched = min(num_matched, num_prompt - 1)
    less = estimate(load, num_prompt, num_matched, 0, 10, 0.0, 0.0)
    better = estimate(load, num_prompt, min(num_matched + more, num_prompt - 1), 0, 10, 0.0, 0.0)
    assert better.ttft_s <= less.ttft_s + 1e-9


@given(prefills=st.lists(st.integers(1, 5000), max_size=5), num_prompt=st.integers(1, 5000))
def test_cost_is_the_time_added_to_all(prefills: list[int], num_prompt: int) -> None:
    """Against the sum of all completion times with the new request and without it, shortest first."""
    time = StepTime(base=0.0, per_prefill_token=1e-3, per_decode_token=0.0, per_context_token=0.0)
    load = ReplicaLoad(0.0)
    load.apply(replace(busy(*prefills), step_time=time), 0.0)

    def total(work: list[int]) -> float:
        ends, now = 0.0, 0.0
        for tokens in sorted(work):
            now += tokens * 1e-3
            ends += now
        return ends

    one = estimate(load, num_prompt, 0, 0, 0, 0.0, 0.0)
    assert one.ttft_s + one.delay_s == pytest.approx(total([*prefills, num_prompt]) - total(prefills), rel=1e-9)


def test_work_goes_on_between_reports() -> None:
    load = ReplicaLoad(0.0)
    load.apply(busy(1000), 0.0)
    first = estimate(load, 2000, 0, 0, 0, 0.0, 0.0).ttft_s
    assert estimate(load, 2000, 0, 0, 0, 0.0, 0.5).ttft_s == pytest.approx(first - 0.5, rel=1e-6)


def test_a_reservation_outlives_its_lease_once_a_report_has_shown_it() -> None:
    load = ReplicaLoad(0.0)
    load.reserve(Reservation("first", 100, expires_s=5.0))
    for now in (1.0, 6.0):
        load.apply(replace(IDLE, prefills=((RequestId("first"), 300),)), now)
        assert load.backlog == 100, "what it will find cached by then is not computed"


def test_a_call_that_another_replica_took_is_explained_once(router: Router) -> None:
    decision = decide(router, range(300), "first")
    router.reserve(decision)
    router.reserve(decision, decision.ranked[-1].target.key)
    assert len(router.explain()) == 1


def test_a_machine_that_takes_no_time_costs_nothing() -> None:
    load = ReplicaLoad(0.0)
    load.apply(replace(busy(500), step_time=StepTime(0.0, 0.0, 0.0, 0.0)), 0.0)
    load.measure(StepTime(0.0, 0.0, 0.0, 0.0), StepTime(0.0, 0.0, 0.0, 0.0))
    assert estimate(load, 1000, 0, 0, 0, 0.0, 1.0).cost_s == 0.0


def test_a_sibling_waits_for_the_prefix_that_is_still_computed(router: Router) -> None:
    leader = decide(router, range(400), "leader")
    router.reserve(leader)
    ranked = decide(router, range(410), "sibling").ranked
    (there,) = [one for target, one in ranked if target is leader.target]
    assert there is not None
    assert there.num_matched == 384
    assert there.ttft_s >= 0.384


def test_a_request_avoids_evicting_what_is_wanted_again(router: Router) -> None:
    """Two replicas are full, and what leaves them comes back; the third one has room."""
    (slot,) = [one.target.slot for one in decide(router, range(9)).ranked if one.target.key == "a"]
    hold(router, "b", range(5000, 6000))
    for number in range(100):
        request = router.describe(f"{number}", range(number % 2, number % 2 + 400), block_size=BLOCK)
        decision = router.decide(request)
        assert decision is not None
        router.reserve(decision)
        router.settle(f"{number}")
        router.index.store(slot, request.block_hashes)
        router.index.remove(slot, request.block_hashes)
    assert router.reuse.chance > 0.9
    for key in ("a", "b"):
        router.report(key, replace(IDLE, num_empty_blocks=0))
    assert {decide(router, range(90000 + n, 90500 + n)).target.key for n in range(3)} == {"c"}


# -- policies --------------------------------------------------------------------------------------------------


def test_round_robin_takes_turns(clock: Clock) -> None:
    router = Router(RoundRobin(), clock=clock)
    for key in ("a", "b", "c"):
        router.add(key)
    chosen = []
    for number in range(6):
        decision = decide(router, range(9), f"{number}")
        router.reserve(decision)
        chosen.append(decision.target.key)
    assert chosen == ["a", "b", "c"] * 2


def test_consistent_hash_keeps_sessions_and_moves_few(clock: Clock) -> None:
    router = Router(ConsistentHash(), clock=clock)
    for number in range(10):
        router.add(f"replica-{number}")

    def place() -> list[str]:
        return [decide(router, range(9), session=f"session-{n}").target.key for n in range(300)]

    before = place()
    assert place() == before
    assert len(set(before)) == 10
    router.remove("replica-3")
    moved = [was for was, now in zip(before, place(), strict=True) if was != now]
    assert set(moved) == {"replica-3"}


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_ranks_without_load_or_rates(name: str) -> None:
    router = Router(make_policy(name))
    router.add("only")
    assert decide(router, range(100)).target.key == "only"


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_serves_a_subset(name: str, router: Router) -> None:
    request = router.describe("request", tuple(range(100)), block_size=BLOCK)
    decision = router.decide(request, keys={"b"})
    assert decision is not None
    assert decision.target.key == "b"


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("prefix_awar", {}, "prefix_aware"),
        ("no.such:Class", {}, "cannot be imported"),
        ("json:NoSuch", {}, "cannot be imported"),
        ("json:JSONDecoder", {}, "rank"),
        ("round_robin", {"speed": 1}, "options"),
    ],
)
def test_a_policy_that_cannot_work_is_refused(name: str, options: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_policy(name, options)
