"""What gateways tell each other: where each has sent requests that no replica has reported yet.

Without it, gateways that see the same idle replica would all send to it. A replica names the gateways that call it in
its load reports, which is how they find each other. Messages may be lost or late: they only say a little earlier what
the replica's own reports and events will say, and what they say ends with a lease.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Final, TypeAlias

import zmq

from shoal.cluster.channel import Held, PeerMessage, Reserved, Settled, encode_peer_message
from shoal.cluster.routing.load import LEASE_S, Reservation
from shoal.cluster.routing.router import Router
from shoal.engine.request import BlockHash

log = logging.getLogger(__name__)

Socket: TypeAlias = "zmq.Socket[bytes]"

HOLD_PERIOD_S: Final = LEASE_S / 3
# A gateway that no load report has named for so long is gone. Reports come every second at least.
PEER_TIMEOUT_S: Final = 30.0
MAX_QUEUED_MESSAGES: Final = 10_000  # for one peer; more are dropped, it has stopped reading
CLOSE_TIMEOUT_S: Final = 5.0


@dataclass(slots=True)
class _Mirrored:
    reservation: Reservation
    replica: str
    prediction: Any  # of the prefix index


class MirroredReservations:
    """Reservations of other gateways with one model's router. Each ends when its gateway settles it, or has not said
    for LEASE_S that it stands.
    """

    def __init__(self, router: Router, clock: Callable[[], float] = time.monotonic) -> None:
        self._router = router
        self._clock = clock
        self._open: dict[str, _Mirrored] = {}

    def __len__(self) -> int:
        return len(self._open)

    def take(self, message: PeerMessage) -> None:
        """What another gateway says. Replicas and requests that are not known here are ignored."""
        with self._router.lock:
            self.expire()
            match message:
                case Reserved():
                    self._reserve(message)
                case Held():
                    self._hold(message)
                case Settled():
                    self._settle(message.request_id)

    def expire(self) -> None:
        """End what has not been held."""
        with self._router.lock:
            now = self._clock()
            late = [request_id for request_id, one in self._open.items() if one.reservation.expires_s <= now]
            for request_id in late:
                self._settle(request_id)

    def _reserve(self, message: Reserved) -> None:
        self._settle(message.request_id)
        target = self._router.target(message.replica)
        if target is None:
            return
        reservation = Reservation(message.request_id, message.num_uncached, self._clock() + LEASE_S)
        target.load.reserve(reservation)
        hashes = [BlockHash(block_hash) for block_hash in message.block_hashes]
        prediction = self._router.index.predict(target.slot, hashes)
        self._open[message.request_id] = _Mirrored(reservation, message.replica, prediction)

    def _hold(self, message: Held) -> None:
        expires_s = self._clock() + LEASE_S
        for request_id in message.request_ids:
            if (one := self._open.get(request_id)) is not None:
                one.reservation.expires_s = expires_s

    def _settle(self, request_id: str) -> None:
        one = self._open.pop(request_id, None)
        if one is None:
            return
        self._router.index.settle(one.prediction)
        if (target := self._router.target(one.replica)) is not None:
            target.load.settle(request_id)


class Mirror:
    """This gateway's word to the others, for all its models. `tell` and `meet` may be called from any thread and never
    wait; a thread sends.
    """

    def __init__(self, own_address: str, on_period: Callable[[], None] = lambda: None) -> None:
        """`own_address`: where this gateway listens. `on_period`: called every HOLD_PERIOD_S in the sending thread."""
        self._own_address = own_address
        self._on_period = on_period
        self._heard_s: dict[str, float] = {}
        self._outbox: SimpleQueue[PeerMessage | None] = SimpleQueue()
        self._held: dict[str, dict[str, None]] = {}  # by deployment: open requests, of which the peers know
        self._context: zmq.Context[Socket] | None = None
        self._peers: dict[str, Socket] = {}
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._outbox.put(None)
        if self._thread.is_alive():
            self._thread.join(CLOSE_TIMEOUT_S)

    @property
    def has_peers(self) -> bool:
        return bool(self._heard_s)

    def meet(self, addresses: Iterable[str]) -> None:
        """A replica is called by the gateways that listen there."""
        now = time.monotonic()
        for address in addresses:
            if address != self._own_address:
                self._heard_s[address] = now

    def tell(self, message: PeerMessage) -> None:
        if self._heard_s:
            self._outbox.put(message)

    # -- the sending thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        self._context = zmq.Context()
        next_period_s = time.monotonic() + HOLD_PERIOD_S
        while True:
            try:
                message = self._outbox.get(timeout=max(0.0, next_period_s - time.monotonic()))
            except Empty:
                pass
            else:
                if message is None:
                    break
                self._note(message)
                self._send(message)
            if time.monotonic() >= next_period_s:
                self._pass_period()
                next_period_s = time.monotonic() + HOLD_PERIOD_S
        for socket in self._peers.values():
            socket.close()
        self._context.term()

    def _pass_period(self) -> None:
        now = time.monotonic()
        for address, heard_s in list(self._heard_s.items()):
            if now - heard_s > PEER_TIMEOUT_S:
                del self._heard_s[address]
                if (socket := self._peers.pop(address, None)) is not None:
                    socket.close()
        for deployment, request_ids in self._held.items():
            if request_ids:
                self._send(Held(deployment, tuple(request_ids)))
        self._on_period()

    def _note(self, message: PeerMessage) -> None:
        match message:
            case Reserved():
                self._held.setdefault(message.deployment, {})[message.request_id] = None
            case Settled():
                self._held.get(message.deployment, {}).pop(message.request_id, None)

    def _send(self, message: PeerMessage) -> None:
        data = encode_peer_message(message)
        for address in list(self._heard_s):
            try:
                self._peer(address).send(data, zmq.NOBLOCK)
            except zmq.Again:
                log.debug("dropped a message to the gateway at %s, which has stopped reading", address)

    def _peer(self, address: str) -> Socket:
        socket = self._peers.get(address)
        if socket is None:
            assert self._context is not None
            socket = self._peers[address] = self._context.socket(zmq.PUSH)
            socket.set_hwm(MAX_QUEUED_MESSAGES)
            socket.linger = 0
            socket.connect(address)
        return socket
