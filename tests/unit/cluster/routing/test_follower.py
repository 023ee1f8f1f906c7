"""A follower over a network that loses, repeats and reorders, against the publisher's own truth."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shoal.cluster.kv_events import BlockRemoved, BlockStored, KVEventBatch, decode_batch
from shoal.cluster.replica.event_log import EventLog
from shoal.cluster.routing.follower import IDLE_S, REBASE_PAUSE_S, REPLAY_PAUSE_S, REPLAY_TIMEOUT_S, EventFollower
from shoal.cluster.routing.foreign_hashes import ForeignHashes
from shoal.cluster.routing.prefix_index import PrefixIndex
from shoal.engine.memory.kv_events import BlocksRemoved, BlocksStored, CacheCleared, KVEvent
from shoal.engine.memory.prefix_cache import chain_hashes, root_hash
from shoal.engine.request import BlockHash

BLOCKS = [BlockHash(bytes([number]) * 16) for number in range(24)]

Message = tuple[int, bytes | None]  # a batch, or a heartbeat that names the last one


class FollowerOnBadNetwork(RuleBasedStateMachine):
    @initialize(max_batches=st.integers(0, 6), data=st.data())
    def start(self, max_batches: int, data: st.DataObject) -> None:
        self.max_batches = max_batches
        self.now = 100.0
        self.epoch = 7
        self.truths: dict[int, frozenset[BlockHash]] = {}  # what was held as of each batch
        self.log = self.new_log()
        self.held: set[BlockHash] = set()
        self.live: list[Message] = []  # on their way
        self.answer: list[tuple[int, bytes]] | None = None  # to the last question
        self.answer_size = 0
        if data.draw(st.booleans(), label="joins late"):
            self.store({0, 1, 2})
            self.live.clear()
        self.index = PrefixIndex()
        self.slots: list[int] = []
        self.follower = EventFollower(self.index, self.now, epoch=self.epoch, on_slot=self.slots.append)

    def new_log(self) -> EventLog:
        log = EventLog(self.epoch, 1, max_batches=self.max_batches, snapshot_blocks=3)
        self.truths[log.last_sequence] = frozenset()
        return log

    def publish(self, event: KVEvent) -> None:
        self.live.append(self.log.append([event]))
        self.truths[self.log.last_sequence] = frozenset(self.held)

    # -- the replica -------------------------------------------------------------------------------------------

    @rule(numbers=st.sets(st.integers(0, len(BLOCKS) - 1), min_size=1, max_size=8))
    def store(self, numbers: set[int]) -> None:
        hashes = tuple(BLOCKS[number] for number in numbers)
        self.held.update(hashes)
        self.publish(BlocksStored(hashes, None, tuple(numbers), ""))

    @rule(numbers=st.sets(st.integers(0, len(BLOCKS) - 1), min_size=1, max_size=8))
    def remove(self, numbers: set[int]) -> None:
        hashes = tuple(BLOCKS[number] for number in numbers)
        self.held.difference_update(hashes)
        self.publish(BlocksRemoved(hashes))

    @rule()
    def clear(self) -> None:
        self.held.clear()
        self.publish(CacheCleared())

    @rule()
    def beat(self) -> None:
        self.live.append((self.log.last_sequence, None))

    @rule()
    def restart(self) -> None:
        """What the old publisher sent may still arrive, even the rest of an answer."""
        self.epoch += 1
        self.log = self.new_log()
        self.held.clear()

    # -- the network -------------------------------------------------------------------------------------------

    @precondition(lambda self: self.live)
    @rule(data=st.data(), fate=st.sampled_from(["arrives", "arrives", "arrives", "is lost", "arrives, and once more"]))
    def live_message(self, data: st.DataObject, fate: str) -> None:
        place = data.draw(st.integers(0, min(3, len(self.live) - 1)), label="overtaken")
        message = self.live[place] if "once more" in fate else self.live.pop(place)
        if "arrives" in fate:
            self.deliver(message)

    def deliver(self, message: Message) -> None:
        sequence, payload = message
        if payload is None:
            self.follower.hear(sequence, self.now)
        else:
            self.follower.receive(sequence, decode_batch(payload), self.now)

    @rule(seconds=st.sampled_from([REPLAY_PAUSE_S, IDLE_S, REPLAY_TIMEOUT_S]))
    def ask(self, seconds: float) -> None:
        """Time passes; a new question makes the answer to the old one unheard."""
        self.now += seconds
        start = self.follower.wanted(self.now)
        if start is not None:
            self.answer = list(self.log.replay(start))
            self.answer_size = len(self.answer)

    @precondition(lambda self: self.answer is not None)
    @rule(num_messages=st.integers(0, 8), lost=st.one_of(st.none(), st.integers(0, 7)))
    def hear_answer(self, num_messages: int, lost: int | None) -> None:
        """Some more of it, and its end when nothing is left."""
        assert self.answer is not None
        if lost is not None:
            del self.answer[lost : lost + 1]
        for sequence, payload in self.answer[:num_messages]:
            self.follower.replay(sequence, decode_batch(payload))
        self.answer = self.answer[num_messages:]
        if not self.answer:
            self.answer = None
            self.follower.end_replay(self.answer_size, self.now)

    # -- the promise -------------------------------------------------------------------------------------------

    @rule()
    def network_heals(self) -> None:
        """Whatever happened: once messages flow, a few heartbeats and questions later, the index is the truth."""
        for message in self.live:
            self.deliver(message)
        self.live.clear()
        for _ in range(4):
            self.deliver((self.log.last_sequence, None))
            self.now += REPLAY_TIMEOUT_S
            start = self.follower.wanted(self.now)
            if start is not None:
                answer = list(self.log.replay(start))
                for sequence, payload in answer:
                    self.follower.replay(sequence, decode_batch(payload))
                self.answer = None
                self.follower.end_replay(len(answer), self.now)
        assert self.follower.is_in_order
        assert self.follower.staleness_s(self.now) <= 2 * REPLAY_TIMEOUT_S
        assert self.indexed() == self.held

    @invariant()
    def index_is_the_truth_of_some_time(self) -> None:
        """Never a mixture: exactly what the replica held as of the batch that the follower says."""
        if hasattr(self, "follower") and self.follower.applied is not None:
            assert self.indexed() == self.truths[self.follower.applied]

    def teardown(self) -> None:
        if hasattr(self, "follower"):
            self.network_heals()
            assert not self.slots or self.slots[-1] == self.follower.slot

    def indexed(self) -> set[BlockHash]:
        slot = self.follower.slot
        found = {block for block in BLOCKS if self.index.match([block]) == {slot: 1}}
        assert self.index.num_pairs(slot) == len(found)
        return found


FollowerOnBadNetwork.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
test_index_converges_to_the_truth_once_messages_flow = FollowerOnBadNetwork.TestCase


# -- other engines ---------------------------------------------------------------------------------------------

BLOCK_SIZE = 4
PROMPT = list(range(100, 100 + 5 * BLOCK_SIZE))
OURS = chain_hashes(PROMPT, root_hash(""), BLOCK_SIZE)


def theirs(first: int, last: int, *, ts: float) -> KVEventBatch:
    """Blocks `first` to before `last` of the prompt as vLLM stores them, with numbers for hashes."""
    tokens = PROMPT[first * BLOCK_SIZE : last * BLOCK_SIZE]
    parent = 1000 + first - 1 if first else None
    return KVEventBatch(
        ts, [BlockStored(range(1000 + first, 1000 + last), parent, tokens, BLOCK_SIZE, None, "GPU", None)]
    )


def foreign_follower(index: PrefixIndex, *, can_replay: bool = True) -> EventFollower:
    return EventFollower(index, 0.0, foreign=ForeignHashes(BLOCK_SIZE), can_replay=can_replay)


def test_blocks_of_vllm_are_found_by_our_hashes() -> None:
    index = PrefixIndex()
    follower = foreign_follower(index)
    assert follower.wanted(0.0) == 0
    follower.replay(0, theirs(0, 2, ts=1.0))
    follower.receive(1, theirs(2, 5, ts=2.0), 0.1)
    follower.end_replay(None, 0.2)
    assert index.match(OURS) == {follower.slot: 5}
    follower.receive(2, KVEventBatch(3.0, [BlockRemoved([1003, 1004], "GPU")]), 0.3)
    assert index.match(OURS) == {follower.slot: 3}
    assert follower.is_in_order


def test_a_restart_of_vllm_empties_its_slot() -> None:
    """Its numbers begin again while the time stamps go on."""
    index = PrefixIndex()
    follower = foreign_follower(index)
    follower.wanted(0.0)
    for number in range(3):
        follower.replay(number, theirs(number, number + 1, ts=number))
    follower.end_replay(None, 0.1)
    assert index.match(OURS) == {follower.slot: 3}
    follower.receive(2, theirs(2, 3, ts=2.0), 0.2)
    assert index.match(OURS) == {follower.slot: 3}, "a repeated batch is no restart"
    follower.receive(1, theirs(0, 1, ts=10.0), 0.3)
    assert index.match(OURS) == {}
    assert follower.wanted(1.0) == 0
    follower.replay(0, KVEventBatch(9.0, []))
    follower.replay(1, theirs(0, 1, ts=10.0))
    follower.end_replay(None, 1.1)
    assert index.match(OURS) == {follower.slot: 1}


def test_a_gap_that_vllm_cannot_replay_starts_over() -> None:
    """Removals may have been among what is lost."""
    index = PrefixIndex()
    follower = foreign_follower(index)
    follower.wanted(0.0)
    follower.replay(0, theirs(0, 5, ts=1.0))
    follower.end_replay(None, 0.1)
    follower.receive(9, KVEventBatch(9.0, []), 0.2)
    assert follower.wanted(1.0) == 1
    follower.replay(8, theirs(0, 1, ts=8.0))
    follower.replay(9, KVEventBatch(9.0, []))
    follower.end_replay(None, 1.1)
    assert index.match(OURS) == {follower.slot: 1}


def test_an_engine_without_replay_starts_over_at_every_gap() -> None:
    index = PrefixIndex()
    follower = foreign_follower(index, can_replay=False)
    follower.receive(50, theirs(0, 2, ts=1.0), 0.0)
    follower.receive(51, theirs(2, 3, ts=2.0), 0.1)
    assert index.match(OURS) == {follower.slot: 3}
    follower.receive(53, theirs(0, 1, ts=3.0), 0.2)
    assert index.match(OURS) == {follower.slot: 1}
    assert follower.wanted(100.0) is None


def test_blocks_of_other_tiers_are_not_counted() -> None:
    index = PrefixIndex()
    follower = foreign_follower(index, can_replay=False)
    event = BlockStored([1], None, PROMPT[:BLOCK_SIZE], BLOCK_SIZE, None, "CPU", None)
    follower.receive(0, KVEventBatch(1.0, [event]), 0.0)
    assert index.match(OURS) == {}


# -- time ------------------------------------------------------------------------------------------------------


def test_a_silent_replica_is_asked_and_counts_as_stale_until_it_answers() -> None:
    index, log = PrefixIndex(), EventLog(1, BLOCK_SIZE)
    follower = EventFollower(index, 0.0, epoch=1)
    assert follower.wanted(0.0) is not None
    for sequence, payload in log.replay(2**64 - 2):
        follower.replay(sequence, decode_batch(payload))
    follower.end_replay(1, 0.0)
    assert follower.wanted(IDLE_S - 0.1) is None
    follower.hear(log.last_sequence, IDLE_S)
    assert follower.wanted(2 * IDLE_S - 0.1) is None
    assert follower.wanted(2 * IDLE_S) is not None
    assert follower.staleness_s(2 * IDLE_S) == IDLE_S
    follower.end_replay(0, 2 * IDLE_S)
    assert follower.staleness_s(2 * IDLE_S) == 0.0


def followed(log: EventLog, index: PrefixIndex) -> EventFollower:
    """A follower that knows all that the log holds, at time 0."""
    follower = EventFollower(index, 0.0, epoch=1)
    answer_to(follower, log, follower.wanted(0.0), 0.0)
    assert follower.is_in_order
    return follower


def answer_to(follower: EventFollower, log: EventLog, start: int | None, now: float) -> None:
    assert start is not None
    answer = list(log.replay(start))
    for sequence, payload in answer:
        follower.replay(sequence, decode_batch(payload))
    follower.end_replay(len(answer), now)


def stored(log: EventLog, number: int) -> tuple[int, KVEventBatch]:
    sequence, payload = log.append([BlocksStored((BLOCKS[number],), None, (), "")])
    return sequence, decode_batch(payload)


def test_a_heartbeat_tells_at_once_of_a_lost_last_batch() -> None:
    index, log = PrefixIndex(), EventLog(1, 1)
    follower = followed(log, index)
    lost, _ = stored(log, 0)
    assert follower.wanted(0.2) is None
    follower.hear(log.last_sequence, 0.2)
    assert not follower.is_in_order
    assert follower.wanted(0.2) == lost
    answer_to(follower, log, lost, 0.3)
    assert index.match(BLOCKS[:1]) == {follower.slot: 1}


@pytest.mark.parametrize("max_batches", [10, 0], ids=["batches", "snapshot"])
def test_an_answer_that_live_batches_have_overtaken_changes_nothing(max_batches: int) -> None:
    index, log = PrefixIndex(), EventLog(1, 1, max_batches=max_batches)
    follower = followed(log, index)
    late, early = stored(log, 0), stored(log, 1)
    follower.receive(*early, 0.2)
    start = follower.wanted(0.2)
    assert start == late[0]
    answer = list(log.replay(start))
    follower.receive(*late, 0.3)
    sequence, payload = log.append([BlocksRemoved((BLOCKS[0],))])
    follower.receive(sequence, decode_batch(payload), 0.3)
    slot = follower.slot
    for number, batch in answer:
        follower.replay(number, decode_batch(batch))
    follower.end_replay(len(answer), 0.4)
    assert follower.applied == sequence
    assert follower.slot == slot
    assert index.match(BLOCKS[:1]) == {}
    assert index.match(BLOCKS[1:2]) == {slot: 1}


def test_questions_in_vain_become_rare() -> None:
    follower = EventFollower(PrefixIndex(), 0.0, epoch=1)
    asked = []
    for tenth in range(600):
        if follower.wanted(tenth / 10) is not None:
            asked.append(tenth / 10)
            follower.end_replay(5, tenth / 10)  # none of the five has come
    assert 3 <= len(asked) < 25
    assert asked[-1] - asked[-2] >= REPLAY_TIMEOUT_S - 0.2


def test_a_slot_that_overflows_is_made_anew() -> None:
    index, log = PrefixIndex(), EventLog(1, 1)
    follower = EventFollower(index, 0.0, epoch=1, capacity=2)
    follower.wanted(0.0)
    for sequence, payload in log.replay(2**64 - 2):
        follower.replay(sequence, decode_batch(payload))
    follower.end_replay(1, 0.0)
    sequence, payload = log.append([BlocksStored(tuple(BLOCKS[:2]), None, (), "")])
    follower.receive(sequence, decode_batch(payload), 0.1)
    foul = KVEventBatch(0.0, [BlockStored([BLOCKS[5]], None, [], 1, None, "GPU", None)])
    follower.receive(log.append([BlocksRemoved((BLOCKS[9],))])[0], foul, 0.2)
    assert index.is_over(follower.slot)
    assert follower.wanted(REBASE_PAUSE_S) == 2**64 - 2
    answer = list(log.replay(2**64 - 2))
    for sequence, payload in answer:
        follower.replay(sequence, decode_batch(payload))
    follower.end_replay(len(answer), REBASE_PAUSE_S)
    assert not index.is_over(follower.slot)
    assert index.match(BLOCKS[:1]) == {follower.slot: 1}
