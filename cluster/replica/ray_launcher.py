"""Ranks as Ray actors in the placement group of their coordinator: the cluster's adapter of the engine's Launcher."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from shoal.cluster.replica.placement import Resources
from shoal.cluster.replica.rank_actor import RankActor
from shoal.engine.group.launcher import RankHandle, RankStart


class RayLauncher:
    """Starts rank actors, a stage a bundle. They are owned by this process: if it dies, Ray ends them."""

    def __init__(self, tensor_parallel: int, resources: Resources, replica: str, fetched: Sequence[str] = ()) -> None:
        """`resources` are of one rank, `replica` is what its log lines name; `fetched` are models of a hub that the
        ranks' nodes must have too. To be made in an actor that is in the group's placement group.
        """
        self._replica = replica
        self._fetched = tuple(fetched)
        self._tensor_parallel = tensor_parallel
        self._resources = resources
        group = ray.util.get_current_placement_group()
        assert group is not None, "the coordinator of a group is in a placement group"
        self._group: PlacementGroup = group

    @property
    def bind_host(self) -> str:
        """This node's address in the Ray cluster."""
        return str(ray.util.get_node_ip_address())

    def launch(self, starts: Sequence[RankStart]) -> list[RankHandle]:
        return [self._launch(start) for start in starts]

    def _launch(self, start: RankStart) -> RankHandle:
        actor = (
            ray.remote(RankActor)
            .options(
                num_cpus=self._resources.num_cpus,
                num_gpus=self._resources.num_gpus,
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self._group, placement_group_bundle_index=start.rank // self._tensor_parallel
                ),
            )
            .remote()
        )
        return RankActorHandle(actor, actor.run.remote(start, self._replica, self._fetched).future())


class RankActorHandle:
    """A rank actor, seen by its coordinator. Raises nothing."""

    def __init__(self, actor: ActorHandle[RankActor], end: Future[None]) -> None:
        self._actor = actor
        self._end = end

    def exit_reason(self) -> str | None:
        """None while it runs or waits for its place; otherwise how it ended."""
        if not self._end.done():
            return None
        error = self._end.exception()
        if error is None:
            return "ended"
        return f"{'died' if isinstance(error, RayActorError) else 'failed'} ({_reason(error)})"

    def kill(self) -> None:
        ray.kill(self._actor, no_restart=True)


def _reason(error: BaseException) -> str:
    """Ray puts it behind a heading, a traceback and what is said already, and before some guesses."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    last = lines[-1] if lines else type(error).__name__
    return last.rpartition("Worker exit detail: ")[2].partition(" Some common causes")[0]
