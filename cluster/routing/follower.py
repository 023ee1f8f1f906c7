"""Keeps one replica's slot of the prefix index true, whatever the network does to its KV events."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Final

from shoal.cluster.kv_events import (
    DEVICE_MEDIUM,
    SNAPSHOT,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVEventBatch,
    WireEvent,
    WireHash,
    epoch_of,
    first_sequence,
)
from shoal.cluster.routing.foreign_hashes import ForeignHashes
from shoal.cluster.routing.prefix_index import PrefixIndex
from shoal.engine.request import BlockHash

# A replica that has not been heard of for so long is asked whether there is anything new.
IDLE_S: Final = 2.5
# A replay that has not ended by then is asked for again. The pause between two doubles while they are in vain.
REPLAY_TIMEOUT_S: Final = 5.0
REPLAY_PAUSE_S: Final = 0.1
# A slot that was full has missed removals and starts over, but not all the time.
REBASE_PAUSE_S: Final = 30.0
_MAX_PENDING: Final = 10_000


class EventFollower:
    """Decides what of a replica's messages to apply, and what to ask it for. No sockets, no threads, no clock: every
    `now` is in seconds of one monotonic clock. Calls that change the index are made under the index's lock.

    epoch: of the replica's publisher, None for an engine whose sequence numbers have none (vLLM). Such an engine has
    started anew if its numbers fall while its time stamps rise.
    foreign: translates the engine's hashes, None if they are ours.
    can_replay: whether the engine answers replays; if not, every gap starts the slot over.
    on_slot: called with the new slot when the replica starts over, before the old one is closed.
    """

    def __init__(
        self,
        index: PrefixIndex,
        now: float,
        *,
        epoch: int | None = None,
        capacity: int | None = None,
        foreign: ForeignHashes | None = None,
        can_replay: bool = True,
        on_slot: Callable[[int], None] = lambda slot: None,
    ) -> None:
        self._index = index
        self._epoch = epoch
        self._capacity = capacity
        self._foreign = foreign
        self._can_replay = can_replay
        self._on_slot = on_slot
        self._slot = index.open(capacity)
        self._has_base = False  # whether the slot is what the batches before `_next` add up to
        self._next = 0 if epoch is None else first_sequence(epoch)
        self._newest = self._next - 1  # the highest number heard of
        self._newest_ts = 0.0  # of the last batch applied
        self._pending: dict[int, KVEventBatch] = {}  # came too early
        self._replayed: list[tuple[int, KVEventBatch]] = []
        self._asked_s: float | None = None  # when the replay that is being waited for was asked for
        self._may_ask_s = now
        self._pause_s = REPLAY_PAUSE_S
        self._based_s = now
        self._in_order_s = now

    @property
    def slot(self) -> int:
        return self._slot

    @property
    def applied(self) -> int | None:
        """The number of the batch as of which the slot is the truth; None while it is not known to be."""
        return self._next - 1 if self._has_base else None

    @property
    def is_in_order(self) -> bool:
        """Whether nothing that was published, as far as is known, is missing."""
        return self._has_base and self._newest < self._next

    def staleness_s(self, now: float) -> float:
        """Time since everything published was known to be in the index."""
        return now - self._in_order_s

    # -- what arrives ------------------------------------------------------------------------------------------

    def receive(self, sequence: int, batch: KVEventBatch, now: float) -> None:
        """A live batch; late, early and repeated ones are welcome."""
        if not self._is_current(sequence):
            return
        if self._epoch is None and sequence < self._next and batch.ts > self._newest_ts:
            self._start_epoch(None)
        self._newest = max(self._newest, sequence)
        if not self._can_replay and (not self._has_base or sequence > self._next):
            self._rebase([(sequence, batch)], now)
        elif sequence >= self._next and len(self._pending) < _MAX_PENDING:
            self._pending[sequence] = batch
        self._catch_up(now)

    def hear(self, sequence: int, now: float) -> None:
        """The replica says that its last batch had this number."""
        if self._is_current(sequence):
            self._newest = max(self._newest, sequence)
            self._catch_up(now)

    def replay(self, sequence: int, batch: KVEventBatch) -> None:
        """A batch of the answer to a replay. Counts when the answer has ended."""
        self._replayed.append((sequence, batch))

    def end_replay(self, num_batches: int | None, now: float) -> None:
        """The answer to a replay has ended, after `num_batches` if the replica tells. An incomplete one is dropped."""
        replayed, self._replayed = self._replayed, []
        self._asked_s = None
        if not _is_gapless(replayed) or (num_batches is not None and num_batches != len(replayed)):
            return
        replayed = [(sequence, batch) for sequence, batch in replayed if self._is_current(sequence)]
        # A newer epoch that shows up in the middle makes what was before it old.
        replayed = [(sequence, batch) for sequence, batch in replayed if self._is_current(sequence)]
        if self._is_base(replayed):
            self._rebase(replayed, now)
        elif self._has_base:
            for sequence, batch in replayed:
                if sequence == self._next:
                    self._apply(batch)
                    self._next += 1
        self._newest = max(self._newest, self._next - 1)
        self._pending = {number: early for number, early in self._pending.items() if number >= self._next}
        self._catch_up(now)

    def wanted(self, now: float) -> int | None:
        """Where a replay has to start that should be asked for now; None if there is nothing to ask. Whoever asks
        listens until `end_replay`; from an answer that is too late, nothing may be passed on any more.
        """
        if not self._can_replay or now < self._may_ask_s:
            return None
        if self._index.is_over(self._slot) and now >= self._based_s + REBASE_PAUSE_S:
            self._has_base = False
        is_waiting = self._asked_s is not None and now < self._asked_s + REPLAY_TIMEOUT_S
        if is_waiting or (self.is_in_order and now < self._in_order_s + IDLE_S):
            return None
        self._asked_s = now
        self._may_ask_s = now + self._pause_s
        self._pause_s = min(2 * self._pause_s, REPLAY_TIMEOUT_S)
        self._replayed.clear()
        if self._has_base:
            return self._next
        return 0 if self._epoch is None else SNAPSHOT

    def close(self) -> None:
        self._index.close(self._slot)

    # ----------------------------------------------------------------------------------------------------------

    def _is_current(self, sequence: int) -> bool:
        """Whether the number is of the publisher's last start; a newer one than is known starts the follower over."""
        if self._epoch is None:
            return True
        if epoch_of(sequence) > self._epoch:
            self._start_epoch(epoch_of(sequence))
        return epoch_of(sequence) == self._epoch

    def _start_epoch(self, epoch: int | None) -> None:
        """The replica has started anew: what it held is gone."""
        self._epoch = epoch
        self._has_base = False
        self._next = 0 if epoch is None else first_sequence(epoch)
        self._newest = self._next - 1
        self._newest_ts = 0.0
        self._pending.clear()
        self._renew_slot()

    def _is_base(self, replayed: list[tuple[int, KVEventBatch]]) -> bool:
        """Whether the slot has to start over with these."""
        if not replayed:
            return not self._has_base and self._epoch is None  # nothing was published so far
        (first, batch), (last, _) = replayed[0], replayed[-1]
        # An answer that begins later than it was asked to, and with no snapshot: what was before is not to be had.
        return not self._has_base or (last >= self._next and (batch.needs_nothing_before or first > self._next))

    def _rebase(self, batches: list[tuple[int, KVEventBatch]], now: float) -> None:
        if not batches or not batches[0][1].needs_nothing_before:
            self._renew_slot()
        for sequence, batch in batches:
            self._apply(batch)
            self._next = sequence + 1
        self._has_base = True
        self._based_s = now

    def _catch_up(self, now: float) -> None:
        """Apply what came too early and is due."""
        if not self._has_base:
            return
        while (batch := self._pending.pop(self._next, None)) is not None:
            self._apply(batch)
            self._next += 1
        if self.is_in_order:
            self._in_order_s = now
            self._pause_s = REPLAY_PAUSE_S

    # -- the index ---------------------------------------------------------------------------------------------

    def _apply(self, batch: KVEventBatch) -> None:
        for event in batch.events:
            self._apply_event(event)
        self._newest_ts = batch.ts

    def _apply_event(self, event: WireEvent) -> None:
        if isinstance(event, AllBlocksCleared):
            self._renew_slot()
        elif event.medium not in (DEVICE_MEDIUM, None) or event.group_idx:
            return  # another tier, or a hybrid model's group that holds less than the whole prefix
        elif isinstance(event, BlockStored):
            self._index.store(self._slot, self._stored(event))
        else:
            self._index.remove(self._slot, self._removed(event))

    def _stored(self, event: BlockStored) -> list[BlockHash]:
        return _own(event.block_hashes) if self._foreign is None else self._foreign.store(event)

    def _removed(self, event: BlockRemoved) -> list[BlockHash]:
        return _own(event.block_hashes) if self._foreign is None else self._foreign.remove(event.block_hashes)

    def _renew_slot(self) -> None:
        """Forget all that the replica holds."""
        if self._foreign is not None:
            self._foreign.clear()
        old, self._slot = self._slot, self._index.open(self._capacity)
        self._on_slot(self._slot)
        self._index.close(old)


def _own(block_hashes: Sequence[WireHash]) -> list[BlockHash]:
    return [BlockHash(block_hash) for block_hash in block_hashes if isinstance(block_hash, bytes)]


def _is_gapless(replayed: list[tuple[int, KVEventBatch]]) -> bool:
    """A snapshot's batches have one number, others follow each other."""
    return all(later[0] - earlier[0] in (0, 1) for earlier, later in pairwise(replayed))
