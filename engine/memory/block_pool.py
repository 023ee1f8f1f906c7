"""Fixed-size KV blocks with reference counts, and the order in which those that nobody references are handed out.

PagedAttention's allocator (Kwon et al. 2023, arXiv 2309.06180). A block whose count drops to zero keeps its contents
until it is handed out again; until then it can be acquired back, which is what the prefix cache lives on.

Empty blocks go first, then the one with the largest age per use: hyperbolic caching (Blankstein et al., USENIX ATC
2017), in classes by the number of uses as segmented LRU has them. Within a class the order is that of the last use,
so the victim is the head of one of few lists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from shoal.engine.request import BlockId

NULL_BLOCK = BlockId(0)  # never handed out: stands in block tables where nothing is kept
MAX_USES = 4  # more of them count as so many
EMPTY = 0  # uses of a free block that holds nothing


class BlockPool:
    """Blocks 1 .. num_blocks-1. `on_evict(block)` is called just before a block that holds something gets a new owner.

    A use is a request that was given the block, the one that computed it included. Age is counted in blocks allocated
    since the last use ended. Whoever is given a block was given what it is built on as well, so a prefix has as many
    uses and is as young as what is built on it: it goes last.

    Free blocks stand in one list for each number of uses, doubly linked through two arrays: `num_blocks` + uses is the
    sentinel of a list, and its head the next to be handed out.
    """

    def __init__(self, num_blocks: int, on_evict: Callable[[BlockId], None]) -> None:
        assert num_blocks >= 2, num_blocks
        self.num_blocks = num_blocks
        self._on_evict = on_evict
        self._references = [0] * num_blocks
        self._uses = [EMPTY] * num_blocks
        self._freed_at = [0] * num_blocks  # in blocks allocated
        self.num_allocated = 0  # ever
        self._ends = range(num_blocks, num_blocks + MAX_USES + 1)
        self._next = list(range(num_blocks + MAX_USES + 1))
        self._previous = list(self._next)
        self._num_free = self._num_empty = 0
        for block in range(1, num_blocks):
            self._insert_after(self._previous[num_blocks], block)

    @property
    def num_free(self) -> int:
        """Blocks that nobody references: empty ones, and cached ones that may be evicted."""
        return self._num_free

    @property
    def num_empty(self) -> int:
        """Free blocks that hold nothing cached."""
        return self._num_empty

    @property
    def num_usable(self) -> int:
        return self.num_blocks - 1

    def references(self, block: BlockId) -> int:
        return self._references[block]

    def uses(self, block: BlockId) -> int:
        """Requests that were given this block, MAX_USES at most; EMPTY for a free one that holds nothing."""
        return self._uses[block]

    def allocate(self, count: int) -> list[BlockId]:
        """`count` blocks with one reference each. The caller has checked `num_free`."""
        assert count <= self._num_free, (count, self._num_free)
        taken = []
        for _ in range(count):
            block = BlockId(self._next[self._ends[EMPTY]])
            if block == self._ends[EMPTY]:
                block = self.victim()
                self._on_evict(block)
            self._unlink(block)
            self.num_allocated += 1
            self._references[block] = self._uses[block] = 1
            taken.append(block)
        return taken

    def acquire(self, block: BlockId) -> None:
        """One more reference and use; brings the block back if it was free."""
        uses = self._uses[block]
        if self._references[block] == 0:
            self._unlink(block)
        self._references[block] += 1
        if uses < MAX_USES:
            self._uses[block] = uses + 1

    def release(self, blocks: Iterable[BlockId], keep: Callable[[BlockId], bool]) -> None:
        """One reference less for each. A block that has none left waits behind those of as many uses, or is empty if it
        is not to be kept.

        Pass a table in reverse, so that a prefix outlives what was built on it.
        """
        for block in blocks:
            if block == NULL_BLOCK:
                continue
            left = self._references[block] - 1
            assert left >= 0, f"block {block} released too often"
            self._references[block] = left
            if left:
                continue
            if keep(block):
                self._freed_at[block] = self.num_allocated
                self._insert_after(self._previous[self._ends[self._uses[block]]], block)
            else:
                self._uses[block] = EMPTY
                self._insert_after(self._ends[EMPTY], block)

    def refresh(self, blocks: Sequence[BlockId]) -> None:
        """Free ones are as young as if they had been used just now. Pass a prefix from its beginning."""
        for block in reversed(blocks):
            if self._references[block] == 0:
                self._unlink(block)
                self._freed_at[block] = self.num_allocated
                self._insert_after(self._previous[self._ends[self._uses[block]]], block)

    def inherit(self, heir: BlockId, block: BlockId) -> None:
        """`heir`, which is in use, now stands for what both hold: their uses are added up."""
        assert self._references[heir] > 0, heir
        self._uses[heir] = min(self._uses[heir] + self._uses[block], MAX_USES)

    def discard(self, block: BlockId) -> None:
        """A free block is empty from now on."""
        assert self._references[block] == 0, block
        self._unlink(block)
        self._uses[block] = EMPTY
        self._insert_after(self._ends[EMPTY], block)

    def discard_all(self) -> None:
        """All free blocks are empty from now on."""
        for block in self.free_blocks():
            if self._uses[block] != EMPTY:
                self.discard(block)

    def victim(self) -> BlockId:
        """The cached block that would be evicted first: the one with the largest age per use, NULL_BLOCK if none is
        free. In a tie fewer uses go first: what is built on a prefix has at most as many.
        """
        victim, worst = NULL_BLOCK, -1.0
        for uses in range(1, MAX_USES + 1):
            block = self._next[self._ends[uses]]
            if block < self.num_blocks:
                age_per_use = (self.num_allocated - self._freed_at[block]) / uses
                if age_per_use > worst:
                    victim, worst = BlockId(block), age_per_use
        return victim

    def free_blocks(self) -> list[BlockId]:
        """Empty ones, then by uses, each list in the order of reuse. O(free blocks): for checks and tests."""
        blocks = []
        for end in self._ends:
            block = self._next[end]
            while block != end:
                blocks.append(BlockId(block))
                block = self._next[block]
        return blocks

    def _insert_after(self, left: int, block: int) -> None:
        right = self._next[left]
        self._next[left] = self._previous[right] = block
        self._previous[block], self._next[block] = left, right
        self._num_free += 1
        self._num_empty += self._uses[block] == EMPTY

    def _unlink(self, block: int) -> None:
        left, right = self._previous[block], self._next[block]
        self._next[left], self._previous[right] = right, left
        self._num_free -= 1
        self._num_empty -= self._uses[block] == EMPTY
