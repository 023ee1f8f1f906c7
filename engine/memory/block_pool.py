"""Fixed-size KV blocks with reference counts and an O(1) least-recently-used free list.

PagedAttention's allocator (Kwon et al. 2023, arXiv 2309.06180). A block whose count drops to zero keeps its contents
and waits in the free list; until it is handed out again it can be acquired back, which is what the prefix cache lives
on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from shoal.engine.request import BlockId

NULL_BLOCK = BlockId(0)  # never handed out: stands in block tables where nothing is kept


class BlockPool:
    """Blocks 1 .. num_blocks-1. `on_reuse(block)` is called just before a block gets a new owner.

    The free list is doubly linked through two arrays, `num_blocks` being the sentinel: head = next to be reused.
    """

    def __init__(self, num_blocks: int, on_reuse: Callable[[BlockId], None]) -> None:
        assert num_blocks >= 2, num_blocks
        self.num_blocks = num_blocks
        self._on_reuse = on_reuse
        self._references = [0] * num_blocks
        self._end = end = num_blocks
        self._next = [0] * (num_blocks + 1)
        self._previous = [0] * (num_blocks + 1)
        self._next[end] = self._previous[end] = end
        self._num_free = 0
        for block in range(1, num_blocks):
            self._insert_after(self._previous[end], block)

    @property
    def num_free(self) -> int:
        """Blocks that nobody references: empty ones, and cached ones that may be evicted."""
        return self._num_free

    @property
    def num_usable(self) -> int:
        return self.num_blocks - 1

    def references(self, block: BlockId) -> int:
        return self._references[block]

    def allocate(self, count: int) -> list[BlockId]:
        """`count` blocks with one reference each, least recently used first. The caller has checked `num_free`."""
        assert count <= self._num_free, (count, self._num_free)
        taken = []
        for _ in range(count):
            block = BlockId(self._next[self._end])
            self._unlink(block)
            self._on_reuse(block)
            self._references[block] = 1
            taken.append(block)
        return taken

    def acquire(self, block: BlockId) -> None:
        """One more reference; brings the block back if it was free."""
        if self._references[block] == 0:
            self._unlink(block)
        self._references[block] += 1

    def release(self, blocks: Iterable[BlockId], keep: Callable[[BlockId], bool]) -> None:
        """One reference less for each. Blocks worth keeping go to the far end of the free list, others to its head.

        Pass a table in reverse, so that a prefix outlives what was built on it.
        """
        for block in blocks:
            if block == NULL_BLOCK:
                continue
            left = self._references[block] - 1
            assert left >= 0, f"block {block} released too often"
            self._references[block] = left
            if left == 0:
                self._insert_after(self._previous[self._end] if keep(block) else self._end, block)

    def free_blocks(self) -> list[BlockId]:
        """The free list in the order of reuse. O(free blocks): for checks and tests."""
        blocks, block = [], self._next[self._end]
        while block != self._end:
            blocks.append(BlockId(block))
            block = self._next[block]
        return blocks

    def _insert_after(self, left: int, block: int) -> None:
        right = self._next[left]
        self._next[left] = self._previous[right] = block
        self._previous[block], self._next[block] = left, right
        self._num_free += 1

    def _unlink(self, block: int) -> None:
        left, right = self._previous[block], self._next[block]
        self._next[left], self._previous[right] = right, left
        self._num_free -= 1
