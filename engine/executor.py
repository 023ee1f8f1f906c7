"""The protocol between a coordinator and its ranks. Adapters live with what they adapt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from shoal.engine.plan import StepPlan, StepResult


@dataclass(frozen=True, slots=True)
class ExecutorInfo:
    """What the ranks hold once they are up."""

    num_blocks: int  # KV blocks of every rank, block 0 included
    kv_bytes: int  # of all ranks together
    weight_bytes: int
    device_name: str


class ExecutorError(RuntimeError):
    """A rank failed; the replica cannot go on."""


class Executor(Protocol):
    """Ranks that carry out plans.

    `start` loads the weights and allocates the KV pool; it may take minutes and raises ConfigError for a checkpoint or
    a machine that cannot work. `execute` runs one step. `close` frees everything and may be called at any time, twice
    too.
    """

    def start(self) -> ExecutorInfo: ...

    def execute(self, plan: StepPlan) -> StepResult: ...

    def close(self) -> None: ...
