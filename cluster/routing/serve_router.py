"""Ray Serve's side of routing: the adapter of `Router` to Serve 2.60's `RequestRouter`.

What Serve does with the answer, and what it costs: it tries the groups in order, and takes of a group the replica with
the shortest queue that is not full, by a cache of its own that forgets a replica after 10 s. Of a replica that is not
in the cache it asks the length, a remote call before the request is sent, and passes over one that is slow to answer:
`_warm_up` puts in what the replica has reported. Serve asks by itself once for each new replica, and when one seems
full. The replica then says whether it takes the request, which the request's own way does not wait for.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import ray
from ray.serve._private.common import ReplicaID
from ray.serve._private.constants import SERVE_NAMESPACE
from ray.serve._private.replica_result import ReplicaResult
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from shoal.cluster.channel import GenerateCall
from shoal.cluster.routing.model_routing import ModelRouting, routing_of
from shoal.cluster.routing.policies import DEFAULT_POLICY

# The first few go one by one, in the policy's order; the rest is one group, of which Serve takes the emptiest.
MAX_SINGLE: Final = 4


class ShoalRouter(RequestRouter):  # type: ignore[misc]  # Serve's decorators hide its type
    """Ranks replicas for calls of `generate`. Anything else goes to whichever replica is the least busy."""

    _routing: ModelRouting
    _names: Mapping[str, str] = MappingProxyType({})  # of the actors of replicas that take calls

    def initialize_state(self, policy: str = DEFAULT_POLICY, options: Mapping[str, Any] | None = None) -> None:
        """With `request_router_kwargs` of the deployment. Raises ConfigError."""
        self._routing = routing_of(self._deployment_id.app_name, self._deployment_id.name, policy, options)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """A replica that stops is left out from the moment it begins to; its open calls go on."""
        names = {_key(replica): replica.replica_id.to_full_id_str() for replica in replicas}
        if left := {key: name for key, name in self._names.items() if key not in names}:
            threading.Thread(target=self._count_lost, args=(left,), name="lost-replicas", daemon=True).start()
        self._names = names
        self._routing.update({_key(replica): replica.replica_metadata for replica in replicas})
        super().update_replicas(replicas)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        self._routing.lose(replica_id.unique_id)
        self._routing.remove(replica_id.unique_id)
        super().on_replica_actor_died(replica_id)

    def _count_lost(self, names: Mapping[str, str]) -> None:
        """Of replicas that take no calls any more, by their actors' names. One that is taken down in order lives on for
        a while, at least for DRAIN_POLL_S; what is gone by now has died.
        """
        for key, name in names.items():
            if has_died(name):
                self._routing.lose(key)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # or Serve asks again at once while all are full
        call = _call_of(pending_request)
        if call is None:
            return [candidate_replicas]
        by_key = {_key(replica): replica for replica in candidate_replicas}
        decision = self._routing.choose(call, by_key.keys())
        if decision is None:
            return [candidate_replicas]
        first = []
        for target, _ in decision.ranked[:MAX_SINGLE]:
            first.append([by_key.pop(target.key)])
            self._warm_up(first[-1][0], target.load.num_open)
        return [*first, list(by_key.values())]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult) -> None:
        if (call := _call_of(pending_request)) is not None:
            self._routing.confirm(call, replica_id.unique_id)

    def _warm_up(self, replica: RunningReplica, num_open: int) -> None:
        if self.replica_queue_len_cache.get(replica.replica_id) is None:
            self.replica_queue_len_cache.update(replica.replica_id, num_open)


def has_died(actor_name: str) -> bool:
    """Whether Ray knows no living actor of Serve by that name."""
    if not ray.is_initialized():  # else asking would start one
        return False
    try:
        ray.get_actor(actor_name, namespace=SERVE_NAMESPACE)
    except ValueError:
        return True
    return False


def _key(replica: RunningReplica) -> str:
    return str(replica.replica_id.unique_id)


def _call_of(pending: PendingRequest | None) -> GenerateCall | None:
    """The call of a request for `generate`; None for any other."""
    arguments: Sequence[object] = pending.args if pending is not None else ()
    first = arguments[0] if arguments else None
    return first if isinstance(first, GenerateCall) else None
