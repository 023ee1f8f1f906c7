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


def extend_hashes(request: Request, num_blocks: int, block_size: int) -> None:
    """Bring request.block_hashes up to the first `num_blocks` blocks, all of them full of known tokens."""
    hashes = request.block_hashes
    if num_blocks <= len(hashes):
        return
    data = array("I", request.known_ids(len(hashes) * block_size, num_blocks * block_size)).tobytes()
    parent = hashes[-1] if hashes else root_hash(request.cache_salt)
    width = 4 * block_size
    for start in range(0, len(data), width):
        parent = BlockHash(blake2b(parent + data[start : start + width], digest_size=16).digest())
        hashes.append(parent)


class PrefixCache:
    """Cached blocks by hash. Knows nothing of references: a cached block may be in use or waiting in the free list."""

    def __init__(self) -> None:
        self._block_of: dict[BlockHash, BlockId] = {}
        self._hash_of: dict[BlockId, BlockHash] = {}

    def __len__(self) -> int:
        return len(self._block_of)

    def holds(self, block: BlockId) -> bool:
        return block in self._hash_of

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
        """Offer a full, computed block. The first block with a hash stays the cached one."""
        if block_hash not in self._block_of and block not in self._hash_of:
            self._block_of[block_hash] = block
            self._hash_of[block] = block_hash

    def evict(self, block: BlockId) -> None:
        """Forget what a block held, if anything."""
        block_hash = self._hash_of.pop(block, None)
        if block_hash is not None:
            del self._block_of[block_hash]

    def clear(self) -> None:
        self._block_of.clear()
        self._hash_of.clear()

    def check(self) -> None:
        assert len(self._block_of) == len(self._hash_of)
        assert all(self._hash_of[block] == key for key, block in self._block_of.items())
