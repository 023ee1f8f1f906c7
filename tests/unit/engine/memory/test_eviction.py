"""Which cached blocks go first, what that is expected to cost, and what others are told of it."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.engine.memory.block_pool import BlockPool
from shoal.engine.memory.kv_events import BlocksRemoved, BlocksStored, CacheCleared, KVEvent
from shoal.engine.memory.kv_manager import KVManager
from shoal.engine.memory.prefix_cache import chain_hashes, root_hash
from shoal.engine.request import BlockHash, BlockId, Request, RequestId, SamplingParams

BLOCK = 4
PARAMS = SamplingParams(max_tokens=100)


class Requests:
    """Requests around one KV manager that are admitted, computed in pieces, and end."""

    def __init__(self, num_blocks: int) -> None:
        self.kv = KVManager(num_blocks, BLOCK, record_events=True)
        self.live: list[Request] = []
        self.parents: dict[BlockHash, BlockHash] = {}
        self.count = 0

    def admit(self, prompt_ids: tuple[int, ...], salt: str = "") -> Request | None:
        self.count += 1
        request = Request(RequestId(f"r{self.count}"), prompt_ids, PARAMS, 0, float(self.count), cache_salt=salt)
        if not self.kv.admit(request, is_alone=not self.live):
            return None
        self.live.append(request)
        return request

    def fork(self, source: Request) -> None:
        self.count += 1
        request = Request(RequestId(f"r{self.count}"), source.prompt_ids, PARAMS, 0, float(self.count))
        if self.kv.can_fork(request, source) and self.kv.fork(request, source.request_id) is not None:
            self.live.append(request)

    def compute(self, request: Request, count: int) -> None:
        request.num_computed = min(request.num_computed + count, request.num_known)
        self.kv.commit(request)
        hashes = request.block_hashes
        self.parents.update(zip(hashes[1:], hashes, strict=False))

    def end(self, request: Request) -> None:
        self.live.remove(request)
        self.kv.release(request.request_id)

    def use(self, prompt_ids: tuple[int, ...]) -> int:
        """A request from beginning to end; the answer is how many of its tokens were cached."""
        request = self.admit(prompt_ids)
        assert request is not None
        num_cached = request.num_computed
        self.compute(request, len(prompt_ids))
        self.end(request)
        return num_cached


def prompt(seed: int, num_blocks: int) -> tuple[int, ...]:
    """Whole blocks and one token more, which is always computed."""
    return tuple(range(1000 * seed, 1000 * seed + num_blocks * BLOCK + 1))


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**9))
def test_a_prefix_stays_until_what_is_built_on_it_is_gone_and_events_tell_all(seed: int) -> None:
    rng = random.Random(seed)
    requests = Requests(rng.choice([12, 30]))
    told: set[BlockHash] = set()
    for _ in range(120):
        request = rng.choice(requests.live) if requests.live else None
        action = rng.random()
        if request is None or action < 0.35:
            requests.admit(tuple(rng.randrange(2) for _ in range(rng.randrange(1, 25))))
        elif action < 0.7:
            requests.compute(request, rng.randrange(1, 25))
        elif action < 0.8:
            requests.fork(request)
        elif action < 0.99:
            requests.end(request)
        else:
            requests.kv.reset_cache()
        requests.kv.check()
        for event in requests.kv.take_events():
            follow(event, told)
        cached = set(requests.kv._cache._block_of)
        assert told == cached
        assert {requests.parents[block_hash] for block_hash in cached & requests.parents.keys()} <= cached


def follow(event: KVEvent, told: set[BlockHash]) -> None:
    match event:
        case BlocksStored(hashes, parent, token_ids, salt):
            assert parent is None or parent in told
            assert list(hashes) == chain_hashes(token_ids, parent or root_hash(salt), BLOCK)
            assert told.isdisjoint(hashes)
            told.update(hashes)
        case BlocksRemoved(hashes):
            assert told.issuperset(hashes)
            told.difference_update(hashes)
        case CacheCleared():
            told.clear()


def test_after_a_reset_requests_that_run_are_found_again() -> None:
    requests = Requests(12)
    request = requests.admit(prompt(1, 3))
    assert request is not None
    requests.compute(request, 8)
    requests.kv.take_events()
    requests.kv.reset_cache()
    requests.compute(request, 5)
    cleared, stored = requests.kv.take_events()
    assert cleared == CacheCleared()
    assert isinstance(stored, BlocksStored)
    assert (stored.parent, stored.token_ids) == (None, prompt(1, 3)[:12])


def test_what_was_used_often_outlives_what_came_once() -> None:
    requests = Requests(20)
    for _ in range(4):
        requests.use(prompt(1, 3))
    for seed in range(2, 8):  # each fills three blocks; under least recently used the first would be gone
        requests.use(prompt(seed, 3))
    assert requests.use(prompt(1, 3)) == 3 * BLOCK


def test_what_was_used_often_goes_when_it_has_aged() -> None:
    requests = Requests(20)
    for _ in range(9):
        requests.use(prompt(1, 3))
    for seed in range(2, 40):
        requests.use(prompt(seed, 3))
    assert requests.use(prompt(1, 3)) == 0


def test_empty_blocks_go_before_cached_ones() -> None:
    requests = Requests(12)
    requests.use(prompt(1, 4))
    assert requests.kv.num_empty_blocks == 7
    requests.use(prompt(2, 6))
    assert requests.kv.num_empty_blocks == 1
    assert requests.kv.num_cached_blocks == 10


def test_the_prefix_of_a_waiting_request_outlasts_those_who_are_admitted_before_it() -> None:
    lost = {}
    for is_waiting in (False, True):
        requests = Requests(12)
        requests.use(prompt(1, 4))
        requests.use(prompt(2, 4))
        waiting = Request(RequestId("w"), prompt(1, 4), PARAMS, 0, 0.0)
        if is_waiting:
            assert requests.kv.refresh_cached(waiting) == 4 * BLOCK
        requests.use(prompt(3, 4))
        lost[is_waiting] = 4 * BLOCK - requests.kv.refresh_cached(waiting)
    assert lost[False] > 0
    assert lost[True] == 0


def test_nothing_is_noted_unless_asked() -> None:
    kv = KVManager(12, BLOCK)
    request = Request(RequestId("r"), prompt(1, 2), PARAMS, 0, 0.0)
    assert kv.admit(request, is_alone=True)
    request.num_computed = 8
    kv.commit(request)
    assert kv.num_cached_blocks == 2
    assert kv.take_events() == []


def test_the_pool_hands_out_every_block_once() -> None:
    pool = BlockPool(50, on_evict=lambda block: None)
    taken = pool.allocate(49)
    assert sorted(taken) == list(range(1, 50))
    pool.release(reversed(taken), keep=lambda block: block % 3 == 0)
    assert pool.num_empty == sum(block % 3 != 0 for block in range(1, 50))
    again = pool.allocate(49)
    assert sorted(again) == sorted(taken)
    assert [block % 3 == 0 for block in again] == sorted(block % 3 == 0 for block in again)
    assert pool.references(BlockId(1)) == 1
