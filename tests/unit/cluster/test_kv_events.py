"""The wire format of KV events, byte for byte, and what is read of other versions."""

from __future__ import annotations

import msgspec
import pytest

from shoal.cluster.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVEventBatch,
    decode_batch,
    encode_batch,
    epoch_of,
    first_sequence,
)

STORED = BlockStored([b"\x0a\x0b"], None, [7, 300], 2, None, "GPU", None, extra_keys=[["salt"]])


def text(value: str) -> bytes:
    assert len(value) < 32
    return bytes([0xA0 | len(value)]) + value.encode()


def test_a_batch_has_the_bytes_that_vllm_writes() -> None:
    """Put together by hand from the format's description: an array of three, events as maps named by "type"."""
    stored = (
        b"\x89"  # a map of nine
        + text("type") + text("BlockStored")
        + text("block_hashes") + b"\x91\xc4\x02\x0a\x0b"
        + text("parent_block_hash") + b"\xc0"
        + text("token_ids") + b"\x92\x07\xcd\x01\x2c"
        + text("block_size") + b"\x02"
        + text("lora_id") + b"\xc0"
        + text("medium") + text("GPU")
        + text("lora_name") + b"\xc0"
        + text("extra_keys") + b"\x91\x91" + text("salt")
    )  # fmt: skip
    removed = (
        b"\x83" + text("type") + text("BlockRemoved") + text("block_hashes") + b"\x91\x05" + text("medium") + b"\xc0"
    )
    cleared = b"\x81" + text("type") + text("AllBlocksCleared")
    expected = b"\x93\xcb\x3f\xf8" + bytes(6) + b"\x93" + cleared + stored + removed + b"\x00"
    batch = KVEventBatch(1.5, [AllBlocksCleared(), STORED, BlockRemoved([5], None)], 0)
    assert encode_batch(batch) == expected
    assert decode_batch(expected) == batch


@pytest.mark.parametrize(
    "events",
    [
        pytest.param([["BlockStored", [b"\x0a\x0b"], None, [7, 300], 2, None, "GPU", None, [["salt"]]]], id="arrays"),
        pytest.param([{"type": "BlockStored", "block_hashes": [b"\x0a\x0b"], "parent_block_hash": None,
                       "token_ids": [7, 300], "block_size": 2, "medium": "GPU", "extra_keys": [["salt"]]}],
                     id="older maps, without lora fields"),
        pytest.param([{**msgspec.to_builtins(STORED, builtin_types=(bytes,)), "locality": "LOCAL", "session_id": "s"}],
                     id="newer maps"),
        pytest.param([["BlockStored", [b"\x0a\x0b"], None, [7, 300], 2, None, "GPU", None, [["salt"]], None, "full", 0],
                      ["BlockMigrated", 5]], id="unknown fields and events"),
    ],
)  # fmt: skip
def test_other_versions_are_read(events: list[object]) -> None:
    for batch in ([1.5, events], [1.5, events, 3], [1.5, events, 3, "new"], {"ts": 1.5, "events": events}):
        decoded = decode_batch(msgspec.msgpack.encode(batch))
        assert decoded.ts == 1.5
        assert decoded.events == [STORED]


@pytest.mark.parametrize(
    "foul",
    [None, 7, [], [1.5], ["now", []], {"ts": 1.5}, [1.5, [["BlockStored", 7]]], [1.5, [[["BlockStored"], 7]], "x"]],
)
def test_anything_else_is_refused_by_one_error(foul: object) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode_batch(msgspec.msgpack.encode(foul))
    with pytest.raises(msgspec.DecodeError):
        decode_batch(b"\xc1")


def test_the_number_before_the_first_is_of_the_same_epoch() -> None:
    assert epoch_of(first_sequence(9)) == epoch_of(first_sequence(9) - 1) == 9
