"""Blocks of engines with hashes of their own stand in the index under ours."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.cluster.kv_events import BlockStored
from shoal.cluster.routing.foreign_hashes import ForeignHashes
from shoal.engine.memory.prefix_cache import chain_hashes, root_hash

SIZE = 4
TOKENS = tuple(range(3 * SIZE))


def event(
    hashes: list[bytes | int],
    parent: bytes | int | None = None,
    *,
    first: int = 0,
    keys: list[list[Any] | None] | None = None,
    lora_name: str | None = None,
    block_size: int = SIZE,
) -> BlockStored:
    tokens = TOKENS[first * SIZE : (first + len(hashes)) * SIZE]
    return BlockStored(hashes, parent, tokens, block_size, None, "GPU", lora_name, keys)


@pytest.mark.parametrize("theirs", [[5, 6, 7], [b"a" * 32, b"b" * 32, b"c" * 32]])
def test_a_chain_in_pieces_has_the_hashes_of_the_whole_prompt(theirs: list[bytes | int]) -> None:
    foreign = ForeignHashes(SIZE)
    ours = foreign.store(event(theirs[:1])) + foreign.store(event(theirs[1:], theirs[0], first=1))
    assert ours == chain_hashes(TOKENS, root_hash(""), SIZE)
    assert foreign.remove([theirs[2], b"unknown"]) == ours[2:]
    assert foreign.remove([theirs[2]]) == []


def test_a_salt_or_an_adapter_is_the_salt_of_our_root() -> None:
    foreign = ForeignHashes(SIZE)
    salted = chain_hashes(TOKENS, root_hash("tenant"), SIZE)
    assert foreign.store(event([1, 2, 3], keys=[["tenant"], None, None])) == salted
    assert foreign.store(event([4, 5], keys=[["tenant"], ["tenant"]], lora_name="tenant")) == salted[:2]
    assert foreign.store(event([6], 5, first=2, keys=[["tenant"]], lora_name="tenant")) == salted[2:]


def test_an_image_in_a_prompt_makes_hashes_that_no_text_has() -> None:
    foreign = ForeignHashes(SIZE)
    plain = chain_hashes(TOKENS, root_hash(""), SIZE)
    stored = foreign.store(event([1, 2, 3], keys=[None, [["image", 0]], None]))
    assert stored[0] == plain[0]
    assert not set(stored[1:]) & set(plain)


def test_what_cannot_be_translated_is_left_out() -> None:
    foreign = ForeignHashes(SIZE)
    assert foreign.store(event([1], 99)) == [], "an unknown parent"
    assert foreign.store(event([1, 2], block_size=2 * SIZE)) == [], "blocks of another size"
    assert foreign.store(BlockStored([1], None, [], SIZE, None, "GPU", None)) == [], "no tokens"
