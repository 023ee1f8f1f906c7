"""The order in which held requests go."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.cluster.gateway.fairness import FAIRNESS_HEADER, OUTPUT_WEIGHT, FairQueue, tenant_of
from shoal.engine.request import RequestError

WEIGHTS = {"heavy": 3.0, "light": 0.5}
TENANTS = ("heavy", "light", "plain")
MAX_PROMPT = 400
MAX_OUTPUT = 50


@given(
    seed=st.integers(0, 2**32),
    num_running=st.integers(1, 8),
    tenants=st.lists(st.sampled_from(TENANTS), min_size=2, max_size=3, unique=True),
)
def test_tenants_that_always_wait_get_equal_shares_by_weight(seed: int, num_running: int, tenants: list[str]) -> None:
    """The counters of any two differ by no more than one prompt and the outputs of what runs, at any moment."""
    numbers = random.Random(seed)
    queue: FairQueue[tuple[str, int]] = FairQueue(WEIGHTS)
    for tenant in tenants:
        for number in range(2):  # one more always waits when one is taken
            queue.add((tenant, number), tenant, 0, 0.1, 0.0)
    running: list[tuple[str, int]] = []  # (tenant, output tokens to come)
    bound = (MAX_PROMPT + OUTPUT_WEIGHT * num_running * MAX_OUTPUT) / min(WEIGHTS.get(t, 1.0) for t in tenants)
    for number in range(2, 300):
        if len(running) < num_running:
            first = queue.first()
            assert first is not None
            queue.take(first, float(number))
            queue.add((first[0], number), first[0], 0, 0.1, float(number))
            queue.charge(first[0], numbers.randint(1, MAX_PROMPT))
            running.append((first[0], numbers.randint(1, MAX_OUTPUT)))
        for tenant, _ in running:
            queue.charge(tenant, OUTPUT_WEIGHT)
        running = [(tenant, left - 1) for tenant, left in running if left > 1]
        served = [queue.counters[tenant] for tenant in tenants]
        assert max(served) - min(served) <= bound


@given(
    requests=st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(-2, 2), st.integers(1, 100)), min_size=1, max_size=30
    ),
    left=st.sets(st.integers(0, 29)),
)
def test_everything_that_waits_goes_once_unless_it_leaves(requests: list[tuple[str, int, int]], left: set[int]) -> None:
    queue: FairQueue[int] = FairQueue()
    for number, (tenant, priority, _) in enumerate(requests):
        queue.add(number, tenant, priority, 1.0, float(number))
    gone = left & set(range(len(requests)))
    for number in gone:
        queue.drop(number)
    taken = []
    while (item := queue.first()) is not None:
        queue.take(item, 100.0)
        queue.charge(requests[item][0], requests[item][2])
        taken.append(item)
    assert sorted(taken) == sorted(set(range(len(requests))) - gone)
    assert not queue
    for tenant in "abc":
        for priority in range(-2, 3):
            own = [n for n in taken if requests[n][:2] == (tenant, priority)]
            assert own == sorted(own), "a tenant's own requests of a class keep their order"


def test_who_comes_back_from_idleness_has_saved_nothing_up() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(20):
        queue.add(f"busy {number}", "busy", 0, 1.0, 0.0)
    for _ in range(10):
        first = queue.first()
        assert first is not None
        queue.take(first, 0.0)
        queue.charge("busy", 100)
    for number in range(10):
        queue.add(f"idle {number}", "idle", 0, 1.0, 0.0)
    order = []
    for _ in range(8):
        first = queue.first()
        assert first is not None
        queue.take(first, 0.0)
        tenant = first.split()[0]
        queue.charge(tenant, 100)
        order.append(tenant)
    assert Counter(order) == {"busy": 4, "idle": 4}


def test_who_comes_to_an_empty_queue_starts_where_the_last_one_stood() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.pass_by("first")
    queue.charge("first", 1000)
    queue.pass_by("second")
    assert queue.counters["second"] == 1000


def test_a_lower_priority_number_goes_first() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.add("later", "a", 1, 1.0, 0.0)
    queue.add("sooner", "b", -1, 1.0, 5.0)
    assert queue.first() == "sooner"


@pytest.mark.parametrize("levels", [1, 5])
def test_a_class_waits_for_a_turn_no_longer_than_its_levels_allow(levels: int) -> None:
    queue: FairQueue[object] = FairQueue(ageing_s=10.0)
    queue.add("patient", "a", levels, 1.0, 0.0)
    queue.add("patient too", "a", levels, 1.0, 0.0)
    turns = []
    for second in range(1000):
        queue.add(second, "b", 0, 1.0, float(second))
        first = queue.first()
        assert first is not None
        queue.take(first, float(second))
        if isinstance(first, str):
            turns.append(second)
    assert turns == pytest.approx([10 * levels, 20 * levels], abs=2)


def test_waiting_long_in_a_line_of_its_own_gains_a_tenant_nothing() -> None:
    queue: FairQueue[str] = FairQueue(ageing_s=1.0)
    for number in range(100):
        queue.add(f"flood {number}", "flood", 0, 1.0, 0.0)
    now = 1000.0  # the flood has waited for many times the ageing
    first = queue.first()
    assert first is not None
    queue.take(first, now)
    queue.charge("flood", 50)
    queue.add("new", "calm", 0, 1.0, now)
    queue.charge("flood", 1)
    assert queue.first() == "new"


@given(
    lines=st.dictionaries(st.sampled_from("abcd"), st.integers(1, 8), min_size=1, max_size=4),
    newcomer=st.sampled_from("abcde"),
)
def test_what_is_ahead_of_a_newcomer_is_what_goes_before_it(lines: dict[str, int], newcomer: str) -> None:
    """With requests of one size the estimate is off by at most one of each other tenant, and itself."""
    queue: FairQueue[tuple[str, int]] = FairQueue()
    for tenant, count in lines.items():
        for number in range(count):
            queue.add((tenant, number), tenant, 0, 1.0, 0.0)
    ahead = queue.work_ahead_s(newcomer, 0, 1.0)
    queue.add((newcomer, -1), newcomer, 0, 1.0, 0.0)
    num_before = 0
    while (first := queue.first()) != (newcomer, -1):
        assert first is not None
        queue.take(first, 0.0)
        queue.charge(first[0], 1.0)
        num_before += 1
    assert num_before == pytest.approx(ahead, abs=len(lines))


def test_better_classes_are_ahead_and_worse_ones_are_not() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.add("better", "a", 0, 2.0, 0.0)
    queue.add("worse", "b", 2, 4.0, 0.0)
    assert queue.work_ahead_s("c", 1, 1.0) == 2.0


def test_tenants_without_end_are_not_remembered_without_end() -> None:
    queue: FairQueue[int] = FairQueue()
    for number in range(20_000):
        queue.pass_by(f"tenant {number}")
        queue.charge(f"tenant {number}", 10)
    assert len(queue.counters) < 3000
    assert queue.counters["tenant 19999"] == pytest.approx(200_000)


def test_a_tenant_is_who_the_header_says_else_its_key_but_never_the_key_itself() -> None:
    assert tenant_of({}) == ""
    assert tenant_of({FAIRNESS_HEADER: "team", "authorization": "Bearer sk-secret"}) == "team"
    by_key = tenant_of({"authorization": "Bearer sk-secret"})
    assert by_key == tenant_of({"authorization": "bearer  sk-secret"})
    assert by_key != tenant_of({"authorization": "Bearer sk-other"})
    assert "secret" not in by_key
    assert tenant_of({"authorization": "Basic dXNlcg=="}) == ""
    with pytest.raises(RequestError, match=FAIRNESS_HEADER):
        tenant_of({FAIRNESS_HEADER: "x" * 257})
