"""Our own hashes for the blocks of other engines, whose hash functions we do not know: made anew from the tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from shoal.cluster.kv_events import BlockStored, WireHash
from shoal.engine.memory.prefix_cache import chain_hashes, root_hash
from shoal.engine.request import BlockHash

_MAX_BLOCKS: Final = 1_000_000  # of one engine; 200 MB


class ForeignHashes:
    """Translates the block hashes of one engine. Blocks whose parent is unknown cannot be translated and are left out.

    block_size: tokens per block of ours. An engine with another one cannot be matched, and all its blocks are left out.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._ours: dict[WireHash, BlockHash] = {}

    def store(self, event: BlockStored) -> list[BlockHash]:
        """Our hashes of the stored blocks."""
        if event.block_size != self._block_size or len(event.token_ids) != self._block_size * len(event.block_hashes):
            return []
        extra_keys = event.extra_keys or [None] * len(event.block_hashes)
        is_first = event.parent_block_hash is None
        parent = root_hash("") if event.parent_block_hash is None else self._ours.get(event.parent_block_hash)
        if parent is None or len(self._ours) + len(event.block_hashes) > _MAX_BLOCKS:
            return []
        ours = []
        for index, (block_hash, keys) in enumerate(zip(event.block_hashes, extra_keys, strict=False)):
            tokens = event.token_ids[index * self._block_size : (index + 1) * self._block_size]
            parent = chain_hashes(tokens, _salted(parent, keys, event.lora_name, is_first), self._block_size)[0]
            self._ours[block_hash] = parent
            ours.append(parent)
            is_first = False
        return ours

    def remove(self, block_hashes: Iterable[WireHash]) -> list[BlockHash]:
        """Our hashes of the removed blocks that are known, which are forgotten."""
        return [ours for block_hash in block_hashes if (ours := self._ours.pop(block_hash, None)) is not None]

    def clear(self) -> None:
        self._ours.clear()


def _salted(parent: BlockHash, keys: list[Any] | None, lora_name: str | None, is_first: bool) -> BlockHash:
    """The parent with what else the block's hash covers.

    Of a first block, the salt of the request or the adapter's name, whichever it has, is our salt. An adapter's name
    stands with every block and counts once. Anything more (images) makes a hash that no prompt of ours has.
    """
    rest = [key for key in keys or () if is_first or key != lora_name]
    if not rest:
        return parent
    if is_first and len(rest) == 1 and isinstance(rest[0], str):
        return root_hash(rest[0])
    return root_hash(f"{parent.hex()} {rest!r}")
