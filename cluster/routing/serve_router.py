"""Ray Serve's side of routing: the adapter of `Router` to Serve 2.60's `RequestRouter`.

What Serve does with the answer, and what it costs: it tries the groups in order, and takes of a group the replica with
the shortest queue that is not full, by a cache of its own that forgets a replica after 10 s. Of a replica that is not
in the cache it asks the length, a remote call before the request is sent, and passes over one that is slow to answer:
`_warm_up` puts in what the replica has reported. Serve asks by itself once for each new replica, and when one seems
full. The replica then says whether it takes the request, which the request's own way does not wait for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from ray.serve._private.common import ReplicaID
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

    def initialize_state(self, policy: str = DEFAULT_POLICY, options: Mapping[str, Any] | None = None) -> None:
        """With `request_router_kwargs` of the deployment. Raises ConfigError."""
        self._routing = routing_of(self._deployment_id.app_name, self._deployment_id.name, policy, options)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """A replica that stops is left out from the moment it begins to; its open calls go on."""
        self._routing.update({_key(replica): replica.replica_metadata for replica in replicas})
        super().update_replicas(replicas)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        self._routing.remove(replica_id.unique_id)
        super().on_replica_actor_died(replica_id)

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


def _key(replica: RunningReplica) -> str:
    return str(replica.replica_id.unique_id)


def _call_of(pending: PendingRequest | None) -> GenerateCall | None:
    """The call of a request for `generate`; None for any other."""
    arguments: Sequence[object] = pending.args if pending is not None else ()
    first = arguments[0] if arguments else None
    return first if isinstance(first, GenerateCall) else None
