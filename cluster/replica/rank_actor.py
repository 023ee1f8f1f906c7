"""A Ray actor whose process is one rank of a replica group."""

from __future__ import annotations

import ray

from shoal.engine.group.launcher import RankStart
from shoal.engine.group.rank import rank_main


class RankActor:
    """Lives for one call: the rank's whole life."""

    def run(self, start: RankStart) -> None:
        """Be the rank until its coordinator lets it go. The process ends with it."""
        rank_main(start)
        ray.actor.exit_actor()
