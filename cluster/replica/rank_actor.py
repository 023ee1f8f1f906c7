"""A Ray actor whose process is one rank of a replica group."""

from __future__ import annotations

import os

from shoal.cluster.logs import log_as_environment_says
from shoal.engine.group.launcher import RankStart
from shoal.engine.group.rank import rank_main


class RankActor:
    """Lives for one call, which is the rank's whole life and ends with the process."""

    def run(self, start: RankStart, replica: str) -> None:
        log_as_environment_says(os.environ, replica=replica)
        rank_main(start)
