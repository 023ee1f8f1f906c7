"""`shoal drain`: let the serving on this node end before its Ray is stopped."""

from __future__ import annotations

import sys
import time
from typing import Final

from shoal.cluster.commands.deploy import address_of
from shoal.cluster.commands.rollout import Narrator, StartError, as_start_error, join_ray
from shoal.cluster.commands.takedown import drain as drain_gateways
from shoal.cluster.config import LogSettings

POLL_S: Final = 0.5
ASK_TIMEOUT_S: Final = 10.0


def drain_node(timeout_s: float, ray_address: str | None = None) -> int:
    """Make what serves here go: replicas and gateways move to other nodes if there is room, and finish what they have.

    On a node that is not the head, Ray is told that the node goes within `timeout_s`. The head cannot be replaced: its
    gateways refuse new requests and finish the open ones. Answers 0 when nothing is left here that serves somebody, and
    1 if that takes longer.
    """
    import ray

    narrator = Narrator(time.monotonic(), LogSettings())
    try:
        with as_start_error():
            join_ray(address_of(ray_address), is_verbose=False)
            node_id, gcs_address = ray.get_runtime_context().get_node_id(), ray.get_runtime_context().gcs_address
            if _is_head(node_id):
                return 0 if drain_gateways(timeout_s, narrator.say, node_id=node_id) else 1
            ray.shutdown()  # what is connected to a node ends with it
            return _leave(node_id, gcs_address, timeout_s, narrator)
    except StartError as error:
        print(f"shoal: error: {error}", file=sys.stderr)
        return 1


def _leave(node_id: str, gcs_address: str, timeout_s: float, narrator: Narrator) -> int:
    """Ray ends the node's own daemon when nothing is left on the node."""
    from ray import NodeID
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated import autoscaler_pb2

    client = GcsClient(address=gcs_address)
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline_ms = int((time.time() + timeout_s) * 1000)
    is_accepted, why = client.drain_node(node_id, reason, "shoal drain", deadline_ms)
    if not is_accepted:
        raise StartError(f"Ray does not let this node go: {why}")
    narrator.say("this node goes: replicas and gateways move if they can, and finish what they have")
    deadline = time.monotonic() + timeout_s
    while client.check_alive([NodeID.from_hex(node_id)], timeout=ASK_TIMEOUT_S)[0]:
        if time.monotonic() > deadline:
            narrator.say(f"not empty after {timeout_s:g} s")
            return 1
        time.sleep(POLL_S)
    narrator.say("nothing serves here")
    return 0


def _is_head(node_id: str) -> bool:
    import ray

    heads = [node["NodeID"] for node in ray.nodes() if "node:__internal_head__" in node["Resources"]]
    return node_id in heads
