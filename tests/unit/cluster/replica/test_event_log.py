"""What a replica answers to those who ask for the past."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from shoal.cluster.kv_events import SNAPSHOT, AllBlocksCleared, BlockRemoved, BlockStored, decode_batch, first_sequence
from shoal.cluster.replica.event_log import EventLog
from shoal.engine.memory.kv_events import BlocksRemoved, BlocksStored, CacheCleared, KVEvent
from shoal.engine.request import BlockHash


def block(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(16, "big"))


NUMBERS = st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True)
EVENTS = st.lists(
    st.one_of(
        NUMBERS.map(lambda numbers: BlocksStored(tuple(map(block, numbers)), None, (), "")),
        NUMBERS.map(lambda numbers: BlocksRemoved(tuple(map(block, numbers)))),
        st.just(CacheCleared()),
    ),
    max_size=20,
)


def replayed(log: EventLog, start: int, held: set[object]) -> tuple[list[int], set[object]]:
    """The numbers of an answer, and what somebody holds who heard it."""
    numbers = []
    for number, payload in log.replay(start):
        numbers.append(number)
        for event in decode_batch(payload).events:
            match event:
                case BlockStored():
                    held = held | set(event.block_hashes)
                case BlockRemoved():
                    held = held - set(event.block_hashes)
                case AllBlocksCleared():
                    held = set()
    return numbers, held


@given(events=EVENTS, max_batches=st.integers(0, 5), start=st.integers(-1, 25))
def test_whoever_hears_an_answer_holds_what_the_engine_holds(
    events: list[KVEvent], max_batches: int, start: int
) -> None:
    """From any number on, given that the asker held the truth of before it; also from a snapshot, given anything."""
    log = EventLog(3, 1, max_batches=max_batches)
    truths: list[set[object]] = [set()]
    for event in events:
        log.append([event])
        held = set(truths[-1])
        match event:
            case BlocksStored(hashes):
                held |= set(hashes)
            case BlocksRemoved(hashes):
                held -= set(hashes)
            case _:
                held = set()
        truths.append(held)
    before = truths[max(0, min(start, len(events)))]
    _, heard = replayed(log, max(0, first_sequence(3) + start), before)
    assert heard == truths[-1]
    numbers, heard = replayed(log, SNAPSHOT, {"something else"})
    assert heard == truths[-1]
    assert set(numbers) == {log.last_sequence}


def test_bytes_are_bounded_and_a_long_snapshot_comes_in_parts() -> None:
    log = EventLog(1, 1, max_bytes=10_000)
    for number in range(0, 10_000, 10):
        log.append([BlocksStored(tuple(block(number + i) for i in range(10)), None, (), "")])
    kept = list(log.replay(log.last_sequence - 5))
    assert len(kept) == 6
    assert sum(len(payload) for _, payload in log.replay(first_sequence(1) + 1000 - 20)) < 10_000
    parts = list(log.replay(first_sequence(1)))
    assert len(parts) == 3
    assert {number for number, _ in parts} == {log.last_sequence}
    assert replayed(log, 0, set())[1] == set(map(block, range(10_000)))


def test_a_salt_stands_with_the_first_block_of_a_prompt() -> None:
    log = EventLog(1, 2)
    first = BlocksStored((block(1), block(2)), None, (1, 2, 3, 4), "tenant")
    _, payload = log.append([first, BlocksStored((block(3),), block(2), (5, 6), "tenant")])
    stored = [event for event in decode_batch(payload).events if isinstance(event, BlockStored)]
    assert [event.extra_keys for event in stored] == [[["tenant"], None], None]
    assert [event.parent_block_hash for event in stored] == [None, block(2)]
    assert stored[0].token_ids == [1, 2, 3, 4]
