"""The protocol between a coordinator and its ranks. Adapters live with what they adapt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from shoal.engine.config import EngineConfig
from shoal.engine.plan import StepPlan, StepResult

Progress = Callable[[str, int, int], None]  # (what, done, total)


@dataclass(frozen=True, slots=True)
class RankInfo:
    """One rank that is up: where it stands in the model and on which machine it runs."""

    stage: int
    tensor_rank: int
    node: str  # host name or node address
    pid: int
    device_name: str
    first_layer: int
    num_layers: int
    weight_bytes: int
    kv_bytes: int


@dataclass(frozen=True, slots=True)
class ExecutorInfo:
    """What the ranks hold once they are up."""

    num_blocks: int  # KV blocks of every rank, block 0 included
    ranks: tuple[RankInfo, ...]


class ExecutorError(RuntimeError):
    """A rank failed; the replica cannot go on. The message names the rank and what happened to it."""


class Executor(Protocol):
    """Ranks that carry out plans in order.

    `start` loads the weights and allocates the KV pool; it may take minutes and raises ConfigError for a checkpoint or
    a machine that cannot work. `submit` hands over a plan behind those in flight (at most config.max_steps_in_flight)
    and `collect` waits for the result of the oldest one. `check` is for idle moments: it raises ExecutorError if a rank
    has died or fallen silent, as `submit` and `collect` do. No call waits for longer than config.step_timeout_s.
    `close` frees everything and may be called at any time, twice too.
    """

    def start(self) -> ExecutorInfo: ...

    def submit(self, plan: StepPlan) -> None: ...

    def collect(self) -> StepResult: ...

    def check(self) -> None: ...

    def close(self) -> None: ...


# Decides the config and makes the executor, which is not started yet. Raises ConfigError for what cannot work.
EngineFactory = Callable[[Progress], tuple[EngineConfig, Executor]]
