"""Block tables of live requests: admission, growth, sharing, and giving back. Composes the pool and the prefix
cache.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

from shoal.engine.memory.block_pool import NULL_BLOCK, BlockPool
from shoal.engine.memory.kv_layout import blocks_needed
from shoal.engine.memory.prefix_cache import PrefixCache, extend_hashes
from shoal.engine.request import BlockId, Request, RequestId


@dataclass(slots=True)
class BlockTable:
    """Blocks of one request in order; NULL_BLOCK where a sliding window has passed."""

    blocks: list[BlockId] = field(default_factory=list)
    num_cached: int = 0  # leading blocks that were offered to the prefix cache
    num_sent: int = 0  # leading blocks that the ranks know
    num_passed: int = 0  # leading blocks given back because the window has passed them


class KVManager:
    """The one allocator of a replica; every rank uses its block ids. Keeps request.num_computed (at admission) and
    request.num_slots.

    window: tokens that any layer can still see behind a position, None if some layer sees all. Blocks out of every
    layer's sight are given back while the request runs.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        enable_prefix_caching: bool = True,
        watermark: float = 0.0,
        window: int | None = None,
    ) -> None:
        self.block_size = block_size
        self._cache = PrefixCache()
        self._pool = BlockPool(num_blocks, on_reuse=self._cache.evict)
        self._is_caching = enable_prefix_caching
        self._watermark_blocks = int(watermark * num_blocks)
        self._window = window
        self._tables: dict[RequestId, BlockTable] = {}
        self._deferred: deque[tuple[int, list[BlockId]]] = deque()  # (last step that may write, blocks to give back)

    @property
    def num_usable_blocks(self) -> int:
        return self._pool.num_usable

    @property
    def num_free_blocks(self) -> int:
        return self._pool.num_free

    @property
    def num_deferred_blocks(self) -> int:
        """Blocks that are given back once a step in flight is over; some may stay with others who share them."""
        return sum(len(blocks) for _, blocks in self._deferred)

    @property
    def num_cached_blocks(self) -> int:
        return len(self._cache)

    def holds(self, request_id: RequestId) -> bool:
        return request_id in self._tables

    def table(self, request_id: RequestId) -> tuple[BlockId, ...]:
        return tuple(self._tables[request_id].blocks)

    def take_unsent(self, request_id: RequestId) -> tuple[BlockId, ...]:
        """Blocks added since the last call: what the ranks have yet to be told."""
        table = self._tables[request_id]
        if table.num_sent == len(table.blocks):
            return ()
        blocks = tuple(table.blocks[table.num_sent :])
        table.num_sent = len(table.blocks)
        return blocks

    # -- admission ---------------------------------------------------------------------------------------------

    def admit(self, request: Request, *, is_alone: bool) -> bool:
        """Give blocks for all known tokens, those with a cached prefix first. Sets request.num_computed.

        All or nothing, and never into the watermark unless the request `is_alone`: admitting a prompt that can only be
        computed by preempting others makes everybody slower.
        """
        assert request.request_id not in self._tables, request.request_id
        hits: list[BlockId] = []
        if self._is_caching:
            # The last known token is always computed: its logits are wanted.
            limit = (request.num_known - 1) // self.block_size
            extend_hashes(request, limit, self.block_size)
            hits = self._cache.longest_match(request.block_hashes[:limit])
        total = blocks_needed(request.num_known, self.block_size)
        taken_from_free = total - len(hits) + sum(self._pool.references(block) == 0 for block in hits)
        reserve = 0 if is_alone else self._watermark_blocks
        if taken_from_free + reserve > self._pool.num_free:
            return False
        for block in hits:
            self._pool.acquire(block)
        blocks = hits + self._pool.allocate(total - len(hits))
        self._tables[request.request_id] = BlockTable(blocks, num_cached=len(hits))
        request.num_computed = len(hits) * self.block_size
        request.num_slots = total * self.block_size
        return True

    def can_fork(self, request: Request, source: Request) -> bool:
        """Whether `source` still holds the KV of its whole prompt, as far as the next query can see."""
        table = self._tables.get(source.request_id)
        num_prompt = len(request.prompt_ids)
        return (
            table is not None
            and source.num_computed >= num_prompt
            and table.num_passed <= self._num_out_of_sight(num_prompt - 1)
        )

    def fork(self, request: Request, source: RequestId) -> tuple[tuple[BlockId, BlockId], ...] | None:
        """Admit `request` on the blocks of `source`, whose prompt is the same and computed (`can_fork`).

        Whole blocks are shared. The one that both will write is copied: the answer holds (source, target) for the
        ranks, before anything is computed; None if there are no blocks. All prompt tokens but the last count as
        computed, and that one gives the fork its own logits.
        """
        assert request.request_id not in self._tables, request.request_id
        parent = self._tables[source]
        num_computed = len(request.prompt_ids) - 1
        num_shared, rest = divmod(num_computed, self.block_size)
        num_own = blocks_needed(request.num_known, self.block_size) - num_shared
        if num_own + self._watermark_blocks > self._pool.num_free:
            return None
        shared = parent.blocks[:num_shared]
        for block in shared:
            if block != NULL_BLOCK:
                self._pool.acquire(block)
        own = self._pool.allocate(num_own)
        self._tables[request.request_id] = BlockTable(
            blocks=shared + own,
            num_cached=min(parent.num_cached, num_shared),
            num_passed=min(parent.num_passed, num_shared),
        )
        request.num_computed = num_computed
        request.num_slots = (num_shared + num_own) * self.block_size
        return ((parent.blocks[num_shared], own[0]),) if rest else ()

    # -- while it runs -----------------------------------------------------------------------------------------

    def grow(self, request: Request, num_tokens: int) -> bool:
        """Make room for the first `num_tokens` tokens. False, and nothing changed, if the pool has too few blocks."""
        if num_tokens <= request.num_slots:
            return True
        blocks = self._tables[request.request_id].blocks
        missing = blocks_needed(num_tokens, self.block_size) - len(blocks)
        if missing > self._pool.num_free:
            return False
        blocks.extend(self._pool.allocate(missing))
        request.num_slots = len(blocks) * self.block_size
        return True

    def commit(self, request: Request) -> None:
        """Take note of request.num_computed: offer full blocks to the cache, give back those behind the window."""
        table = self._tables[request.request_id]
        num_full = request.num_computed // self.block_size
        if self._is_caching and num_full > table.num_cached:
            extend_hashes(request, num_full, self.block_size)
            for index in range(table.num_cached, num_full):
                if table.blocks[index] != NULL_BLOCK:
                    self._cache.insert(request.block_hashes[index], table.blocks[index])
            table.num_cached = num_full
        self._pass_window(table, request.num_computed)

    def _num_out_of_sight(self, position: int) -> int:
        """Leading blocks that a query at `position` cannot see: it sees (position - window, position]."""
        return 0 if self._window is None else max(0, position - self._window + 1) // self.block_size

    def _pass_window(self, table: BlockTable, num_computed: int) -> None:
        num_passed = self._num_out_of_sight(num_computed)  # of the next query, and all after it
        if num_passed > table.num_passed:
            passed = table.blocks[table.num_passed : num_passed]
            table.blocks[table.num_passed : num_passed] = [NULL_BLOCK] * len(passed)
            table.num_passed = num_passed
            self._pool.release(reversed(passed), keep=self._cache.holds)

    # -- giving back -------------------------------------------------------------------------------------------

    def release(self, request_id: RequestId, *, after_step: int | None = None) -> None:
        """Give back all blocks of a request; if a step in flight may still write them, once that step has retired."""
        table = self._tables.pop(request_id, None)
        if table is None:
            return
        blocks = table.blocks[::-1]
        if after_step is None:
            self._pool.release(blocks, keep=self._cache.holds)
        else:
            self._deferred.append((after_step, blocks))

    def retire(self, step: int) -> None:
        """Step `step` and all before it are over: blocks that waited for them are free."""
        while self._deferred and self._deferred[0][0] <= step:
            self._pool.release(self._deferred.popleft()[1], keep=self._cache.holds)

    def reset_cache(self) -> None:
        """Forget all cached prefixes; blocks in use stay in use."""
        self._cache.clear()
        for table in self._tables.values():
            table.num_cached = 0

    # -- self-audit --------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Assert the invariants. O(blocks): run when idle, and after every rule of the stateful tests."""
        self._cache.check()
        owned = Counter(
            block for table in self._tables.values() for block in table.blocks if block != NULL_BLOCK
        ) + Counter(block for _, blocks in self._deferred for block in blocks if block != NULL_BLOCK)
        free = self._pool.free_blocks()
        assert len(free) == len(set(free)) == self._pool.num_free
        assert set(free).isdisjoint(owned)
        assert len(free) + len(owned) == self._pool.num_usable
        for block in range(1, self._pool.num_blocks):
            references = self._pool.references(BlockId(block))
            assert references == owned.get(BlockId(block), 0), (block, references)
