"""A Ray actor whose process is one rank of a replica group."""

from __future__ import annotations

import os
from collections.abc import Sequence

from shoal.cluster import hub
from shoal.cluster.logs import log_as_environment_says
from shoal.engine.group.launcher import RankStart


class RankActor:
    """Lives for one call, which is the rank's whole life and ends with the process."""

    def run(self, start: RankStart, replica: str, fetched: Sequence[str] = ()) -> None:
        """`fetched`: models of a hub that its coordinator has. Raises ConfigError."""
        log_as_environment_says(os.environ, replica=replica)
        for reference in fetched:
            hub.fetch(reference)
        # torch takes seconds and 300 MiB, which whoever only names this class (gateways, `shoal deploy`) need not pay.
        from shoal.engine.group.rank import rank_main

        rank_main(start)
