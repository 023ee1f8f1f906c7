"""Serve's own request router with our ranking in it: real Serve code, replicas that only say who they are."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve.request_router import PendingRequest

from shoal.cluster.channel import GenerateCall
from shoal.cluster.metrics import GROUP_RESTARTS
from shoal.cluster.routing import model_routing
from shoal.cluster.routing.model_routing import ModelRouting
from shoal.cluster.routing.serve_router import MAX_SINGLE, ShoalRouter
from shoal.engine.load import EngineLoad
from shoal.engine.memory.prefix_cache import chain_hashes, root_hash
from shoal.engine.request import RequestId, SamplingParams
from shoal.engine.step_time import StepTime

BLOCK_SIZE = 4
DEPLOYMENT = DeploymentID("model", "shoal")


class Replica:
    """What the router sees of a replica, and how often Serve asks it for its queue."""

    def __init__(self, name: str, label: str = "") -> None:
        self.replica_id = ReplicaID(name, DEPLOYMENT)
        self.max_ongoing_requests = 8
        self.num_asked = 0
        self.num_ongoing = 0
        # An address where nobody listens: its events never come, and nothing waits for them.
        self.replica_metadata = {"events": "tcp://127.0.0.1:1", "topic": f"kv@{name}@model", "block_size": BLOCK_SIZE,
                                 "num_blocks": 1000, "hashes": "shoal", "epoch": 1, "label": label or name}  # fmt: skip

    async def get_queue_len(self, *, deadline_s: float) -> int:
        self.num_asked += 1
        return self.num_ongoing


class Rig:
    def __init__(self, names: str = "ab") -> None:
        self.router = ShoalRouter(DEPLOYMENT, DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True)
        self.router.initialize_state(policy="prefix_aware", options={})
        self.routing: ModelRouting = model_routing.routing_of("shoal", "model", "prefix_aware", {})
        self.replicas = {name: Replica(name) for name in names}
        self.router.update_replicas(list(self.replicas.values()))  # type: ignore[arg-type]

    async def route(self, call: GenerateCall, *, method: str = "generate") -> str:
        """The replica that Serve picks, as it does for a call of a handle."""
        pending = pending_of(call, method)
        replica = await self.router._choose_replica_for_request(pending)
        self.router.on_send_request(replica.replica_id)
        self.router.on_request_routed(pending, replica.replica_id, None)  # type: ignore[arg-type]
        return replica.replica_id.unique_id

    def learn(self, name: str, *prefills: int, num_decoding: int = 0) -> None:
        """A load report of that replica."""
        self.routing.router.report(name, load(*prefills, num_decoding=num_decoding))

    def hold(self, name: str, prompt: tuple[int, ...]) -> None:
        """The replica caches this prompt."""
        target = self.routing.router.target(name)
        assert target is not None
        self.routing.router.index.store(target.slot, chain_hashes(prompt, root_hash(""), BLOCK_SIZE))


def load(*prefills: int, num_decoding: int = 0) -> EngineLoad:
    return EngineLoad(
        prefills=tuple((RequestId(f"other{i}-0"), tokens) for i, tokens in enumerate(prefills)),
        more_prefill_tokens=0, num_running=num_decoding, max_running_requests=64, num_waiting=len(prefills),
        num_waiting_tokens=0,
        num_decoding=num_decoding, num_context_tokens=100 * num_decoding, num_free_blocks=1000, num_empty_blocks=1000,
        num_blocks=1000, block_size=BLOCK_SIZE, max_step_tokens=512,
        step_time=StepTime(0.001, 0.001, 0.001, 0.0), finished_per_s=1.0,
    )  # fmt: skip


def call(name: str, prompt: tuple[int, ...] = tuple(range(64)), *, session: str = "") -> GenerateCall:
    return GenerateCall(name, prompt, SamplingParams(max_tokens=4, seed=1), session=session)


def pending_of(call: GenerateCall | None, method: str = "generate") -> PendingRequest:
    name = call.request_id if call is not None else "facts"
    metadata = RequestMetadata(request_id=name, internal_request_id=name, call_method=method)
    return PendingRequest(args=[call, "tcp://127.0.0.1:2"] if call is not None else [], kwargs={}, metadata=metadata)


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    rig = Rig()
    await asyncio.sleep(0)  # Serve asks new replicas for their queues
    await asyncio.sleep(0)
    yield rig
    rig.routing.close()
    del model_routing._routings["shoal/model"]


async def test_a_call_goes_to_the_replica_that_holds_its_prompt(rig: Rig) -> None:
    prompt = tuple(range(100, 164))
    for name in ("b", "a"):
        rig.hold(name, prompt)
        rig.routing.open(call(f"on-{name}", prompt), None)
        assert await rig.route(call(f"on-{name}", prompt)) == name
        rig.routing.close_call(call(f"on-{name}", prompt), 4)
        prompt = tuple(range(200, 264))


async def test_siblings_that_come_before_any_event_stay_together_until_their_replica_is_busy(rig: Rig) -> None:
    prompts = {name: tuple(range(start, start + 400)) for name, start in (("p", 0), ("q", 1000))}
    chosen: dict[str, set[str]] = {}
    for turn in range(3):
        for name, prompt in prompts.items():
            one = call(f"{name}{turn}", (*prompt, 5000 + turn))
            rig.routing.open(one, rig.routing.describe(one))
            chosen.setdefault(name, set()).add(await rig.route(one))
    assert [len(replicas) for replicas in chosen.values()] == [1, 1]
    assert chosen["p"] != chosen["q"]


async def test_a_known_backlog_sends_a_call_elsewhere(rig: Rig) -> None:
    rig.learn("a", 5000)
    rig.learn("b")
    assert [await rig.route(call(f"c{i}")) for i in range(3)] == ["b", "b", "b"]


async def test_no_replica_is_asked_for_its_queue_when_a_call_is_routed(rig: Rig) -> None:
    asked = {name: replica.num_asked for name, replica in rig.replicas.items()}
    rig.router.replica_queue_len_cache._cache.clear()  # as after ten seconds without a call
    for i in range(4):
        await rig.route(call(f"c{i}"))
    assert {name: replica.num_asked for name, replica in rig.replicas.items()} == asked


async def test_replicas_that_died_are_counted_once_and_those_taken_down_are_not(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def has_died(actor_name: str) -> bool:
        asked.append(actor_name)
        return actor_name.endswith("#b")

    # Not the module's: Serve pickles the class by value, and what it unpickles in this process has globals of its own.
    monkeypatch.setitem(ShoalRouter._count_lost.__globals__, "has_died", has_died)

    async def lost() -> float:
        for thread in threading.enumerate():
            if thread.name == "lost-replicas":
                thread.join(5)
        (point,) = [one for one in rig.routing.snapshot("m") if one.metric == GROUP_RESTARTS.name]
        assert point.labels == ("m",)
        assert isinstance(point.value, float)
        return point.value

    assert await lost() == 0
    rig.router.update_replicas([rig.replicas["b"]])  # type: ignore[list-item]
    assert await lost() == 0, "it was taken down in order"
    rig.router.on_replica_actor_died(rig.replicas["b"].replica_id)
    assert await lost() == 1
    rig.router.update_replicas([Replica("c")])  # type: ignore[list-item]
    assert await lost() == 1
    rig.router.update_replicas([Replica("c")])  # type: ignore[list-item]
    assert [name[-2:] for name in asked] == ["#a", "#b"]


async def test_a_full_replica_is_passed_over_for_the_next_best(rig: Rig) -> None:
    prompt = tuple(range(64))
    rig.hold("a", prompt)
    rig.replicas["a"].num_ongoing = 8
    rig.router.replica_queue_len_cache.update(rig.replicas["a"].replica_id, 8)
    one = call("c", prompt)
    rig.routing.open(one, rig.routing.describe(one))
    assert await rig.route(one) == "b"
    placed = rig.routing.placement(one)
    assert placed is not None
    assert placed[0] == "b"
    assert {key: list(rig.routing.router.target(key).load._reservations) for key in "ab"} == {  # type: ignore[union-attr]
        "a": [], "b": ["c-0"]
    }  # fmt: skip


async def test_reservations_end_with_the_first_token_and_with_the_call(rig: Rig) -> None:
    for how in (rig.routing.settle, lambda one: rig.routing.close_call(one, None)):
        one = call("c")
        rig.routing.open(one, rig.routing.describe(one))
        await rig.route(one)
        how(one)
        assert [list(rig.routing.router.target(key).load._reservations) for key in "ab"] == [[], []]  # type: ignore[union-attr]
        rig.routing.close_call(one, None)


async def test_a_call_that_is_gone_before_it_is_routed_reserves_nothing(rig: Rig) -> None:
    await rig.route(call("c"))
    assert [list(rig.routing.router.target(key).load._reservations) for key in "ab"] == [[], []]  # type: ignore[union-attr]


async def test_other_methods_and_unknown_requests_may_go_to_any_replica(rig: Rig) -> None:
    candidates: Any = list(rig.replicas.values())
    assert await rig.router.choose_replicas(candidates, None) == [candidates]
    assert await rig.router.choose_replicas(candidates, pending_of(None, "facts")) == [candidates]


async def test_every_candidate_is_in_the_answer_once(rig: Rig) -> None:
    replicas: Any = [Replica(name) for name in "abcdefgh"]
    rig.router.update_replicas(replicas)
    groups = await rig.router.choose_replicas(replicas, pending_of(call("c")))
    assert [len(group) for group in groups] == [1] * MAX_SINGLE + [8 - MAX_SINGLE]
    assert {replica.replica_id for group in groups for replica in group} == {one.replica_id for one in replicas}


async def test_a_replica_that_leaves_gets_nothing_and_is_forgotten(rig: Rig) -> None:
    prompt = tuple(range(64))
    rig.hold("a", prompt)
    rig.router.update_replicas([rig.replicas["b"]])  # type: ignore[list-item]
    assert await rig.route(call("c", prompt)) == "b"
    assert rig.routing.keys == {"b"}
    assert rig.routing.router.keys == ("b",)
    request = rig.routing.describe(call("again", prompt))
    assert request is not None
    assert not rig.routing.router.index.match(request.block_hashes)


async def test_a_replica_that_died_is_left_out_at_once(rig: Rig) -> None:
    rig.router.on_replica_actor_died(rig.replicas["a"].replica_id)
    assert rig.routing.keys == {"b"}
    assert await rig.route(call("c")) == "b"


async def test_what_is_foreseen_is_of_the_best_replica_and_changes_nothing(rig: Rig) -> None:
    one = call("c")
    request = rig.routing.describe(one)
    assert request is not None
    assert rig.routing.foresee(request) is None  # nobody has said how fast it is
    rig.learn("a", 5000)
    rig.learn("b", 1000)
    before = rig.routing.explain()
    seen = rig.routing.foresee(request)
    assert seen is not None
    # 64 tokens before the 1000, at 1 ms a token; the replica computes the shorter prompt first
    assert seen.ttft_s == pytest.approx(0.065, abs=0.01)
    assert seen.wait_s == pytest.approx(0.001, abs=0.001)
    assert seen.tpot_s == pytest.approx(0.002)
    assert seen.num_replicas == 2
    assert rig.routing.explain() == before


async def test_serve_waits_between_tries_while_every_replica_is_full(rig: Rig) -> None:
    pending = pending_of(call("c"))
    await rig.router.choose_replicas(list(rig.router.curr_replicas.values()), pending)
    assert pending.routing_context.should_backoff
