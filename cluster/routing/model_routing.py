"""What one gateway process has for routing the calls of one model: the router, and what feeds it.

Serve's adapter (serve_router.py) says which replicas there are and asks where a call goes, possibly in a thread of its
own; the gateway says which calls are open and how far they are. Both find it by the name of the deployment.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import msgspec

from shoal.cluster.channel import GenerateCall, Held, ReplicaView, Reserved, Settled, decode_load
from shoal.cluster.metrics import (
    GROUP_RESTARTS,
    INDEX_BLOCKS,
    INDEX_STALENESS,
    ROUTING_DECISIONS,
    ROUTING_MATCHED_TOKENS,
    ROUTING_PROMPT_TOKENS,
    ROUTING_SECONDS,
    Point,
    Snapshot,
)
from shoal.cluster.routing.cost import Estimate
from shoal.cluster.routing.load import Reservation
from shoal.cluster.routing.mirror import Mirror, MirroredReservations
from shoal.cluster.routing.policies import PrefixAware, RoutedRequest, Target, make_policy
from shoal.cluster.routing.router import Decision, Routed, Router
from shoal.cluster.routing.subscriber import EndpointsError, EventSubscriber
from shoal.engine.request import BlockHash

log = logging.getLogger(__name__)

Metadata = Mapping[str, Any]  # of a replica: what its `record_replica_metadata` says
LABEL: Final = "label"
MAX_LOST: Final = 256  # replicas that are remembered, so that none counts twice
MAX_CANDIDATES: Final = 4  # of a decision, that a timeline tells
MAX_MODEL_LEN: Final = "max_model_len"
Reason = Literal["cached", "elsewhere", "new"]


@dataclass(frozen=True, slots=True)
class Foresight:
    """What a request would meet at the replica of the least cost, in seconds."""

    ttft_s: float
    wait_s: float  # of ttft_s, until others are done
    tpot_s: float
    next_end_s: float  # until one of the requests there ends, at the rate of late; 0 if that is not known
    num_replicas: int  # whose speed is known


@dataclass(slots=True)
class _OpenCall:
    request: RoutedRequest | None  # None: it came when no replica was known
    decision: Decision | None = None
    routed: Routed | None = None
    is_settled: bool = False


class ModelRouting:
    """Every method may be called from any thread."""

    def __init__(
        self,
        deployment: str,
        policy: str = "prefix_aware",
        options: Mapping[str, Any] | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises ConfigError for a policy that there is not."""
        self.deployment = deployment
        self._clock = clock
        self.router = Router(make_policy(policy, options), clock=clock, on_reserve=self._tell, on_settle=self._untell)
        self.mirrored = MirroredReservations(self.router, clock)
        self._mirror: Mirror | None = None
        self._subscriber = EventSubscriber(
            self._on_load, self.router.lock, self.router.index, on_slot=self.router.move, clock=clock
        )
        self._followed: set[str] = set()
        self._replicas: dict[str, Metadata] = {}
        self._reports: dict[str, bytes] = {}
        self._block_size: int | None = None
        self._open: dict[str, _OpenCall] = {}
        self._lost: deque[str] = deque(maxlen=MAX_LOST)
        self._num_lost = 0
        self._decisions: dict[Reason, int] = {"cached": 0, "elsewhere": 0, "new": 0}
        self._prompt_tokens = 0
        self._matched_tokens = 0

    def share(self, mirror: Mirror) -> None:
        """Tell other gateways of reservations from now on."""
        self._mirror = mirror

    def start(self) -> None:
        """Begin to follow replicas' events and reports."""
        self._subscriber.start()

    def close(self) -> None:
        self._subscriber.close()

    # -- replicas ----------------------------------------------------------------------------------------------

    @property
    def keys(self) -> Collection[str]:
        return self._replicas.keys()

    def update(self, replicas: Mapping[str, Metadata]) -> None:
        """These are the replicas that take calls. What is gone gets none, and what it held is forgotten."""
        with self.router.lock:
            for key in self._replicas.keys() - replicas.keys():
                self.remove(key)
            for key in replicas.keys() - self._replicas.keys():
                self._add(key, replicas[key])

    def remove(self, key: str) -> None:
        """A replica is gone. An unknown one is no error."""
        with self.router.lock:
            target = self.router.target(key)
            if target is None:
                return
            del self._replicas[key]
            self._reports.pop(key, None)
            self.router.remove(key)
            if key in self._followed:
                self._followed.remove(key)
                self._subscriber.unfollow(key)
            else:
                self.router.index.close(target.slot)

    def lose(self, key: str) -> None:
        """A replica has died, and was not taken down in order. It counts once, however often this is said."""
        with self.router.lock:
            if key not in self._lost:
                self._lost.append(key)
                self._num_lost += 1

    def _add(self, key: str, metadata: Metadata) -> None:
        self._replicas[key] = metadata
        try:
            slot = self._subscriber.follow(key, metadata)
        except EndpointsError as error:
            log.error("replica %s is not followed, so its load and its cached prefixes are not known: %s", key, error)
            self.router.add(key)
            return
        self._followed.add(key)
        self._block_size = int(metadata["block_size"])
        self.router.add(key, slot)

    @property
    def max_model_len(self) -> int | None:
        """The shortest of the replicas that take calls."""
        return min((one[MAX_MODEL_LEN] for one in list(self._replicas.values()) if MAX_MODEL_LEN in one), default=None)

    def label(self, key: str) -> str:
        """The `engine` label of the replica's metrics."""
        return str(self._replicas.get(key, {}).get(LABEL, key))

    def _on_load(self, key: str, payload: bytes) -> None:
        """A load report has come. One that is only repeated says that the replica lives, and nothing of its load."""
        if self._reports.get(key) == payload or not payload:
            return
        try:
            report = decode_load(payload)
        except msgspec.DecodeError as error:
            log.warning("replica %s sends reports that cannot be read: %s", key, error)
            return
        with self.router.lock:
            if key not in self._replicas:
                return
            self._reports[key] = payload
            self.router.report(key, report.load)
        if self._mirror is not None:
            self._mirror.meet(report.gateways)

    # -- calls -------------------------------------------------------------------------------------------------

    def describe(self, call: GenerateCall) -> RoutedRequest | None:
        """The call in the router's terms; 1 us a block of its prompt. None while no replica is known."""
        if self._block_size is None:
            return None
        return self.router.describe(
            request_id_of(call),
            call.prompt_ids,
            block_size=self._block_size,
            salt=call.cache_salt,
            max_tokens=call.params.max_tokens,
            session=call.session,
        )

    def foresee(self, request: RoutedRequest) -> Foresight | None:
        """None where nobody can know: no replica is up, or none has computed enough."""
        router = self.router
        with router.lock:
            targets = [target for key in router.keys if (target := router.target(key)) is not None]
            known = [target for target in targets if target.load.is_known]
            if not known:
                return None
            matched, now = router.match(request), self._clock()
            target, best = PrefixAware().rank(request, known, matched, now)[0]
            assert best is not None
            load = target.load
            time_, report = load.step_time, load.report
            return Foresight(
                ttft_s=best.ttft_s,
                wait_s=max(0.0, best.ttft_s - load.seconds_per_token * best.num_uncached),
                tpot_s=load.step_s + time_.per_decode_token + time_.per_context_token * request.num_prompt,
                next_end_s=1.0 / report.finished_per_s if report is not None and report.finished_per_s > 0 else 0.0,
                num_replicas=len(known),
            )

    def open(self, call: GenerateCall, request: RoutedRequest | None) -> None:
        """The call will be routed. Ends with `close`."""
        self._open[request_id_of(call)] = _OpenCall(request)

    def choose(self, call: GenerateCall, keys: Collection[str]) -> Decision | None:
        """Rank the replicas `keys` for a call and reserve its place at the best one, if the call is open."""
        request_id = request_id_of(call)
        with self.router.lock:
            one = self._open.get(request_id)
            request = (one.request if one is not None else None) or self.describe(call)
            if request is None:
                return None
            decision = self.router.decide(request, keys)
            if decision is None or one is None or one.is_settled:
                return decision
            self._count(decision, is_first=one.decision is None)
            self.router.reserve(decision)
            one.request, one.decision, one.routed = request, decision, self.router.routed(request_id)
            return decision

    def confirm(self, call: GenerateCall, key: str) -> None:
        """The replica `key` has taken the call; perhaps it was not the best one that did."""
        request_id = request_id_of(call)
        with self.router.lock:
            one = self._open.get(request_id)
            if one is None or one.is_settled or one.decision is None or one.routed is None or one.routed.key == key:
                return
            self.router.reserve(one.decision, key)
            one.routed = self.router.routed(request_id)

    def settle(self, call: GenerateCall) -> None:
        """The call has its first token."""
        request_id = request_id_of(call)
        with self.router.lock:
            if (one := self._open.get(request_id)) is not None:
                one.is_settled = True
            self.router.settle(request_id)

    def close_call(self, call: GenerateCall, num_output_tokens: int | None) -> None:
        """The call is over, with so many tokens of a sample if it was finished."""
        with self.router.lock:
            self._open.pop(request_id_of(call), None)
            self.router.settle(request_id_of(call))
            if num_output_tokens is not None:
                self.router.finish(num_output_tokens)

    def placement(self, call: GenerateCall) -> tuple[str, Estimate, Decision] | None:
        """An open call's replica, by its label, what was foreseen there, and the decision. Also after the first
        token.
        """
        one = self._open.get(request_id_of(call))
        if one is None or one.routed is None or one.decision is None:
            return None
        return self.label(one.routed.key), one.routed.estimate, one.decision

    def candidates(self, decision: Decision) -> tuple[Mapping[str, Any], ...]:
        """The best few of a decision, by label, as plain data."""
        return tuple(
            {
                "replica": self.label(target.key),
                "num_matched_tokens": one.num_matched,
                "ttft_s": one.ttft_s,
                "cost_s": one.cost_s,
            }
            for target, one in decision.ranked[:MAX_CANDIDATES]
            if one is not None
        )

    def _count(self, decision: Decision, *, is_first: bool) -> None:
        if not is_first:  # a replica was full, and the same call is ranked again
            return
        matched = decision.best.num_matched
        self._prompt_tokens += decision.request.num_prompt
        self._matched_tokens += matched
        most = decision.num_cached_blocks * decision.request.block_size
        self._decisions["new" if not most else "cached" if matched == most else "elsewhere"] += 1

    # -- what it knows -----------------------------------------------------------------------------------------

    def views(self) -> dict[str, ReplicaView]:
        """By label."""
        with self.router.lock:
            return {self.label(key): self._view(key, target) for key, target in self._known_targets()}

    def explain(self) -> list[dict[str, Any]]:
        """See `Router.explain`; with the replicas' labels."""
        labels = {key: self.label(key) for key in self._replicas}
        return [one | {"labels": labels} for one in self.router.explain()]

    def snapshot(self, model: str) -> Snapshot:
        """What this gateway has counted."""
        views = self.views()
        return (
            Point(GROUP_RESTARTS.name, (model,), float(self._num_lost)),
            *(Point(ROUTING_DECISIONS.name, (model, reason), float(n)) for reason, n in self._decisions.items()),
            Point(ROUTING_SECONDS.name, (model,), self.router.decision_seconds_total),
            Point(ROUTING_PROMPT_TOKENS.name, (model,), float(self._prompt_tokens)),
            Point(ROUTING_MATCHED_TOKENS.name, (model,), float(self._matched_tokens)),
            *(
                Point(INDEX_BLOCKS.name, (model, label), float(view.num_indexed_blocks))
                for label, view in views.items()
            ),
            *(
                Point(INDEX_STALENESS.name, (model, label), view.staleness_s)
                for label, view in views.items()
                if view.staleness_s is not None
            ),
        )

    def _known_targets(self) -> Sequence[tuple[str, Target]]:
        return [(key, target) for key in self._replicas if (target := self.router.target(key)) is not None]

    def _view(self, key: str, target: Target) -> ReplicaView:
        load = target.load
        return ReplicaView(
            seconds_per_prompt_token=load.seconds_per_token if load.is_known else None,
            num_indexed_blocks=self.router.index.num_pairs(target.slot),
            staleness_s=self._subscriber.staleness_s(key) if key in self._followed else None,
            num_tokens_routed=load.num_tokens_routed,
        )

    # -- other gateways ----------------------------------------------------------------------------------------

    def _tell(self, key: str, reservation: Reservation, block_hashes: Sequence[BlockHash]) -> None:
        if self._mirror is not None and self._mirror.has_peers:
            self._mirror.tell(
                Reserved(
                    self.deployment,
                    reservation.request_id,
                    key,
                    reservation.num_uncached,
                    tuple(block_hashes),
                )
            )

    def _untell(self, request_id: str) -> None:
        if self._mirror is not None:
            self._mirror.tell(Settled(self.deployment, request_id))


def request_id_of(call: GenerateCall) -> str:
    """What stands for a call here and in its replica's reports: its first sample computes the prompt."""
    return call.sample_ids[0]


_routings: dict[str, ModelRouting] = {}
_lock = threading.Lock()


def routing_of(
    application: str, deployment: str, policy: str, options: Mapping[str, Any] | None = None
) -> ModelRouting:
    """The one of this process for that deployment; whoever comes first makes it. Raises ConfigError."""
    name = f"{application}/{deployment}"
    with _lock:
        if name not in _routings:
            _routings[name] = ModelRouting(name, policy, options)
            _routings[name].start()
        return _routings[name]


def take_peer_message(message: Reserved | Held | Settled) -> None:
    """Give another gateway's word to the deployment that it is about."""
    if (routing := _routings.get(message.deployment)) is not None:
        routing.mirrored.take(message)


def expire_mirrored() -> None:
    """End what gateways have left behind that are gone."""
    for routing in list(_routings.values()):
        routing.mirrored.expire()
