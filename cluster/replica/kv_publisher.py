"""Tells routers what this replica holds and has to do: KV events in vLLM's wire format, and loads beside them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Final, TypeAlias

import zmq

from shoal.cluster.channel import KEEPALIVE_PERIOD_S, MAX_QUEUED_MESSAGES
from shoal.cluster.kv_events import END_OF_REPLAY, SHOAL_HASHES, kv_topic, load_topic
from shoal.cluster.replica.event_log import MAX_BATCHES, EventLog
from shoal.engine.memory.kv_events import KVEvent

Context: TypeAlias = "zmq.Context[zmq.Socket[bytes]]"
Socket: TypeAlias = "zmq.Socket[bytes]"

log = logging.getLogger(__name__)

_EPOCH_ZERO_S: Final = 1_735_689_600  # 2025: epochs are seconds since then and fit 31 bits, as the wire wants
_STOP_TIMEOUT_S: Final = 5.0


class KVPublisher:
    """Publishes from `start` to `close`. The engine's thread hands over events and loads and never waits: a thread of
    the publisher's own numbers, encodes and sends them, and answers replays.

    The last load is sent again every KEEPALIVE_PERIOD_S, each time with the number of the last batch: so a follower
    knows that it has missed nothing, and that a replica with nothing to do is there.
    """

    def __init__(
        self, ip: str, *, replica: str, model: str, block_size: int, num_blocks: int, epoch: int | None = None
    ) -> None:
        """ip: of this host, as gateways reach it. epoch: a number that grows from one start of this replica to the
        next, by default the time.
        """
        epoch = int(time.time()) - _EPOCH_ZERO_S if epoch is None else epoch
        self._ip = ip
        self._kv_topic, self._load_topic = kv_topic(replica, model), load_topic(replica, model)
        self._facts: dict[str, str | int] = {
            "epoch": epoch,
            "block_size": block_size,
            "num_blocks": num_blocks,
            "hashes": SHOAL_HASHES,
        }
        self._log = EventLog(epoch, block_size)
        self._events: SimpleQueue[Sequence[KVEvent]] = SimpleQueue()
        self._load = b""
        self._context: Context = zmq.Context()
        self._live, self._live_address = self._bind(zmq.PUB, MAX_QUEUED_MESSAGES)
        self._replay, self._replay_address = self._bind(zmq.ROUTER, 2 * MAX_BATCHES)
        self._wakeup = self._context.socket(zmq.PULL)
        self._wakeup.bind("inproc://wakeup")
        self._waker = self._context.socket(zmq.PUSH)
        self._waker.set_hwm(1)
        self._waker.linger = 0
        self._waker.connect("inproc://wakeup")
        self._waker_lock = threading.Lock()  # the engine's thread hands over, another one closes
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="kv-publisher", daemon=True)

    def __enter__(self) -> KVPublisher:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def endpoints(self) -> Mapping[str, str | int]:
        """What a subscriber needs to follow this replica, as plain data."""
        return {
            "events": self._live_address,
            "replay": self._replay_address,
            "topic": self._kv_topic,
            "load_topic": self._load_topic,
            **self._facts,
        }

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        with self._waker_lock:
            self._is_closing = True
            self._wake()
            self._waker.close()
        if self._thread.is_alive():
            self._thread.join(_STOP_TIMEOUT_S)
        for socket in (self._wakeup, self._replay, self._live):
            socket.close()
        self._context.term()

    def publish(self, events: Sequence[KVEvent]) -> None:
        """Publish the events of a step as one batch. Never blocks; after `close` nothing is sent."""
        if events:
            self._events.put(events)
            self._hand_over()

    def publish_load(self, load: bytes) -> None:
        """Publish how much there is to do, after all events so far. Never blocks; only the latest counts."""
        self._load = load
        self._hand_over()

    # -- the publisher's thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._wakeup, zmq.POLLIN)
        poller.register(self._replay, zmq.POLLIN)
        beat_s = time.monotonic()
        sent = b""
        while not self._is_closing:
            wait_s = max(0.0, beat_s + KEEPALIVE_PERIOD_S - time.monotonic())
            ready = dict(poller.poll(round(wait_s * 1e3)))
            if self._wakeup in ready:
                self._wakeup.recv()
            load = self._load  # before the events: those that came before it are sent before it
            self._send_events()
            if load is not sent or time.monotonic() >= beat_s + KEEPALIVE_PERIOD_S:
                self._send(self._load_topic, self._log.last_sequence, load)
                sent, beat_s = load, time.monotonic()
            if self._replay in ready:
                self._answer(self._replay.recv_multipart())

    def _send_events(self) -> None:
        while True:
            try:
                events = self._events.get_nowait()
            except Empty:
                return
            self._send(self._kv_topic, *self._log.append(events))

    def _send(self, topic: str, sequence: int, payload: bytes) -> None:
        self._live.send_multipart((topic.encode(), sequence.to_bytes(8, "big"), payload))

    def _answer(self, request: list[bytes]) -> None:
        """Answer a replay. The end says how many batches there were, so that a lost one is noticed."""
        if len(request) != 3 or len(request[2]) != 8:
            log.warning("ignored a replay request of %d frames that is none", len(request))
            return
        client, topic = request[0], self._kv_topic.encode()
        num_batches = 0
        for sequence, payload in self._log.replay(int.from_bytes(request[2], "big")):
            self._replay.send_multipart((client, b"", topic, sequence.to_bytes(8, "big"), payload))
            num_batches += 1
        end = (client, b"", b"", END_OF_REPLAY.to_bytes(8, "big"), num_batches.to_bytes(8, "big"))
        self._replay.send_multipart(end)

    # ----------------------------------------------------------------------------------------------------------

    def _bind(self, kind: int, max_queued: int) -> tuple[Socket, str]:
        socket = self._context.socket(kind)
        socket.set_hwm(max_queued)
        socket.linger = 0
        return socket, f"tcp://{self._ip}:{socket.bind_to_random_port(f'tcp://{self._ip}')}"

    def _hand_over(self) -> None:
        with self._waker_lock:
            if not self._is_closing:
                self._wake()

    def _wake(self) -> None:
        with suppress(zmq.Again):  # a wake-up is on its way already
            self._waker.send(b"", zmq.NOBLOCK)
