"""Listens to all replicas of a model: one thread that feeds their followers, and the loads that they report."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Final, TypeAlias

import msgspec
import zmq

from shoal.cluster.channel import MAX_QUEUED_MESSAGES
from shoal.cluster.kv_events import END_OF_REPLAY, SHOAL_HASHES, KVEventBatch, decode_batch
from shoal.cluster.routing.follower import EventFollower
from shoal.cluster.routing.foreign_hashes import ForeignHashes
from shoal.cluster.routing.prefix_index import PrefixIndex

Context: TypeAlias = "zmq.Context[zmq.Socket[bytes]]"
Socket: TypeAlias = "zmq.Socket[bytes]"

log = logging.getLogger(__name__)

# Longest wait for messages: so late a replica is joined or asked for a replay.
_TICK_MS: Final = 50
# Messages of one socket that are handled before the others get their turn.
_MAX_BURST: Final = 256
_STOP_TIMEOUT_S: Final = 5.0


class EndpointsError(ValueError):
    """What a replica says of its KV events cannot be used."""


class Endpoints(msgspec.Struct, frozen=True, kw_only=True):
    """Where and how an engine publishes its KV events. `KVPublisher.endpoints` of ours, settings for another engine.

    topic: of the events, which no two engines share. load_topic: of load reports, "" for none. replay: "" for none.
    hashes: whose block hashes they are. num_blocks: most blocks that the engine can hold, 0 for unknown.
    """

    events: str
    topic: str
    block_size: int
    replay: str = ""
    load_topic: str = ""
    epoch: int | None = None
    num_blocks: int = 0
    hashes: str = "foreign"

    @property
    def topics(self) -> list[bytes]:
        return [topic.encode() for topic in (self.topic, self.load_topic) if topic]

    @classmethod
    def of(cls, fields: Mapping[str, object]) -> Endpoints:
        """Raises EndpointsError, which names the field."""
        try:
            endpoints = msgspec.convert(dict(fields), cls)
        except msgspec.ValidationError as error:
            raise EndpointsError(f"KV event endpoints {dict(fields)}: {error}") from error
        for name in ("events", "replay"):
            address = getattr(endpoints, name)
            if not address.startswith("tcp://") and (address or name == "events"):
                raise EndpointsError(f"KV event endpoints: {name} is {address!r}, must be tcp://HOST:PORT")
        if endpoints.hashes == SHOAL_HASHES and endpoints.epoch is None:
            raise EndpointsError(f"KV event endpoints: epoch is missing, which {SHOAL_HASHES!r} hashes come with")
        if not endpoints.topic:
            raise EndpointsError("KV event endpoints: topic is empty, so engines could not be told apart; set the "
                                 "engine's topic, for vLLM in kv_events_config, to kv@NAME@MODEL")  # fmt: skip
        return endpoints


@dataclass(slots=True, eq=False)
class _Source:
    key: str
    endpoints: Endpoints
    follower: EventFollower
    is_gone: bool = False  # changed under the lock
    is_connected: bool = False  # of the subscriber's thread, and so is the rest
    dealer: Socket | None = None  # while a replay is under way


class EventSubscriber:
    """Follows replicas from `start` to `close`; `follow` and `unfollow` may be called from any thread, at any time.

    on_load(key, payload): a replica's load report. on_slot(key, slot): a replica's blocks stand in another slot from
    now on; called under the lock. Both are called in the subscriber's thread.
    lock: taken for every change of the index; must be re-entrant.
    """

    def __init__(
        self,
        on_load: Callable[[str, bytes], None],
        lock: AbstractContextManager[object],
        index: PrefixIndex,
        *,
        on_slot: Callable[[str, int], None] = lambda key, slot: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._on_load = on_load
        self._on_slot = on_slot
        self._lock = lock
        self._index = index
        self._clock = clock
        self._sources: dict[str, _Source] = {}  # by key; changed under the lock
        self._by_topic: dict[bytes, _Source] = {}  # events and load topics; changed under the lock
        self._changes: SimpleQueue[_Source] = SimpleQueue()  # to be connected, or disconnected if gone
        self._context: Context = zmq.Context()
        self._live = self._socket(zmq.SUB)
        self._by_dealer: dict[Socket, _Source] = {}
        self._poller = zmq.Poller()
        self._poller.register(self._live, zmq.POLLIN)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kv-subscriber", daemon=True)

    def __enter__(self) -> EventSubscriber:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(_STOP_TIMEOUT_S)
        for key, source in list(self._sources.items()):
            self._hang_up(source)
            self.unfollow(key)
        self._live.close()
        self._context.destroy(linger=0)

    def follow(self, key: str, endpoints: Mapping[str, object]) -> int:
        """Begin to follow a replica, or another start of it; the answer is its slot in the index for now.

        Raises EndpointsError.
        """
        checked = Endpoints.of(endpoints)
        with self._lock:
            known = self._sources.get(key)
            if known is not None and known.endpoints == checked:
                return known.follower.slot
            self.unfollow(key)
            if not self._by_topic.keys().isdisjoint(checked.topics):
                raise EndpointsError(f"KV event endpoints of {key}: topic {checked.topic!r} is another engine's too")
            is_ours = checked.hashes == SHOAL_HASHES
            follower = EventFollower(
                self._index,
                self._clock(),
                epoch=checked.epoch if is_ours else None,
                capacity=checked.num_blocks or None,
                foreign=None if is_ours else ForeignHashes(checked.block_size),
                can_replay=bool(checked.replay),
                on_slot=lambda slot: self._on_slot(key, slot),
            )
            source = self._sources[key] = _Source(key, checked, follower)
            self._by_topic.update(dict.fromkeys(checked.topics, source))
            self._changes.put(source)
            return follower.slot

    def unfollow(self, key: str) -> None:
        """Forget a replica and what it holds. An unknown one is no error."""
        with self._lock:
            source = self._sources.pop(key, None)
            if source is None:
                return
            for topic in source.endpoints.topics:
                del self._by_topic[topic]
            source.is_gone = True
            source.follower.close()
            self._changes.put(source)

    def slot(self, key: str) -> int:
        """Raises KeyError for a replica that is not followed."""
        return self._sources[key].follower.slot

    def staleness_s(self, key: str) -> float:
        """Time since the index was known to hold all that the replica had published."""
        return self._sources[key].follower.staleness_s(self._clock())

    # -- the subscriber's thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        next_tick_s = 0.0
        while not self._closing.is_set():
            for socket, _ in self._poller.poll(_TICK_MS):
                if socket is self._live:
                    self._take_live()
                else:
                    self._take_replay(socket)
            now = self._clock()
            if now >= next_tick_s:
                next_tick_s = now + _TICK_MS / 1e3
                self._connect_and_disconnect()
                self._ask(now)

    def _connect_and_disconnect(self) -> None:
        """Connect what is followed since the last time, and disconnect what is not any more."""
        while True:
            try:
                source = self._changes.get_nowait()
            except Empty:
                return
            if source.is_connected != source.is_gone:
                continue
            address = source.endpoints.events
            try:
                if source.is_connected:
                    self._live.disconnect(address)
                else:
                    self._live.connect(address)
            except zmq.ZMQError as error:
                log.error("cannot follow the KV events of %s at %s: %s", source.key, address, error)
                continue
            source.is_connected = not source.is_connected
            for topic in source.endpoints.topics:
                self._live.setsockopt(zmq.SUBSCRIBE if source.is_connected else zmq.UNSUBSCRIBE, topic)
            if source.is_gone:
                self._hang_up(source)

    def _take_live(self) -> None:
        for frames in _waiting(self._live):
            source = self._by_topic.get(frames[0])
            if source is None or len(frames) != 3:
                continue  # of a replica that is gone
            number = int.from_bytes(frames[1], "big")
            is_load = frames[0] == source.endpoints.load_topic.encode()
            batch = None if is_load else _decoded(source, frames[2])
            with self._lock:
                if source.is_gone:
                    continue
                if batch is None:
                    source.follower.hear(number, self._clock())
                else:
                    source.follower.receive(number, batch, self._clock())
            if is_load and frames[2]:
                self._report(source.key, frames[2])

    def _report(self, key: str, load: bytes) -> None:
        try:
            self._on_load(key, load)
        except Exception:
            log.exception("cannot use the load that %s reports", key)  # the other replicas are still to be heard

    def _take_replay(self, dealer: Socket) -> None:
        source = self._by_dealer.get(dealer)
        if source is None:
            return  # hung up since it was polled
        for frames in _waiting(dealer):
            if len(frames) < 2:
                continue
            number = int.from_bytes(frames[-2], "big")  # before it stands the topic, but not with older engines
            if number != END_OF_REPLAY:
                source.follower.replay(number, _decoded(source, frames[-1]))
                continue
            num_batches = int.from_bytes(frames[-1], "big") if frames[-1] else None
            self._hang_up(source)
            with self._lock:
                if not source.is_gone:
                    source.follower.end_replay(num_batches, self._clock())
            return

    def _ask(self, now: float) -> None:
        """Ask for the replays that followers want. The answer to an earlier question is not listened to any more."""
        for source in list(self._sources.values()):
            with self._lock:
                start = None if source.is_gone else source.follower.wanted(now)
            if start is None:
                continue
            self._hang_up(source)
            source.dealer = dealer = self._socket(zmq.DEALER)
            self._by_dealer[dealer] = source
            self._poller.register(dealer, zmq.POLLIN)
            dealer.connect(source.endpoints.replay)
            dealer.send_multipart((b"", start.to_bytes(8, "big")), zmq.NOBLOCK)

    def _hang_up(self, source: _Source) -> None:
        dealer, source.dealer = source.dealer, None
        if dealer is not None:
            self._poller.unregister(dealer)
            del self._by_dealer[dealer]
            dealer.close()

    def _socket(self, kind: int) -> Socket:
        socket = self._context.socket(kind)
        socket.set_hwm(MAX_QUEUED_MESSAGES)
        socket.linger = 0
        return socket


def _waiting(socket: Socket) -> Iterator[list[bytes]]:
    """Messages that have come, up to a burst of them."""
    for _ in range(_MAX_BURST):
        try:
            yield socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return


def _decoded(source: _Source, payload: bytes) -> KVEventBatch:
    """A batch; one that cannot be read counts as empty, because asking for it again would not help."""
    try:
        return decode_batch(payload)
    except msgspec.DecodeError as error:
        log.error("%s has published KV events of %d bytes that cannot be read: %s", source.key, len(payload), error)
        return KVEventBatch(0.0, [])
