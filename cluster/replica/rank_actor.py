"""A Ray actor whose process is one rank of a replica group."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.cluster import hub
from shoal.engine.group.launcher import RankStart
from shoal.engine.group.rank import rank_main


class RankActor:
    """Lives for one call, which is the rank's whole life and ends with the process."""

    def run(self, start: RankStart, fetched: Sequence[str] = ()) -> None:
        """`fetched`: models of a hub that its coordinator has. Raises ConfigError."""
        for reference in fetched:
            hub.fetch(reference)
        rank_main(start)
