"""The router of one model in one gateway: replicas, what they hold, what they have to do, and who gets a request.

One object serves Serve's request router, the gateway's admission and the simulator. No decision makes a remote call:
everything is known here, from events and reports of the replicas and from what other gateways say they have routed.
Every method may be called from any thread.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import astuple, dataclass
from statistics import median
from typing import Any, Final

from shoal.cluster.routing.cost import Estimate
from shoal.cluster.routing.load import LEASE_S, ReplicaLoad, Reservation
from shoal.cluster.routing.policies import Matched, Policy, PrefixAware, Ranked, RoutedRequest, Target, estimate_for
from shoal.cluster.routing.prefix_index import PrefixIndex
from shoal.cluster.routing.reuse import ReuseStats
from shoal.engine.load import EngineLoad
from shoal.engine.memory.prefix_cache import chain_hashes, root_hash
from shoal.engine.request import BlockHash
from shoal.engine.step_time import StepTime

MAX_DECISIONS: Final = 100  # kept for /debug/routing
TYPICAL_PERIOD_S: Final = 1.0
_OUTPUT_MEMORY: Final = 0.02  # weight of the newest request in the mean output length


@dataclass(frozen=True, slots=True)
class Decision:
    """A request's replicas, best first, as they stood at `decided_s` (the router's clock)."""

    request: RoutedRequest
    decided_s: float
    ranked: Sequence[Ranked]
    best: Estimate  # at the first of them
    is_known: bool  # whether its seconds are of measured rates
    num_cached_blocks: int  # leading blocks of the prompt that any replica has

    @property
    def target(self) -> Target:
        return self.ranked[0].target


@dataclass(frozen=True, slots=True)
class Routed:
    """An open request and what the router has written down for it."""

    request: RoutedRequest
    key: str
    estimate: Estimate
    prediction: Any  # of the prefix index


class Router:
    """`clock` gives seconds; `on_reserve` and `on_settle` tell other gateways."""

    def __init__(
        self,
        policy: Policy | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        on_reserve: Callable[[str, Reservation, Sequence[BlockHash]], None] | None = None,
        on_settle: Callable[[str], None] | None = None,
    ) -> None:
        self.lock = threading.RLock()  # also guards the index: whoever feeds it takes this lock
        self.reuse = ReuseStats()
        self.index = PrefixIndex(on_gone=lambda block_hash: self.reuse.gone(block_hash, len(self.index)))
        self._policy = policy or PrefixAware()
        self._clock = clock
        self._on_reserve = on_reserve
        self._on_settle = on_settle
        self._targets: dict[str, Target] = {}  # the one that was chosen longest ago first
        self._routed: dict[str, Routed] = {}
        self._decisions: deque[Decision] = deque(maxlen=MAX_DECISIONS)
        self._expected_output: float | None = None
        self._typical_time: StepTime | None = None  # the median of all replicas
        self._typical_s = 0.0  # when it was computed
        self.decision_seconds_total = 0.0

    # -- replicas ----------------------------------------------------------------------------------------------

    @property
    def keys(self) -> Collection[str]:
        return tuple(self._targets)

    def target(self, key: str) -> Target | None:
        return self._targets.get(key)

    def add(self, key: str, slot: int | None = None) -> Target:
        """A replica that may get requests from now on. `slot`: where its blocks stand in the index, if anywhere."""
        with self.lock:
            target = self._targets[key] = Target(
                key, self.index.open() if slot is None else slot, ReplicaLoad(self._clock())
            )
            if self._typical_time is not None:
                target.load.assume(self._typical_time)
            return target

    def remove(self, key: str) -> None:
        """The replica is gone or drains: it gets no more requests. Its slot is closed by whoever opened it."""
        with self.lock:
            self._targets.pop(key, None)
            for request_id in [one.request.request_id for one in self._routed.values() if one.key == key]:
                self.settle(request_id)

    def move(self, key: str, slot: int) -> None:
        """The replica's blocks stand in another slot: it has started anew."""
        with self.lock:
            if (target := self._targets.get(key)) is not None:
                target.slot = slot

    def report(self, key: str, load: EngineLoad) -> None:
        """What the replica has to do now. Unknown replicas are ignored."""
        with self.lock:
            target = self._targets.get(key)
            if target is None:
                return
            before = target.load.measured
            target.load.apply(load, self._clock())
            if load.step_time is not None and load.step_time != before:
                self._learn_step_time(target, load.step_time)

    def _learn_step_time(self, target: Target, own: StepTime) -> None:
        now = self._clock()
        if self._typical_time is None or now - self._typical_s >= TYPICAL_PERIOD_S:
            times = [one.load.measured for one in self._targets.values() if one.load.measured is not None]
            self._typical_time = StepTime(*map(median, zip(*map(astuple, times), strict=True)))
            self._typical_s = now
            for other in self._targets.values():
                if other.load.measured is None:
                    other.load.assume(self._typical_time)
        target.load.measure(own, self._typical_time)

    # -- requests ----------------------------------------------------------------------------------------------

    def describe(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        *,
        block_size: int,
        salt: str = "",
        max_tokens: int | None = None,
        session: str = "",
        block_hashes: Sequence[BlockHash] | None = None,
    ) -> RoutedRequest:
        """A request in the router's terms. Hashing costs about 1 us a block."""
        limit = (len(prompt_ids) - 1) // block_size
        if block_hashes is None:
            block_hashes = chain_hashes(prompt_ids[: limit * block_size], root_hash(salt), block_size)
        hashes = block_hashes[:limit]
        expected = self._expected_output if self._expected_output is not None else float(max_tokens or 0)
        if max_tokens is not None:
            expected = min(expected, max_tokens)
        return RoutedRequest(
            request_id,
            prompt_ids,
            len(prompt_ids),
            block_size,
            hashes,
            expected,
            self.reuse.chance * block_size,
            session,
        )

    def decide(self, request: RoutedRequest, keys: Collection[str] | None = None) -> Decision | None:
        """Rank the replicas, of those in `keys` if given; None if there are none."""
        start = time.perf_counter()
        with self.lock:
            now = self._clock()
            targets = (
                list(self._targets.values())
                if keys is None or len(keys) == len(self._targets)
                else [target for key, target in self._targets.items() if key in keys]
            )
            if not targets:
                return None
            matched = self.match(request)
            ranked = self._policy.rank(request, targets, matched, now)
            first = ranked[0]
            best = first.estimate or estimate_for(request, first.target, matched, now)
            deepest = max(matched.values(), default=0)
            decision = Decision(request, now, ranked, best, first.target.load.is_known, deepest)
            self.decision_seconds_total += time.perf_counter() - start
            return decision

    def match(self, request: RoutedRequest) -> Matched:
        """What each slot has of the prompt. Call it under the lock."""
        blocks = self.index.match(request.block_hashes)
        return Matched(blocks, self.index.pending(request.block_hashes, blocks))

    def reserve(self, decision: Decision, key: str | None = None) -> None:
        """The request goes to the decision's best replica, or, as it turned out, to `key`. Ends with `settle`."""
        request = decision.request
        with self.lock:
            target = self._targets.get(key) if key is not None else decision.target
            if key is None:
                self._decisions.append(decision)
                self.reuse.missed(request.block_hashes[decision.num_cached_blocks :])
            if target is None:
                return
            self.settle(request.request_id)
            best = decision.best
            if target is not decision.target:
                matched = self.match(request)
                best = estimate_for(request, target, matched, decision.decided_s)
            self._targets[target.key] = self._targets.pop(target.key)
            reservation = Reservation(request.request_id, best.num_uncached, decision.decided_s + LEASE_S)
            target.load.reserve(reservation)
            prediction = self.index.predict(target.slot, request.block_hashes)
            self._routed[request.request_id] = Routed(request, target.key, best, prediction)
            if self._on_reserve is not None:
                self._on_reserve(target.key, reservation, request.block_hashes)

    def settle(self, request_id: str) -> None:
        """The request has its first token, or is over: its replica's own reports and events tell the rest."""
        with self.lock:
            routed = self._routed.pop(request_id, None)
            if routed is None:
                return
            self.index.settle(routed.prediction)
            target = self._targets.get(routed.key)
            if target is not None:
                target.load.settle(request_id)
            if self._on_settle is not None:
                self._on_settle(request_id)

    def finish(self, num_output_tokens: int) -> None:
        """A request ended with so many tokens: later ones are expected to be like it."""
        with self.lock:
            before = self._expected_output if self._expected_output is not None else float(num_output_tokens)
            self._expected_output = before + _OUTPUT_MEMORY * (num_output_tokens - before)

    def routed(self, request_id: str) -> Routed | None:
        return self._routed.get(request_id)

    # -- explanation -------------------------------------------------------------------------------------------

    def explain(self) -> list[dict[str, Any]]:
        """The last decisions, newest first, with the cost of every candidate."""
        with self.lock:
            decisions = list(self._decisions)
            now = self._clock()
        return [_explanation(decision, now) for decision in reversed(decisions)]


def _explanation(decision: Decision, now: float) -> dict[str, Any]:
    request = decision.request
    candidates: list[Mapping[str, Any]] = []
    for target, one in decision.ranked:
        entry: dict[str, Any] = {"replica": target.key}
        if one is not None:
            entry |= {"cost_s": one.cost_s} | one._asdict()
        candidates.append(entry)
    return {
        "request_id": request.request_id,
        "seconds_ago": now - decision.decided_s,
        "num_prompt_tokens": request.num_prompt,
        "chosen": decision.target.key,
        "predicted": decision.best._asdict() | {"is_measured": decision.is_known},
        "candidates": candidates,
    }
