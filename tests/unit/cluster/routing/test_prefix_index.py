"""The prefix index against the plain truth: a set of hashes for each replica."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from hashlib import blake2b
from itertools import pairwise

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from shoal.cluster.routing import prefix_index
from shoal.cluster.routing.prefix_index import Prediction, PrefixIndex
from shoal.engine.request import BlockHash


def chain(path: Sequence[int]) -> list[BlockHash]:
    """Hashes of a prompt whose blocks are named by small numbers."""
    hashes, parent = [], b""
    for block in path:
        parent = blake2b(parent + bytes([block]), digest_size=16).digest()
        hashes.append(BlockHash(parent))
    return hashes


# Few names and a likely common start, so that prompts share prefixes of many lengths.
PATHS = st.builds(
    lambda start, rest: [0] * start + rest,
    st.integers(0, 12),
    st.lists(st.integers(0, 1), max_size=6),
).filter(bool)


class Replica:
    """What one replica holds and is predicted to hold, as plain sets."""

    def __init__(self) -> None:
        self.held: set[BlockHash] = set()
        self.children: dict[BlockHash, set[BlockHash]] = defaultdict(set)
        self.predictions: list[Prediction] = []

    def depth(self, hashes: Sequence[BlockHash]) -> int:
        known = self.held.union(*(prediction.block_hashes for prediction in self.predictions))
        return next((i for i, block_hash in enumerate(hashes) if block_hash not in known), len(hashes))

    def num_held(self, hashes: Sequence[BlockHash]) -> int:
        return next((i for i, block_hash in enumerate(hashes) if block_hash not in self.held), len(hashes))


class IndexAndTruth(RuleBasedStateMachine):
    slots = Bundle("slots")
    predictions = Bundle("predictions")

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex()
        self.replicas: dict[int, Replica] = {}
        self.asked: set[tuple[int, ...]] = set()

    @initialize(swept=st.sampled_from([1, 3, 256]))
    def sweep_by(self, swept: int) -> None:
        prefix_index._SWEPT_PER_CHANGE = swept  # type: ignore[misc]

    def teardown(self) -> None:
        prefix_index._SWEPT_PER_CHANGE = 256  # type: ignore[misc]

    @rule(target=slots)
    def open(self) -> int:
        slot = self.index.open()
        assert slot not in self.replicas, "a slot in use was given out again"
        self.replicas[slot] = Replica()
        return slot

    @rule(slot=consumes(slots))
    def close(self, slot: int) -> None:
        del self.replicas[slot]
        self.index.close(slot)

    @rule(slot=slots, path=PATHS)
    def store(self, slot: int, path: list[int]) -> None:
        self.asked.add(tuple(path))
        hashes = chain(path)
        self.index.store(slot, hashes)
        self.replicas[slot].held.update(hashes)
        for parent, child in pairwise(hashes):
            self.replicas[slot].children[parent].add(child)

    @rule(slot=slots, path=PATHS, start=st.integers(0, 15))
    def remove(self, slot: int, path: list[int], start: int) -> None:
        """An engine evicts what is built on a block before the block."""
        replica, gone = self.replicas[slot], []
        front = chain(path)[start:]
        while front:
            block_hash = front.pop()
            gone.append(block_hash)
            front += replica.children.get(block_hash, ())
        self.index.remove(slot, gone)
        replica.held.difference_update(gone)

    @rule(target=predictions, slot=slots, path=PATHS)
    def predict(self, slot: int, path: list[int]) -> Prediction:
        self.asked.add(tuple(path))
        prediction = self.index.predict(slot, chain(path))
        self.replicas[slot].predictions.append(prediction)
        return prediction

    @rule(prediction=predictions)
    def settle(self, prediction: Prediction) -> None:
        """Also twice, and also after its slot is closed."""
        self.index.settle(prediction)
        for replica in self.replicas.values():
            if prediction in replica.predictions:
                replica.predictions.remove(prediction)

    @rule(target=predictions)
    def settle_all(self) -> object:
        for replica in self.replicas.values():
            for prediction in replica.predictions:
                self.index.settle(prediction)
            replica.predictions.clear()
        return multiple()

    @invariant()
    def answers_are_the_truth(self) -> None:
        for path in self.asked:
            hashes = chain(path)
            depths = {slot: replica.depth(hashes) for slot, replica in self.replicas.items()}
            assert self.index.match(hashes) == {slot: depth for slot, depth in depths.items() if depth}
            held = {slot: replica.num_held(hashes) for slot, replica in self.replicas.items()}
            expected = {slot: depth - held[slot] for slot, depth in depths.items() if depth > held[slot]}
            assert self.index.pending(hashes, self.index.match(hashes)) == expected

    @invariant()
    def pairs_are_counted(self) -> None:
        for slot, replica in self.replicas.items():
            assert self.index.num_pairs(slot) == len(replica.held)


IndexAndTruth.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_index_equals_the_truth_of_what_was_stored_and_removed = IndexAndTruth.TestCase


@given(
    held=st.lists(st.sets(st.integers(0, 39)), min_size=1, max_size=5),
    num_asked=st.integers(1, 40),
)
def test_never_claims_more_than_the_deepest_held_block(held: list[set[int]], num_asked: int) -> None:
    """Also of replicas that evict a prefix before what is built on it."""
    prompt = chain([0] * 40)
    index = PrefixIndex()
    deepest = {}
    for blocks in held:
        slot = index.open()
        index.store(slot, [prompt[block] for block in blocks])
        deepest[slot] = max((block + 1 for block in blocks), default=0) if 0 in blocks else 0
    for slot, depth in index.match(prompt[:num_asked]).items():
        assert 0 < depth <= min(deepest[slot], num_asked)


def test_nothing_is_held_by_nobody() -> None:
    index = PrefixIndex()
    index.open()
    assert index.match([]) == {}
    assert index.match(chain([1, 2])) == {}


def test_a_thousand_holders_are_all_found() -> None:
    index, prompt = PrefixIndex(), chain([0] * 30)
    expected = {}
    for number in range(1000):
        slot = index.open()
        index.store(slot, prompt[: number % 31])
        expected[slot] = number % 31
    assert index.match(prompt) == {slot: depth for slot, depth in expected.items() if depth}


def test_a_slot_never_grows_past_its_capacity_and_says_so() -> None:
    index, prompt = PrefixIndex(), chain([0] * 10)
    slot = index.open(capacity=6)
    index.store(slot, prompt[:6])
    index.store(slot, prompt[:6])
    assert not index.is_over(slot)
    index.store(slot, prompt)
    assert index.is_over(slot)
    assert index.num_pairs(slot) == 6
    assert index.match(prompt) == {slot: 6}


def test_closed_slots_give_their_memory_back_while_others_change() -> None:
    index = PrefixIndex()
    stays, goes = index.open(), index.open()
    index.store(stays, chain([1] * 5))
    index.store(goes, chain([2] * 200) + chain([3] * 200))
    index.close(goes)
    assert index.match(chain([2])) == {}
    for _ in range(4):
        index.store(stays, chain([1] * 5))
    assert len(index) == 5
    assert index.open() == goes


def test_an_unknown_slot_is_refused() -> None:
    with pytest.raises(KeyError):
        PrefixIndex().store(0, chain([1]))
