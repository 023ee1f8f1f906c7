"""Peers' policies, on cases small enough to know the answer by heart."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.cluster.routing.load import Reservation
from shoal.cluster.routing.policies import Matched, Policy, RoutedRequest, Target
from shoal.cluster.routing.router import Router
from shoal.cluster.simulation.peers import (
    SIMULATED_POLICIES,
    DynamoCost,
    LMetric,
    ProductionStackPrefix,
    RandomChoice,
    RayPrefixAffinity,
    SentPrompts,
    SGLangCacheAware,
)
from shoal.engine.load import EngineLoad
from shoal.engine.request import BlockHash

BLOCK = 10


def hashes(*names: str) -> list[BlockHash]:
    return [BlockHash(name.encode()) for name in names]


def request(*names: str, num_prompt: int | None = None) -> RoutedRequest:
    """A prompt of these blocks and 5 tokens more."""
    num_prompt = num_prompt if num_prompt is not None else len(names) * BLOCK + 5
    return RoutedRequest("r", (), num_prompt, BLOCK, hashes(*names))


def targets(num: int) -> list[Target]:
    router = Router(clock=lambda: 0.0)
    return [router.add(str(number)) for number in range(num)]


def open_requests(target: Target, num: int, tokens: int = 1) -> None:
    for number in range(num):
        target.load.reserve(Reservation(f"open-{number}", tokens, math.inf))


def chosen(
    policy: Policy,
    one: RoutedRequest,
    among: Sequence[Target],
    matched: Mapping[int, int] | None = None,
    now: float = 0,
) -> str:
    return policy.rank(one, among, matched or {}, now)[0].target.key


def test_every_policy_gives_a_target_that_it_was_offered() -> None:
    offered = targets(3)
    for maker in SIMULATED_POLICIES.values():
        policy = maker()
        for _ in range(5):
            assert policy.rank(request("a", "b"), offered, Matched({}), 0.0)[0].target in offered


def test_random_reaches_everybody_and_repeats_itself_by_seed() -> None:
    offered = targets(4)

    def draw(seed: int) -> list[str]:
        policy = RandomChoice(seed)
        return [chosen(policy, request("a"), offered) for _ in range(200)]

    assert draw(1) == draw(1) != draw(2)
    assert min(Counter(draw(1)).values()) > 25


def test_ray_a_prompt_goes_where_most_of_it_went_before() -> None:
    offered, policy = targets(3), RayPrefixAffinity()
    first = chosen(policy, request("a", "b"), offered)
    second = chosen(policy, request("x", "y"), offered)
    assert first != second
    open_requests(next(t for t in offered if t.key == first), 500)
    assert chosen(policy, request("a", "b", "c"), offered) == first, "by default no queue is too long"


def test_ray_a_new_prompt_goes_to_those_who_were_sent_least() -> None:
    offered, policy = targets(2), RayPrefixAffinity()
    long = chosen(policy, request("a", "b", "c"), offered)
    short = chosen(policy, request("x"), offered)
    assert long != short
    open_requests(next(t for t in offered if t.key == short), 9)
    assert chosen(policy, request("n"), offered) == short


def test_ray_a_match_of_less_than_a_tenth_is_none() -> None:
    offered, policy = targets(2), RayPrefixAffinity()
    first = chosen(policy, request("a"), offered)
    assert chosen(policy, request("a", num_prompt=101), offered) != first
    assert chosen(policy, request("a", num_prompt=100), [next(t for t in offered if t.key == first)]) == first


def test_ray_of_equal_matches_the_shortest_queue_wins() -> None:
    offered, policy = targets(2), RayPrefixAffinity()
    for one in offered:
        chosen(policy, request("a", "b"), [one])
    open_requests(offered[0], 1)
    assert chosen(policy, request("a", "b"), offered) == "1"


def test_ray_a_threshold_brings_power_of_two_back() -> None:
    offered, policy = targets(2), RayPrefixAffinity(imbalanced_threshold=3)
    first = chosen(policy, request("a", "b"), offered)
    open_requests(next(t for t in offered if t.key == first), 4)
    assert chosen(policy, request("a", "b"), offered) != first


def test_sglang_a_match_of_more_than_the_threshold_wins_over_load() -> None:
    offered, policy = targets(2), SGLangCacheAware()
    first = chosen(policy, request("a", "b"), offered)
    open_requests(next(t for t in offered if t.key == first), 60)
    assert chosen(policy, request("a", "b"), offered) == first


def test_sglang_a_smaller_match_goes_to_the_fewest_open_requests() -> None:
    offered, policy = targets(2), SGLangCacheAware()
    first = chosen(policy, request("a"), offered)
    open_requests(next(t for t in offered if t.key == first), 1)
    assert chosen(policy, request("a", "b", "c"), offered) != first


@pytest.mark.parametrize(("least", "most", "is_moved"), [(0, 64, False), (0, 65, True), (200, 290, False)])
def test_sglang_load_counts_once_it_is_out_of_balance_in_both_ways(least: int, most: int, is_moved: bool) -> None:
    offered, policy = targets(2), SGLangCacheAware()
    chosen(policy, request("a", "b"), offered[:1])
    open_requests(offered[0], most)
    open_requests(offered[1], least)
    assert chosen(policy, request("a", "b"), offered) == ("1" if is_moved else "0")


def test_sglang_of_equal_matches_the_one_sent_to_last_wins() -> None:
    offered, policy = targets(3), SGLangCacheAware()
    for number in (0, 2, 1):
        chosen(policy, request("a", "b"), [offered[number]])
    assert chosen(policy, request("a", "b"), offered) == "1"


def test_sglang_its_tree_forgets_when_it_is_too_large() -> None:
    offered, policy = targets(2), SGLangCacheAware(max_tree_chars=2 * BLOCK * 4)
    chosen(policy, request("a", "b"), offered[:1])
    chosen(policy, request("x", "y"), offered[:1])
    open_requests(offered[0], 1)
    assert chosen(policy, request("a", "b"), offered, now=119) == "0"
    chosen(policy, request("x", "y"), offered, now=119)
    assert chosen(policy, request("a", "b"), offered, now=120) == "1"


def test_production_stack_follows_the_longest_match_whatever_the_load() -> None:
    offered, policy = targets(4), ProductionStackPrefix(seed=1)
    first = chosen(policy, request("a", "b"), offered)
    open_requests(next(t for t in offered if t.key == first), 1000)
    assert {chosen(policy, request("a", f"{number}"), offered) for number in range(20)} == {first}


def test_dynamo_prompt_blocks_to_compute_and_blocks_in_use_add_up() -> None:
    offered = targets(2)
    one = request(*"abcd")
    slot = offered[0].slot
    assert chosen(DynamoCost(), one, offered, {slot: 4}) == "0"
    open_requests(offered[0], 1, tokens=2 * BLOCK)  # 2 blocks to compute and 2 in use: as much as 4 cached ones
    assert {chosen(DynamoCost(seed=seed), one, offered, {slot: 4}) for seed in range(20)} == {"0", "1"}
    assert chosen(DynamoCost(), one, offered, {slot: 3}) == "1"


def test_dynamo_blocks_of_requests_that_decode_count() -> None:
    offered = targets(2)
    offered[0].load.apply(report(num_blocks=100, num_free_blocks=97), 0.0)
    offered[1].load.apply(report(num_blocks=100, num_free_blocks=95), 0.0)
    assert chosen(DynamoCost(), request("a", "b", "c"), offered, {offered[1].slot: 1}) == "0"
    assert chosen(DynamoCost(), request("a", "b", "c"), offered, {offered[1].slot: 3}) == "1"


def test_lmetric_multiplies_new_tokens_by_requests() -> None:
    offered = targets(2)
    one = request("a", "b")  # 25 tokens: 25 x 1 there, 5 x 5 here
    open_requests(offered[0], 3)
    assert chosen(LMetric(), one, offered, {offered[0].slot: 2}) == "0"
    offered[0].load.reserve(Reservation("more", 1, math.inf))
    assert chosen(LMetric(), one, offered, {offered[0].slot: 2}) == "1", "a tie goes to the one with fewer requests"


def report(*, num_blocks: int, num_free_blocks: int) -> EngineLoad:
    return EngineLoad(
        prefills=(),
        more_prefill_tokens=0,
        num_running=1,
        max_running_requests=10,
        num_waiting=0,
        num_waiting_tokens=0,
        num_decoding=1,
        num_context_tokens=0,
        num_free_blocks=num_free_blocks,
        num_empty_blocks=0,
        num_blocks=num_blocks,
        block_size=BLOCK,
        max_step_tokens=100,
        step_time=None,
        finished_per_s=0.0,
    )


@given(
    sent=st.lists(st.tuples(st.text("ab", min_size=1, max_size=6), st.sampled_from("012")), max_size=20),
    asked=st.text("ab", max_size=6),
    limit=st.none() | st.integers(0, 6),
)
def test_what_was_sent_is_found_as_in_a_tree(sent: list[tuple[str, str]], asked: str, limit: int | None) -> None:
    """Against prompts kept in full, as strings of which each character is a block."""
    memory = SentPrompts()
    for prompt, key in sent:
        memory.insert(hashes(*(prompt[: end + 1] for end in range(len(prompt)))), key)
    if limit is not None:
        memory.shrink(limit)
        assert all(memory.num_blocks(key) <= limit for key in "012")
    num_blocks, holders = memory.longest_match(hashes(*(asked[: end + 1] for end in range(len(asked)))), ["0", "1"])
    shared = {
        key: max((len(prefix(asked, prompt)) for prompt, to in sent if to == key), default=0) for key in ("0", "1")
    }
    assert num_blocks <= max(shared.values())
    assert all(shared[key] >= num_blocks for key in holders)
    if limit is None:
        assert num_blocks == max(shared.values())
        assert set(holders) == {key for key in shared if shared[key] == num_blocks}
        assert all(memory.num_blocks(key) == distinct(sent, key) for key in "012")


def prefix(left: str, right: str) -> str:
    length = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
    return left[:length]


def distinct(sent: list[tuple[str, str]], key: str) -> int:
    return len({prompt[: end + 1] for prompt, to in sent if to == key for end in range(len(prompt))})
