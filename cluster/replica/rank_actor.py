"""A Ray actor whose process is one rank of a replica group."""

from __future__ import annotations

from shoal.engine.group.launcher import RankStart
from shoal.engine.group.rank import rank_main


class RankActor:
    """Lives for one call, which is the rank's whole life and ends with the process."""

    def run(self, start: RankStart) -> None:
        rank_main(start)
