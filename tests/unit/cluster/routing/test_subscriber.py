"""Publisher and subscriber over real sockets."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zmq

from shoal.cluster.kv_events import BlockStored, KVEventBatch, encode_batch
from shoal.cluster.replica.kv_publisher import KVPublisher
from shoal.cluster.routing.prefix_index import PrefixIndex
from shoal.cluster.routing.subscriber import EndpointsError, EventSubscriber
from shoal.engine.memory.kv_events import BlocksRemoved, BlocksStored
from shoal.engine.memory.prefix_cache import chain_hashes, root_hash

BLOCK_SIZE = 4
TOKENS = tuple(range(10 * BLOCK_SIZE))
PROMPT = chain_hashes(TOKENS, root_hash(""), BLOCK_SIZE)


def eventually(check: Callable[[], Any], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.005)


def stored(first: int, last: int) -> BlocksStored:
    tokens = TOKENS[first * BLOCK_SIZE : last * BLOCK_SIZE]
    return BlocksStored(tuple(PROMPT[first:last]), PROMPT[first - 1] if first else None, tokens, "")


def publisher(name: str, epoch: int | None = None) -> KVPublisher:
    return KVPublisher("127.0.0.1", replica=name, model="m", block_size=BLOCK_SIZE, num_blocks=100, epoch=epoch)


class Routing:
    def __init__(self) -> None:
        self.index = PrefixIndex()
        self.lock = threading.RLock()
        self.loads: list[tuple[str, bytes]] = []
        self.slots: dict[str, int] = {}
        self.subscriber = EventSubscriber(
            lambda key, load: self.loads.append((key, load)), self.lock, self.index, on_slot=self.slots.__setitem__
        )

    def depths(self) -> dict[int, int]:
        with self.lock:
            return self.index.match(PROMPT)


@pytest.fixture
def routing() -> Iterator[Routing]:
    routing = Routing()
    with routing.subscriber:
        yield routing


def test_the_index_follows_replicas_and_forgets_those_that_leave(routing: Routing) -> None:
    subscriber = routing.subscriber
    with publisher("a") as a, publisher("b") as b:
        a.publish([stored(0, 3)])
        for key, replica in (("a", a), ("b", b)):
            subscriber.follow(key, replica.endpoints)
        eventually(lambda: routing.depths() == {subscriber.slot("a"): 3})
        b.publish([stored(0, 2)])
        a.publish([BlocksRemoved((PROMPT[2],))])
        eventually(lambda: routing.depths() == {subscriber.slot("a"): 2, subscriber.slot("b"): 2})
        assert routing.slots["a"] == subscriber.slot("a")
        subscriber.unfollow("a")
        assert routing.depths() == {subscriber.slot("b"): 2}
        subscriber.unfollow("a")
    with pytest.raises(KeyError):
        subscriber.slot("a")


def test_a_load_arrives_after_the_events_before_it_and_keeps_the_replica_fresh(routing: Routing) -> None:
    with publisher("a") as a:
        routing.subscriber.follow("a", a.endpoints)
        a.publish([stored(0, 3)])
        a.publish_load(b"busy")
        eventually(lambda: ("a", b"busy") in routing.loads)
        assert list(routing.depths().values()) == [3]
        time.sleep(1.5)
        assert routing.subscriber.staleness_s("a") < 1.4
        assert set(routing.loads) == {("a", b"busy")}


def test_another_start_of_a_replica_begins_with_nothing(routing: Routing) -> None:
    with publisher("a", epoch=1) as a:
        a.publish([stored(0, 3)])
        slot = routing.subscriber.follow("a", a.endpoints)
        assert routing.subscriber.follow("a", a.endpoints) == slot
        eventually(lambda: list(routing.depths().values()) == [3])
    with publisher("a", epoch=2) as a:
        routing.subscriber.follow("a", a.endpoints)
        assert routing.depths() == {}
        a.publish([stored(0, 1)])
        eventually(lambda: list(routing.depths().values()) == [1])


def test_a_replica_that_does_not_answer_holds_nobody_up(routing: Routing) -> None:
    with publisher("a") as a:
        dead = {**a.endpoints, "topic": "kv@dead@m", "load_topic": "load@dead@m"}
        routing.subscriber.follow("dead", {**dead, "events": "tcp://127.0.0.1:9", "replay": "tcp://127.0.0.1:9"})
        routing.subscriber.follow("a", a.endpoints)
        a.publish([stored(0, 3)])
        eventually(lambda: routing.depths() == {routing.subscriber.slot("a"): 3}, timeout_s=4.0)
        assert routing.subscriber.staleness_s("dead") > 0


def test_a_publisher_in_the_manner_of_vllm_is_followed(routing: Routing) -> None:
    """Its replay sends no topic and no count, as vLLM did before it sent the topic too."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    live, replay = context.socket(zmq.PUB), context.socket(zmq.ROUTER)
    ports = [socket.bind_to_random_port("tcp://127.0.0.1") for socket in (live, replay)]
    event = BlockStored([11, 12], None, TOKENS[: 2 * BLOCK_SIZE], BLOCK_SIZE, None, "GPU", None)
    try:
        routing.subscriber.follow(
            "vllm",
            {
                "events": f"tcp://127.0.0.1:{ports[0]}",
                "replay": f"tcp://127.0.0.1:{ports[1]}",
                "topic": "kv@pod@m",
                "block_size": BLOCK_SIZE,
            },
        )
        assert replay.poll(10_000)
        client, empty, start = replay.recv_multipart()
        assert (empty, start) == (b"", bytes(8))
        replay.send_multipart([client, b"", bytes(8), encode_batch(KVEventBatch(1.0, [event], 0))])
        replay.send_multipart([client, b"", (-1).to_bytes(8, "big", signed=True), b""])
        eventually(lambda: routing.depths() == {routing.subscriber.slot("vllm"): 2})
    finally:
        context.destroy(linger=0)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"events": "ipc:///x"}, "events"),
        ({"replay": "nowhere"}, "replay"),
        ({"topic": ""}, "topic"),
        ({"block_size": "x"}, "block_size"),
        ({"epoch": None}, "epoch"),
    ],
)
def test_endpoints_that_cannot_be_used_are_refused_by_field(
    routing: Routing, change: dict[str, object], named: str
) -> None:
    a = publisher("a")
    try:
        with pytest.raises(EndpointsError, match=named):
            routing.subscriber.follow("a", {**a.endpoints, **change})
    finally:
        a.close()


def test_two_engines_cannot_share_a_topic(routing: Routing) -> None:
    with publisher("a") as a:
        routing.subscriber.follow("a", a.endpoints)
        with pytest.raises(EndpointsError, match="topic"):
            routing.subscriber.follow("b", a.endpoints)
