"""How likely a block that left every cache is wanted again, learned from those that were."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Final

from shoal.engine.request import BlockHash

HALF_LIFE: Final = 4096  # observations
MAX_GHOSTS: Final = 100_000


class ReuseStats:
    """Remembers blocks that no replica holds any more and counts how many of them are asked for again.

    Such ghosts are how ARC (Megiddo and Modha, FAST 2003) learns what more memory would bring. Here they tell what
    evicting a block costs, by expectation. They are kept for all replicas together: where a prefix is gone, nothing
    leads its next request back to the replica that lost it. As many ghosts are kept as blocks are cached, so the count
    is of blocks that would have been hit in a cache twice as large. All counts are halved every HALF_LIFE observations,
    so that the estimate follows the workload.
    """

    def __init__(self) -> None:
        self._ghosts: OrderedDict[BlockHash, bool] = OrderedDict()  # oldest first; whether it was wanted
        self._wanted = 0.0
        self._seen = 0.0

    @property
    def chance(self) -> float:
        """That a block is wanted again soon after it was evicted; 0.0 while nothing is known."""
        return self._wanted / self._seen if self._seen else 0.0

    def gone(self, block_hash: BlockHash, num_cached: int) -> None:
        """The last copy of a block was evicted, where `num_cached` are left."""
        if (was_wanted := self._ghosts.pop(block_hash, None)) is not None:
            self._count(was_wanted)
        self._ghosts[block_hash] = False
        while len(self._ghosts) > min(num_cached, MAX_GHOSTS):
            self._count(self._ghosts.popitem(last=False)[1])

    def missed(self, block_hashes: Iterable[BlockHash]) -> None:
        """A prompt goes on with these behind its cached prefix: as far as they are ghosts, they would have been hit."""
        for block_hash in block_hashes:
            if block_hash not in self._ghosts:
                return
            self._ghosts[block_hash] = True

    def _count(self, wanted: bool) -> None:
        self._wanted += wanted
        self._seen += 1.0
        if self._seen >= HALF_LIFE:
            self._wanted /= 2
            self._seen /= 2
