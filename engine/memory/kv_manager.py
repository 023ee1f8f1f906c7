"""Block tables of live requests: admission, growth, sharing, and giving back. Composes the pool and the prefix
cache.
"""

from __future__ import annotations

import bisect
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from shoal.engine.memory.block_pool import NULL_BLOCK, BlockPool
from shoal.engine.memory.kv_events import BlocksStored, KVEvent, KVEventRecorder
from shoal.engine.memory.kv_layout import blocks_needed
from shoal.engine.memory.prefix_cache import PrefixCache, extend_hashes
from shoal.engine.request import BlockHash, BlockId, Request, RequestId


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
    record_events: note what becomes cached and what is evicted; somebody has to `take_events`.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        enable_prefix_caching: bool = True,
        watermark: float = 0.0,
        window: int | None = None,
        record_events: bool = False,
    ) -> None:
        self.block_size = block_size
        self._cache = PrefixCache()
        self._pool = BlockPool(num_blocks, on_evict=self._evict)
        self._events = KVEventRecorder() if record_events else None
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
    def num_empty_blocks(self) -> int:
        """Free blocks that hold nothing cached: they are handed out first, and nothing is lost with them."""
        return self._pool.num_empty

    @property
    def num_deferred_blocks(self) -> int:
        """Blocks that are given back once a step in flight is over; some may stay with others who share them."""
        return sum(len(blocks) for _, blocks in self._deferred)

    @property
    def num_cached_blocks(self) -> int:
        return len(self._cache)

    def take_events(self) -> list[KVEvent]:
        """What happened to the cache since the last call, in order; nothing unless `record_events`."""
        return self._events.take() if self._events is not None else []

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

    def refresh_cached(self, request: Request) -> int:
        """Known tokens that would be found in the cache if the request were admitted now. They are as young as if it
        had been, so that those who are admitted before it evict others first.
        """
        hits = self._find_hits(request)
        self._pool.refresh(hits)
        return len(hits) * self.block_size

    def _find_hits(self, request: Request) -> list[BlockId]:
        if not self._is_caching:
            return []
        # The last known token is always computed: its logits are wanted.
        limit = (request.num_known - 1) // self.block_size
        extend_hashes(request, limit, self.block_size)
        return self._cache.longest_match(request.block_hashes[:limit])

    def _has_room(self, request: Request, hits: list[BlockId], *, is_alone: bool) -> bool:
        """Whether there are blocks for all known tokens. Hits in the free blocks are taken out of them too."""
        num_in_use = sum(self._pool.references(block) > 0 for block in hits)
        reserve = 0 if is_alone else self._watermark_blocks
        return blocks_needed(request.num_known, self.block_size) - num_in_use + reserve <= self._pool.num_free

    def admit(self, request: Request, *, is_alone: bool) -> bool:
        """Give blocks for all known tokens, those with a cached prefix first. Sets request.num_computed.

        All or nothing, and never into the watermark unless the request `is_alone`: admitting a prompt that can only be
        computed by preempting others makes everybody slower.
        """
        assert request.request_id not in self._tables, request.request_id
        hits = self._find_hits(request)
        if not self._has_room(request, hits, is_alone=is_alone):
            return False
        total = blocks_needed(request.num_known, self.block_size)
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

    def fork(
        self, request: Request, source: RequestId, *, is_growth: bool = False
    ) -> tuple[tuple[BlockId, BlockId], ...] | None:
        """Admit `request` on the blocks of `source`, which has computed all its known tokens but the last: the same
        prompt (`can_fork`), or what two beams have in common.

        Whole blocks are shared. The one that both will write is copied: the answer holds (source, target) for the
        ranks, before anything is computed; None if there are no blocks, for what `is_growth` those of the watermark
        included. All known tokens but the last count as computed, and that one gives the fork its own logits.
        """
        assert request.request_id not in self._tables, request.request_id
        parent = self._tables[source]
        num_computed = request.num_known - 1
        num_shared, rest = divmod(num_computed, self.block_size)
        num_own = blocks_needed(request.num_known, self.block_size) - num_shared
        if num_own + (0 if is_growth else self._watermark_blocks) > self._pool.num_free:
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

    def grow_to_spare(self, request: Request, num_tokens: int) -> None:
        """Make room for up to `num_tokens` tokens, as far as there are blocks beyond the watermark and one for each
        running request.
        """
        table = self._tables[request.request_id]
        wanted = blocks_needed(num_tokens, self.block_size) - len(table.blocks)
        num_spare = self._pool.num_free - self._watermark_blocks - len(self._tables)
        if (num_new := min(wanted, num_spare)) > 0:
            table.blocks.extend(self._pool.allocate(num_new))
            request.num_slots = len(table.blocks) * self.block_size

    def commit(self, request: Request) -> None:
        """Take note of request.num_computed: offer full blocks to the cache, give back those behind the window."""
        table = self._tables[request.request_id]
        num_full = request.num_computed // self.block_size
        if self._is_caching and num_full > table.num_cached:
            extend_hashes(request, num_full, self.block_size)
            self._offer(request, table, range(table.num_cached, num_full))
            table.num_cached = num_full
        self._pass_window(table, request.num_computed)

    def _offer(self, request: Request, table: BlockTable, indices: range) -> None:
        """Let full blocks be found from now on, unless another one is."""
        new = [
            index
            for index in indices
            if table.blocks[index] != NULL_BLOCK and self._cache_block(request.block_hashes[index], table.blocks[index])
        ]
        if self._events is not None:
            for run in _runs(new):
                self._events.stored(self._stored(request, run))

    def _cache_block(self, block_hash: BlockHash, block: BlockId) -> bool:
        """Whether that hash was not cached before. Of blocks with equal hashes one in use is the cached one."""
        if self._cache.knows(block):
            return False
        cached = self._cache.block_of(block_hash)
        if cached is not None and self._pool.references(cached) > 0:
            self._cache.add_twin(block_hash, block)
            return False
        self._cache.insert(block_hash, block)
        if cached is not None:
            self._pool.inherit(block, cached)
            self._pool.discard(cached)
        return cached is None

    def _stored(self, request: Request, run: range) -> BlocksStored:
        hashes = request.block_hashes
        return BlocksStored(
            block_hashes=tuple(hashes[run.start : run.stop]),
            parent=hashes[run.start - 1] if run.start else None,
            token_ids=request.known_ids(run.start * self.block_size, run.stop * self.block_size),
            salt=request.cache_salt,
        )

    def _evict(self, block: BlockId) -> None:
        block_hash = self._cache.evict(block)
        if self._events is not None:
            self._events.removed(block_hash)

    def _keeps(self, block: BlockId) -> bool:
        """Whether a block that nobody references any more is a cached one. If it has twins, one of those is it."""
        heir = self._cache.withdraw(block)
        if heir is None:
            return self._cache.knows(block)
        self._pool.inherit(heir, block)
        return False

    def _num_out_of_sight(self, position: int) -> int:
        """Leading blocks that a query at `position` cannot see: it sees (position - window, position]."""
        return 0 if self._window is None else max(0, position - self._window + 1) // self.block_size

    def _pass_window(self, table: BlockTable, num_computed: int) -> None:
        num_passed = self._num_out_of_sight(num_computed)  # of the next query, and all after it
        if num_passed > table.num_passed:
            passed = table.blocks[table.num_passed : num_passed]
            table.blocks[table.num_passed : num_passed] = [NULL_BLOCK] * len(passed)
            table.num_passed = num_passed
            self._pool.release(reversed(passed), keep=self._keeps)

    # -- many steps at once ------------------------------------------------------------------------------------

    @property
    def can_leap(self) -> bool:
        """Whether blocks come back only when requests end."""
        return self._window is None and not self._deferred

    def stays_out(self, request: Request, running: Iterable[Request]) -> bool:
        """Whether a request that waits finds no room, and will find none however far the running ones get: they only
        take blocks, unless one of them is about to cache a block that this one could share.
        """
        hits = self._find_hits(request)
        if self._has_room(request, hits, is_alone=False):
            return False
        limit = min(len(hits) + 1, (request.num_known - 1) // self.block_size)
        return not any(self._caches_next(other, request.block_hashes[:limit]) for other in running)

    def _caches_next(self, request: Request, hashes: list[BlockHash]) -> bool:
        """Whether the next block that a running request fills may be one of these."""
        index = self._tables[request.request_id].num_cached
        if index >= len(hashes):
            return False
        own = request.block_hashes[: index + 1]
        return own == hashes[: len(own)]

    def most_growth(self, requests: Sequence[Request], num_tokens: int) -> int:
        """The most tokens, up to `num_tokens`, that there are blocks for if each request computes as many."""

        def is_enough(count: int) -> bool:
            missing = [
                blocks_needed(each.num_known + count - 1 - each.num_slots, self.block_size)
                for each in requests
                if each.num_known + count - 1 > each.num_slots
            ]
            return sum(missing) <= self._pool.num_free

        if is_enough(num_tokens):
            return num_tokens
        return bisect.bisect_left(range(num_tokens), True, key=lambda count: not is_enough(count)) - 1

    def advance(self, decoding: Sequence[Request], prompt: Request | None, chunk: int, num_steps: int) -> None:
        """Grow and commit as `num_steps` steps would, in their order, where each lets every one of `decoding` compute
        one token, and `prompt` a chunk. The tokens are known already, the blocks are there.
        """
        size = self.block_size
        moments: list[tuple[int, int, int]] = []  # (step, 0 to grow or 1 to commit, index of the request)
        starts = [request.num_computed for request in decoding]
        for index, (request, start) in enumerate(zip(decoding, starts, strict=True)):
            moments += [(step, 0, index) for step in range(request.num_slots - start + 1, num_steps + 1, size)]
            moments += [(step, 1, index) for step in range(size - start % size, num_steps + 1, size)]
        if prompt is not None:
            moments += [(step, 1, len(decoding)) for step in range(1, num_steps + 1)]
        for step, is_commit, index in sorted(moments):
            if index == len(decoding):
                assert prompt is not None
                prompt.num_computed += chunk
                self.commit(prompt)
                continue
            request = decoding[index]
            if is_commit:
                request.num_computed = starts[index] + step
                self.commit(request)
            else:
                has_grown = self.grow(request, starts[index] + step)
                assert has_grown, request
                self.take_unsent(request.request_id)
        for request, start in zip(decoding, starts, strict=True):
            request.num_computed = start + num_steps

    # -- giving back -------------------------------------------------------------------------------------------

    def release(self, request_id: RequestId, *, after_step: int | None = None) -> None:
        """Give back all blocks of a request; if a step in flight may still write them, once that step has retired."""
        table = self._tables.pop(request_id, None)
        if table is None:
            return
        blocks = table.blocks[::-1]
        if after_step is None:
            self._pool.release(blocks, keep=self._keeps)
        else:
            self._deferred.append((after_step, blocks))

    def retire(self, step: int) -> None:
        """Step `step` and all before it are over: blocks that waited for them are free."""
        while self._deferred and self._deferred[0][0] <= step:
            self._pool.release(self._deferred.popleft()[1], keep=self._keeps)

    def reset_cache(self) -> None:
        """Forget all cached prefixes; blocks in use stay in use."""
        self._cache.clear()
        self._pool.discard_all()
        if self._events is not None:
            self._events.cleared()
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


def _runs(indices: Iterable[int]) -> list[range]:
    """Ascending numbers as ranges of consecutive ones."""
    runs: list[range] = []
    for index in indices:
        if runs and runs[-1].stop == index:
            runs[-1] = range(runs[-1].start, index + 1)
        else:
            runs.append(range(index, index + 1))
    return runs
