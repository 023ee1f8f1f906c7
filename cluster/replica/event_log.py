"""What a replica's publisher remembers: the last batches of KV events, and the hashes that they add up to."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from shoal.cluster.kv_events import (
    DEVICE_MEDIUM,
    SNAPSHOT,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVEventBatch,
    WireEvent,
    encode_batch,
    first_sequence,
)
from shoal.engine.memory.kv_events import BlocksRemoved, BlocksStored, KVEvent
from shoal.engine.request import BlockHash

MAX_BATCHES: Final = 10_000  # as vLLM's buffer_steps
MAX_BYTES: Final = 16 << 20
SNAPSHOT_BLOCKS: Final = 4096  # of one message: 74 KB


class EventLog:
    """Numbers batches, keeps the last ones, and answers replays. No sockets, no threads.

    The set of hashes is the log's own, not the engine's: so it is exactly what the batches up to the last number say,
    whatever the engine does in the meantime, and no lock is shared with it. That costs a dict entry for each cached
    block; the hashes themselves are the engine's objects.
    """

    def __init__(
        self,
        epoch: int,
        block_size: int,
        *,
        max_batches: int = MAX_BATCHES,
        max_bytes: int = MAX_BYTES,
        snapshot_blocks: int = SNAPSHOT_BLOCKS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._block_size = block_size
        self._max_batches = max_batches
        self._max_bytes = max_bytes
        self._snapshot_blocks = snapshot_blocks
        self._clock = clock
        self._first = self._next = first_sequence(epoch)
        self._batches: deque[bytes] = deque()  # consecutive, the last one before self._next
        self._num_bytes = 0
        self._held: dict[BlockHash, None] = {}  # in the order of storing: parents first

    @property
    def last_sequence(self) -> int:
        """Of the last batch; before the first one, the number before that."""
        return self._next - 1

    def append(self, events: Sequence[KVEvent]) -> tuple[int, bytes]:
        """Number and payload of the batch that holds these events."""
        for event in events:
            self._apply(event)
        payload = self._encode([self._on_wire(event) for event in events])
        sequence, self._next = self._next, self._next + 1
        self._batches.append(payload)
        self._num_bytes += len(payload)
        while len(self._batches) > self._max_batches or self._num_bytes > self._max_bytes:
            self._num_bytes -= len(self._batches.popleft())
        return sequence, payload

    def replay(self, start: int) -> Iterator[tuple[int, bytes]]:
        """All batches from number `start` on, or a snapshot if some of them are no longer here or none is wanted."""
        oldest = self._next - len(self._batches)
        if start == SNAPSHOT or (start < oldest and oldest > self._first):
            return ((self.last_sequence, payload) for payload in self._snapshot())
        skipped = max(0, start - oldest)
        return enumerate(itertools.islice(self._batches, skipped, None), oldest + skipped)

    def _snapshot(self) -> Iterator[bytes]:
        """Batches that make an empty cache of any, and then this one."""
        hashes = list(self._held)
        events: list[WireEvent] = [AllBlocksCleared()]
        for start in range(0, max(1, len(hashes)), self._snapshot_blocks):
            part = hashes[start : start + self._snapshot_blocks]
            if part:
                events.append(BlockStored(part, None, [], self._block_size, None, DEVICE_MEDIUM, None))
            yield self._encode(events)
            events = []

    def _encode(self, events: list[WireEvent]) -> bytes:
        return encode_batch(KVEventBatch(self._clock(), events, data_parallel_rank=0))

    def _apply(self, event: KVEvent) -> None:
        match event:
            case BlocksStored(block_hashes):
                self._held.update(dict.fromkeys(block_hashes))
            case BlocksRemoved(block_hashes):
                for block_hash in block_hashes:
                    self._held.pop(block_hash, None)
            case _:
                self._held.clear()

    def _on_wire(self, event: KVEvent) -> WireEvent:
        match event:
            case BlocksStored(block_hashes, parent, token_ids, salt):
                # As vLLM does: the salt is a key of a prompt's first block, and in the others through their parents.
                extra_keys = [[salt], *[None] * (len(block_hashes) - 1)] if salt and parent is None else None
                return BlockStored(
                    block_hashes, parent, token_ids, self._block_size, None, DEVICE_MEDIUM, None, extra_keys
                )
            case BlocksRemoved(block_hashes):
                return BlockRemoved(block_hashes, DEVICE_MEDIUM)
            case _:
                return AllBlocksCleared()
