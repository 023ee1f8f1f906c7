"""Limits hold over all gateways: what each has been told counts there, and nothing stays when all is over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shoal.cluster.channel import Spent, decode_gateway_message, encode_peer_message
from shoal.cluster.gateway.limits import LEASE_S, REPEAT_S, Limits, OverLimitError
from shoal.cluster.keys import KeyLimits

LIMITS = KeyLimits(requests_per_minute=6, tokens_per_minute=60, max_concurrent_requests=4)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Cluster:
    """Gateways that tell each other at once."""

    def __init__(self, count: int, limits: KeyLimits = LIMITS) -> None:
        self.clock = Clock()
        self.limits: KeyLimits | None = limits
        self.gateways: list[Limits] = []
        self.sent: list[Spent] = []
        for _ in range(count):
            self.add()

    def add(self) -> Limits:
        name = f"g{len(self.gateways)}"
        gateway = Limits(name, lambda key: self.limits, tell=self._tell, clock=self.clock)
        self.gateways.append(gateway)
        return gateway

    def _tell(self, message: Spent) -> None:
        self.sent.append(message)
        for gateway in self.gateways:
            gateway.take(message)


def refused(act: Callable[[], Any]) -> OverLimitError:
    with pytest.raises(OverLimitError) as caught:
        act()
    return caught.value


def test_a_minutes_requests_go_at_once_and_then_come_back_evenly() -> None:
    cluster = Cluster(1, KeyLimits(requests_per_minute=6))
    (gateway,) = cluster.gateways
    for _ in range(6):
        gateway.enter("k")
    error = refused(lambda: gateway.enter("k"))
    assert (error.limit, error.most, error.retry_after_s) == ("requests", 6, 10)
    cluster.clock.now += 9.9
    refused(lambda: gateway.enter("k"))
    cluster.clock.now += 0.1
    gateway.enter("k")
    standing = gateway.standing("k")["requests"]
    assert (standing.limit, standing.remaining) == (6, 0)
    assert standing.reset_s == pytest.approx(60.0)
    gateway.enter("another key")


def test_tokens_are_charged_as_used_and_go_into_debt() -> None:
    cluster = Cluster(1, KeyLimits(tokens_per_minute=60))
    (gateway,) = cluster.gateways
    gateway.enter("k")
    gateway.spend("k", 100)
    assert gateway.standing("k")["tokens"].remaining == 0
    error = refused(lambda: gateway.enter("k"))
    assert (error.limit, error.retry_after_s) == ("tokens", 41)
    cluster.clock.now += 41
    gateway.enter("k")
    gateway.spend("k", -59)
    assert gateway.standing("k")["tokens"].remaining == 60


def test_requests_at_once_count_until_they_leave() -> None:
    cluster = Cluster(2, KeyLimits(max_concurrent_requests=2))
    one, two = cluster.gateways
    one.enter("k")
    two.enter("k")
    assert refused(lambda: one.enter("k")).limit == "concurrency"
    two.leave("k")
    one.enter("k")


def test_what_any_gateway_lets_in_counts_at_all() -> None:
    cluster = Cluster(3, KeyLimits(requests_per_minute=6))
    for number in range(6):
        cluster.gateways[number % 3].enter("k")
    for gateway in cluster.gateways:
        refused(lambda gateway=gateway: gateway.enter("k"))


def test_a_message_that_comes_twice_or_late_changes_nothing() -> None:
    cluster = Cluster(2, KeyLimits(requests_per_minute=6, max_concurrent_requests=6))
    one, two = cluster.gateways
    for _ in range(4):
        one.enter("k")
    for message in (*reversed(cluster.sent), *cluster.sent):
        two.take(message)
        assert two.num_open("k") == 4
        assert two.standing("k")["requests"].remaining == 2


def test_a_message_that_is_lost_is_made_good_by_the_next_beat() -> None:
    cluster = Cluster(2, KeyLimits(requests_per_minute=6, max_concurrent_requests=6))
    one, two = cluster.gateways
    one.enter("k")
    cluster.gateways = [one]
    one.enter("k")
    one.leave("k")
    one.leave("k")
    cluster.gateways = [one, two]
    assert two.num_open("k") == 1
    one.beat()
    assert two.num_open("k") == 0
    assert two.standing("k")["requests"].remaining == 4


def test_the_open_requests_of_a_gateway_that_dies_end_with_its_lease() -> None:
    cluster = Cluster(2, KeyLimits(max_concurrent_requests=1))
    one, two = cluster.gateways
    one.enter("k")
    cluster.clock.now += LEASE_S - 0.1
    one.beat()
    cluster.clock.now += LEASE_S - 0.1
    refused(lambda: two.enter("k"))
    cluster.clock.now += 0.2
    two.enter("k")


def test_a_gateway_that_comes_later_learns_what_was_spent() -> None:
    cluster = Cluster(1, KeyLimits(requests_per_minute=6))
    for _ in range(6):
        cluster.gateways[0].enter("k")
    late = cluster.add()
    cluster.gateways[0].beat()
    refused(lambda: late.enter("k"))
    cluster.clock.now += 10
    late.enter("k")


def test_years_of_requests_are_no_debt_for_one_that_comes_later() -> None:
    cluster = Cluster(1, KeyLimits(requests_per_minute=6))
    for _ in range(100):
        cluster.gateways[0].enter("k")
        cluster.gateways[0].leave("k")
        cluster.clock.now += 10
    late = cluster.add()
    cluster.gateways[0].beat()
    assert late.standing("k")["requests"].remaining == 6


def test_limits_that_change_hold_from_the_next_request_on() -> None:
    cluster = Cluster(1, KeyLimits())
    (gateway,) = cluster.gateways
    for _ in range(100):
        gateway.enter("k")
    assert cluster.sent == []  # keys without limits cost no messages
    cluster.limits = KeyLimits(requests_per_minute=6, max_concurrent_requests=101)
    for _ in range(1):
        gateway.enter("k")
    assert refused(lambda: gateway.enter("k")).limit == "concurrency"
    cluster.limits = None  # the key is gone, its requests are not
    for _ in range(101):
        gateway.leave("k")
    assert gateway.num_open("k") == 0


def test_what_is_told_passes_a_socket_as_it_is() -> None:
    cluster = Cluster(1)
    cluster.gateways[0].enter("k")
    (message,) = cluster.sent
    assert decode_gateway_message(encode_peer_message(message)) == message


class Gossip(RuleBasedStateMachine):
    """Three gateways; messages are lost, late, doubled and out of order. `ideal`: the bucket of one that knows all."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.gateways = [self._gateway(name) for name in ("a", "b", "c")]
        self.wires: dict[str, list[Spent]] = {"a": [], "b": [], "c": []}
        self.open: list[int] = []
        self.ideal = 0.0
        self.unheard = [[0.0] * 3 for _ in range(3)]  # [at][of]: spent there and not told here

    def _gateway(self, name: str) -> Limits:
        return Limits(name, lambda key: LIMITS, tell=lambda message: self._tell(name, message), clock=self.clock)

    def _tell(self, name: str, message: Spent) -> None:
        self.wires[name].append(message)

    def _note(self, at: int, amount: float) -> None:
        self.ideal = max(0.0, self.ideal + amount)
        for other in range(3):
            if other != at:
                self.unheard[other][at] += amount

    @initialize()
    def begin(self) -> None:
        """All have heard of each other; what a first word is worth has tests of its own."""
        self.spent = [1.0] * 3
        for gateway in self.gateways:
            gateway.enter("k")
            gateway.leave("k")
        self.told = {}
        for of, name in enumerate("abc"):
            for at in range(3):
                if at != of:
                    self.gateways[at].take(self.wires[name][-1])
                    self.told[at, of] = self.wires[name][-1].number
        self.clock.now += 60

    @rule(at=st.integers(0, 2))
    def enter(self, at: int) -> None:
        gateway = self.gateways[at]
        try:
            gateway.enter("k")
        except OverLimitError:
            assert gateway.num_open("k") >= 4 or gateway.standing("k")["requests"].remaining == 0
            return
        # At most what it had not been told passes the limit.
        self._note(at, 1.0)
        self.spent[at] += 1.0
        assert self.ideal <= 6 + sum(self.unheard[at]) + 1e-6
        assert self.open.count(at) < 4
        self.open.append(at)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        at = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        self.gateways[at].leave("k")

    @rule(seconds=st.sampled_from([0.5, 3.0, 9.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds
        self.ideal = max(0.0, self.ideal - seconds * 6 / 60)

    @rule(of=st.integers(0, 2))
    def beat(self, of: int) -> None:
        self.gateways[of].beat()

    @rule(of=st.integers(0, 2), at=st.integers(0, 2), data=st.data())
    def deliver(self, of: int, at: int, data: st.DataObject) -> None:
        """Any message that was ever sent, in any order, as often as it likes."""
        wire = self.wires["abc"[of]]
        if at == of or not wire:
            return
        message = wire[data.draw(st.integers(0, len(wire) - 1))]
        self.gateways[at].take(message)
        if message.number > self.told[at, of]:
            self.told[at, of] = message.number
            self.unheard[at][of] = self.spent[of] - message.keys[0].requests.total

    @invariant()
    def open_requests_are_never_negative(self) -> None:
        for gateway in self.gateways:
            assert gateway.num_open("k") >= 0

    def teardown(self) -> None:
        while self.open:
            self.gateways[self.open.pop()].leave("k")
        for of, name in enumerate("abc"):
            self.gateways[of].beat()
            for at in range(3):
                if at != of and self.wires[name]:
                    self.gateways[at].take(self.wires[name][-1])
        for gateway in self.gateways:
            assert gateway.num_open("k") == 0
            assert gateway.standing("k")["requests"].remaining <= max(0.0, 6 - self.ideal + 1e-6)  # all know all
        self.clock.now += 4000
        for gateway in self.gateways:
            gateway.beat()
            assert gateway.standing("k")["requests"].remaining == 6


Gossip.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestGossip = Gossip.TestCase


def test_a_gateway_with_nothing_new_says_nothing_after_a_while() -> None:
    cluster = Cluster(2)
    cluster.gateways[0].enter("k")
    cluster.gateways[0].leave("k")
    cluster.clock.now += REPEAT_S + 1
    before = len(cluster.sent)
    cluster.gateways[0].beat()
    assert [one for one in cluster.sent[before:] if one.keys] == []
