"""KV events on the wire: what vLLM publishes, so that routers made for vLLM can stand before our engine, and ours
before vLLM.

Format of vLLM 0.33 (`vllm/distributed/kv_events.py`): a ZeroMQ message of three frames, topic, 8-byte big-endian
sequence number and a msgpack batch `[ts, events, data_parallel_rank]`, each event a map with its class name under
"type". Missed batches are asked for on a second socket, from a DEALER to a ROUTER: `["", start]`. The answers are
`["", topic, sequence, batch]`, and `["", "", END_OF_REPLAY, ...]` after the last.

Two things are ours and mean nothing wrong to others. The upper half of a sequence number is the publisher's epoch, so a
publisher that has started anew is told from one that repeats itself. And a replay that is no longer at hand is answered
with a snapshot: batches with one common sequence number, as of which they hold, the first of them beginning with
AllBlocksCleared, and hashes without tokens. A DEALER that asks from SNAPSHOT wants no history, only that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, TypeAlias

import msgspec

# Of our publishers, a hash is the engine's own; any other engine's have to be made anew from the tokens.
SHOAL_HASHES: Final = "shoal"
# vLLM's name for the tier that attention reads, whatever the device is; other tiers are not indexed.
DEVICE_MEDIUM: Final = "GPU"
END_OF_REPLAY: Final = 2**64 - 1  # -1 in eight bytes
SNAPSHOT: Final = 2**64 - 2  # vLLM's publishers have nothing from here on, and say so
LOAD_TOPIC_PREFIX: Final = "load"

WireHash: TypeAlias = bytes | int


class BlockStored(msgspec.Struct, frozen=True, tag=True, omit_defaults=True, gc=False):
    """Consecutive blocks of one prompt can be found from now on. `extra_keys`: for each block what its hash covers
    besides tokens, such as [cache_salt] for a first block.
    """

    block_hashes: Sequence[WireHash]
    parent_block_hash: WireHash | None
    token_ids: Sequence[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: Sequence[list[Any] | None] | None = None
    group_idx: int | None = None


class BlockRemoved(msgspec.Struct, frozen=True, tag=True, omit_defaults=True, gc=False):
    block_hashes: Sequence[WireHash]
    medium: str | None
    group_idx: int | None = None


class AllBlocksCleared(msgspec.Struct, frozen=True, tag=True, gc=False):
    pass


WireEvent: TypeAlias = BlockStored | BlockRemoved | AllBlocksCleared


class KVEventBatch(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """`ts`: seconds since 1970."""

    ts: float
    events: Sequence[WireEvent]
    data_parallel_rank: int | None = None

    @property
    def needs_nothing_before(self) -> bool:
        return bool(self.events) and isinstance(self.events[0], AllBlocksCleared)


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(KVEventBatch)
_FIELDS: Final = {event.__name__: event.__struct_fields__ for event in (BlockStored, BlockRemoved, AllBlocksCleared)}


def encode_batch(batch: KVEventBatch) -> bytes:
    return _encoder.encode(batch)


def decode_batch(payload: bytes) -> KVEventBatch:
    """A batch of any vLLM so far: also with events as arrays (before 0.26), with fewer fields, or with more. Kinds of
    events that are not known here are left out.

    Raises msgspec.DecodeError for anything else.
    """
    try:
        return _decoder.decode(payload)
    except msgspec.ValidationError:
        return msgspec.convert(_as_written_today(msgspec.msgpack.decode(payload)), KVEventBatch)


def _as_written_today(batch: Any) -> Any:
    """A decoded batch in today's form, as far as it can be told; the check of types sees the rest."""
    if isinstance(batch, dict):
        batch = [batch.get(name) for name in KVEventBatch.__struct_fields__]
    if not isinstance(batch, list) or len(batch) < 2 or not isinstance(batch[1], list):
        return batch
    events = []
    for event in batch[1]:
        if isinstance(event, list) and event:
            event = {"type": event[0], **dict(zip(_FIELDS.get(str(event[0]), ()), event[1:], strict=False))}
        kind = event.get("type") if isinstance(event, dict) else None
        if str(kind) in _FIELDS:
            events.append({**dict.fromkeys(("lora_id", "medium", "lora_name")), **event})
    return [batch[0], events, *batch[2:]]


def first_sequence(epoch: int) -> int:
    """The number of an epoch's first batch. The one before it stands for the empty cache and is of the epoch too."""
    return (epoch << 32) + 1


def epoch_of(sequence: int) -> int:
    return sequence >> 32


def kv_topic(replica: str, model: str) -> str:
    """As llm-d wants it."""
    return f"kv@{replica}@{model}"


def load_topic(replica: str, model: str) -> str:
    return f"{LOAD_TOPIC_PREFIX}@{replica}@{model}"
