"""Gateways tell each other what they reserve: it ends, whatever message is lost, and nobody waits for anybody."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from shoal.cluster.channel import GenerateCall, Held, PeerMessage, Reserved, Settled, decode_gateway_message
from shoal.cluster.routing import mirror as mirror_module
from shoal.cluster.routing.load import LEASE_S
from shoal.cluster.routing.mirror import Mirror, MirroredReservations
from shoal.cluster.routing.model_routing import ModelRouting
from shoal.cluster.routing.router import Router
from shoal.engine.request import SamplingParams

REPLICAS = ("a", "b")
HASHES = tuple(bytes([i]) * 16 for i in range(6))


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def router_with_replicas(clock: Clock) -> Router:
    router = Router(clock=clock)
    for key in REPLICAS:
        router.add(key)
    return router


def reserved(router: Router) -> dict[str, set[str]]:
    targets = {key: router.target(key) for key in REPLICAS}
    return {key: set(target.load._reservations) for key, target in targets.items() if target is not None}


def reservation(name: str, replica: str = "a", num_blocks: int = 3) -> Reserved:
    return Reserved("shoal/model", name, replica, 32, HASHES[:num_blocks])


def test_a_mirrored_reservation_counts_as_work_and_as_cached_blocks_to_come() -> None:
    router = router_with_replicas(Clock())
    mirrored = MirroredReservations(router, Clock())
    mirrored.take(reservation("r"))
    target = router.target("a")
    assert target is not None
    assert target.load.backlog == 32
    assert router.index.match(HASHES) == {target.slot: 3}  # type: ignore[arg-type]
    mirrored.take(Settled("shoal/model", "r"))
    assert target.load.backlog == 0
    assert router.index.match(HASHES) == {}  # type: ignore[arg-type]


def test_a_lease_ends_unless_it_is_held() -> None:
    clock = Clock()
    router = router_with_replicas(clock)
    mirrored = MirroredReservations(router, clock)
    mirrored.take(reservation("gone"))
    mirrored.take(reservation("held"))
    clock.now += LEASE_S * 0.6
    mirrored.take(Held("shoal/model", ("held", "never heard of")))
    clock.now += LEASE_S * 0.6
    mirrored.expire()
    assert reserved(router) == {"a": {"held"}, "b": set()}


names = st.sampled_from(["r", "s", "t"])
messages: st.SearchStrategy[PeerMessage] = st.one_of(
    st.builds(reservation, names, st.sampled_from([*REPLICAS, "unknown"]), st.integers(0, len(HASHES))),
    st.builds(lambda name: Held("shoal/model", (name,)), names),
    st.builds(lambda name: Settled("shoal/model", name), names),
)
events = st.lists(messages | st.floats(0.0, LEASE_S) | st.sampled_from(REPLICAS), max_size=30)


@given(events)
def test_whatever_is_lost_doubled_or_late_nothing_outlives_its_lease(events: list[PeerMessage | float | str]) -> None:
    """Numbers are time that passes, names are replicas that leave."""
    clock = Clock()
    router = router_with_replicas(clock)
    mirrored = MirroredReservations(router, clock)
    for event in events:
        if isinstance(event, float):
            clock.now += event
        elif isinstance(event, str):
            if (target := router.target(event)) is not None:
                router.remove(event)
                router.index.close(target.slot)
        else:
            mirrored.take(event)
            assert len(mirrored) <= 3
    clock.now += LEASE_S
    mirrored.expire()
    assert len(mirrored) == 0
    assert all(not ids for ids in reserved(router).values())
    assert router.index.match(HASHES) == {}  # type: ignore[arg-type]


class Relay:
    """A mirror whose words reach the other gateway at once."""

    has_peers = True

    def __init__(self) -> None:
        self.other: MirroredReservations | None = None

    def tell(self, message: PeerMessage) -> None:
        assert self.other is not None
        self.other.take(message)


def test_two_gateways_do_not_send_to_the_same_idle_replica() -> None:
    relays: list[Any] = [Relay(), Relay()]
    gateways = [ModelRouting(f"gateway{i}") for i in range(2)]
    for gateway, relay, other in zip(gateways, relays, reversed(gateways), strict=True):
        gateway.share(relay)
        relay.other = other.mirrored
        gateway.update({key: metadata(key) for key in REPLICAS})
    calls = [GenerateCall(name, tuple(range(i, i + 500)), SamplingParams(seed=1)) for i, name in enumerate("xyz")]
    chosen = []
    for one, gateway in zip(calls, (gateways[0], gateways[1], gateways[0]), strict=True):
        gateway.open(one, gateway.describe(one))
        decision = gateway.choose(one, set(REPLICAS))
        assert decision is not None
        chosen.append(decision.target.key)
    assert set(chosen[:2]) == set(REPLICAS)
    for one, gateway in zip(calls, (gateways[0], gateways[1], gateways[0]), strict=True):
        gateway.settle(one)
    assert [len(gateway.mirrored) for gateway in gateways] == [0, 0]
    for gateway in gateways:
        assert all(not ids for ids in reserved(gateway.router).values())
        gateway.close()


def metadata(key: str) -> dict[str, Any]:
    """Of a replica at an address where nobody listens."""
    return {"events": "tcp://127.0.0.1:1", "topic": f"kv@{key}@model", "block_size": 16, "hashes": "shoal", "epoch": 1}


class Peer:
    """Another gateway's socket."""

    def __init__(self) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        self.address = f"tcp://127.0.0.1:{self._socket.bind_to_random_port('tcp://127.0.0.1')}"

    def next(self, timeout_s: float = 10.0) -> PeerMessage:
        assert self._socket.poll(timeout_s * 1e3), "nothing came"
        message = decode_gateway_message(self._socket.recv())
        assert not isinstance(message, list)
        return message

    def close(self) -> None:
        self._context.destroy(linger=0)


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    yield peer
    peer.close()


