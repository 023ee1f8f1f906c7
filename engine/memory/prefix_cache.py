"""Which block holds which prefix: an index from chained block hashes to blocks.

The hash of a full block covers its tokens, every token before it, and the salt (tenant or adapter), so equal hashes
mean equal KV. 128 bits of BLAKE2b (RFC 7693): nothing can be guessed or made to collide, and no two processes disagree.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

from shoal.engine.request import BlockHash, BlockId, Request


def root_hash(salt: str) -> BlockHash:
    """The parent of a first block. Prompts with different salts never share blocks."""
    return BlockHash(blake2b(salt.encode(), digest_size=16, person=b"shoal-prefix").digest())


def chain_hashes(token_ids: Sequence[int], parent: BlockHash, block_size: int) -> list[BlockHash]:
    """Hashes of the consecutive full blocks that `token_ids` fill, the first one built on `parent`."""
    data = array("I", token_ids).tobytes()
    width = 4 * block_size
    hashes = []
    for start in range(0, len(data) - width + 1, width):
        parent = BlockHash(blake2b(parent + data[start : start + width], digest_size=16).digest())
        hashes.append(parent)
    return hashes


def extend_hashes(request: Request, num_blocks: int, block_size: int) -> None:
    """Bring request.block_hashes up to the first `num_blocks` blocks, all of them full of known tokens."""
    hashes = request.block_hashes
    if num_blocks > len(hashes):
        tokens = request.known_ids(len(hashes) * block_size, num_blocks * block_size)
        hashes += chain_hashes(tokens, hashes[-1] if hashes else root_hash(request.cache_salt), block_size)


class PrefixCache:
    """Cached blocks by hash. Knows nothing of references: a cached block may be in use or wait to be evicted.

    Requests that compute the same tokens at the same time fill twins: blocks with equal hashes, of which one is the
    cached one. The others stand by, and one of them takes over when it goes, so that a prefix is cached for as long as
    somebody holds what is built on it.
    """

    def __init__(self) -> None:
        self._block_of: dict[BlockHash, BlockId] = {}
        self._hash_of: dict[BlockId, BlockHash] = {}  # of cached blocks and of twins
        self._twins: dict[BlockHash, list[BlockId]] = {}

    def __len__(self) -> int:
        return len(self._block_of)

    def knows(self, block: BlockId) -> bool:
        """Whether this block is cached, or a twin."""
        return block in self._hash_of

    def block_of(self, block_hash: BlockHash) -> BlockId | None:
        return self._block_of.get(block_hash)

    def longest_match(self, hashes: Sequence[BlockHash]) -> list[BlockId]:
        """Blocks of the longest cached prefix of `hashes`."""
        blocks = []
        for block_hash in hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def insert(self, block_hash: BlockHash, block: BlockId) -> None:
        """From now on `block`, which is full and computed, is the cached one. What was before it is forgotten."""
        assert block not in self._hash_of, block
        previous = self._block_of.get(block_hash)
        if previous is not None:
            del self._hash_of[previous]
        self._block_of[block_hash] = block
        self._hash_of[block] = block_hash

    def add_twin(self, block_hash: BlockHash, block: BlockId) -> None:
        """`block` is in use and holds what another one is cached for."""
        assert block_hash in self._block_of, block_hash
        self._hash_of[block] = block_hash
        self._twins.setdefault(block_hash, []).append(block)

    def withdraw(self, block: BlockId) -> BlockId | None:
        """Forget a block that has twins, or is one: the answer is the one that is cached now. None, and nothing
        changed, for any other block.
        """
        block_hash = self._hash_of.get(block)
        twins = self._twins.get(block_hash) if block_hash is not None else None
        if block_hash is None or twins is None:
            return None
        if self._block_of[block_hash] == block:
            self._block_of[block_hash] = twins.pop()
        else:
            twins.remove(block)
        if not twins:
            del self._twins[block_hash]
        del self._hash_of[block]
        return self._block_of[block_hash]

    def evict(self, block: BlockId) -> BlockHash:
        """Forget a cached block that has no twins."""
        block_hash = self._hash_of.pop(block)
        assert block_hash not in self._twins, block
        del self._block_of[block_hash]
        return block_hash

    def clear(self) -> None:
        self._block_of.clear()
        self._hash_of.clear()
        self._twins.clear()

    def check(self) -> None:
        assert len(self._hash_of) == len(self._block_of) + sum(map(len, self._twins.values()))
        assert all(self._hash_of[block] == key for key, block in self._block_of.items())
        assert all(self._hash_of[block] == key for key, twins in self._twins.items() for block in twins)
