"""What happens to cached prefixes, in order: the events that a router follows to know what this replica holds."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.engine.request import BlockHash


@dataclass(frozen=True, slots=True)
class BlocksStored:
    """Consecutive blocks of one request that can be found by their hashes from now on.

    parent: the hash of the block before the first one, None where that begins a prompt.
    token_ids: the tokens of these blocks alone. salt: the request's cache salt, which the root of its hashes holds.
    """

    block_hashes: tuple[BlockHash, ...]
    parent: BlockHash | None
    token_ids: tuple[int, ...]
    salt: str


@dataclass(frozen=True, slots=True)
class BlocksRemoved:
    """Evicted blocks, the first one first: a block goes before those that it was built on."""

    block_hashes: tuple[BlockHash, ...]


@dataclass(frozen=True, slots=True)
class CacheCleared:
    """Nothing is cached any more."""


KVEvent = BlocksStored | BlocksRemoved | CacheCleared


class KVEventRecorder:
    """Events since the last `take`, which somebody has to call: nothing else bounds them."""

    def __init__(self) -> None:
        self._events: list[KVEvent] = []
        self._removed: list[BlockHash] = []  # the last event, where that is a removal

    def stored(self, event: BlocksStored) -> None:
        self._close_removal()
        self._events.append(event)

    def removed(self, block_hash: BlockHash) -> None:
        self._removed.append(block_hash)

    def cleared(self) -> None:
        self._close_removal()
        self._events.append(CacheCleared())

    def take(self) -> list[KVEvent]:
        self._close_removal()
        events, self._events = self._events, []
        return events

    def _close_removal(self) -> None:
        if self._removed:
            self._events.append(BlocksRemoved(tuple(self._removed)))
            self._removed = []