@pytest.fixture
def make_mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Mirror]]:
    monkeypatch.setattr(mirror_module, "HOLD_PERIOD_S", 0.05)
    mirrors: list[Mirror] = []

    def make() -> Mirror:
        mirrors.append(Mirror("tcp://127.0.0.1:9"))
        mirrors[-1].start()
        return mirrors[-1]

    yield make
    for mirror in mirrors:
        mirror.close()


def test_a_peer_hears_of_reservations_until_they_are_settled(peer: Peer, make_mirror: Callable[[], Mirror]) -> None:
    mirror = make_mirror()
    mirror.tell(reservation("before anybody was known"))
    mirror.meet([peer.address, "tcp://127.0.0.1:9"])
    mirror.tell(reservation("r"))
    assert peer.next() == reservation("r")
    assert peer.next() == Held("shoal/model", ("r",))
    mirror.tell(Settled("shoal/model", "r"))
    while isinstance(message := peer.next(), Held):
        pass
    assert message == Settled("shoal/model", "r")


def test_a_peer_that_reads_nothing_keeps_nobody_waiting(make_mirror: Callable[[], Mirror]) -> None:
    mirror = make_mirror()
    mirror.meet(["tcp://127.0.0.1:1"])  # nobody listens there
    start = time.monotonic()
    for i in range(mirror_module.MAX_QUEUED_MESSAGES + 100):
        mirror.tell(Settled("shoal/model", f"r{i}"))
    mirror.close()
    assert time.monotonic() - start < 5.0


def test_a_peer_that_no_report_names_any_more_is_forgotten(
    peer: Peer, make_mirror: Callable[[], Mirror], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror_module, "PEER_TIMEOUT_S", 0.2)
    mirror = make_mirror()
    mirror.meet([peer.address])
    assert mirror.has_peers
    deadline = time.monotonic() + 10.0
    while mirror.has_peers:
        assert time.monotonic() < deadline
        time.sleep(0.02)
