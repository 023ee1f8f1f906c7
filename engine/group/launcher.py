"""What a coordinator asks of whoever starts its ranks: processes of this host, or actors of a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class RankStart:
    """What a rank must know to find its coordinator.

    rank: its number within the group, stage * tensor_parallel + tensor rank.
    address: the coordinator's, "tcp://host:port".
    key: secret of the group, 32 hexadecimal digits. Who does not know it is not heard.
    """

    rank: int
    num_ranks: int
    address: str
    key: str


class RankHandle(Protocol):
    """A rank that was started."""

    def exit_reason(self) -> str | None:
        """None while it runs; otherwise what became of it, such as "was killed by signal 9". Does not block."""
        ...

    def kill(self) -> None:
        """End it at once. May be called twice."""
        ...


class Launcher(Protocol):
    """Starts the ranks of a group."""

    @property
    def bind_host(self) -> str:
        """The address of this host on which the ranks can reach the coordinator."""
        ...

    def launch(self, starts: Sequence[RankStart]) -> list[RankHandle]:
        """One rank for each of `starts`, in order. Does not wait until they are up."""
        ...
