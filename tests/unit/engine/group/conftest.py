"""Ranks as threads of the test's process, with a worker that counts; all messages are real."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from shoal.engine.config import EngineConfig, EngineOptions, ModelConfig
from shoal.engine.executor import RankInfo
from shoal.engine.group import coordinator
from shoal.engine.group.coordinator import GroupExecutor, open_group
from shoal.engine.group.launcher import RankHandle, RankStart
from shoal.engine.group.rank import Rank
from shoal.engine.parallel.collectives import Collectives
from shoal.engine.parallel.pipeline import StageLinks
from shoal.engine.parallel.topology import Topology
from shoal.engine.plan import StepPlan, StepResult

MODEL = ModelConfig(
    path="tiny",
    architecture="LlamaForCausalLM",
    num_layers=4,
    hidden_size=8,
    num_heads=4,
    num_kv_heads=2,
    head_dim=2,
    vocab_size=97,
    max_position=64,
    layer_windows=(None,) * 4,
    stored_dtype="float32",
    num_parameters=1,
    eos_token_ids=(0,),
    hf_config={"intermediate_size": 16},
)

Do = Callable[[Topology], object]


def nothing(topology: Topology) -> None:
    pass


@dataclass(slots=True)
class Script:
    """What the workers do besides counting, and what they saw."""

    on_load: Do = nothing
    on_launch: Do = nothing
    on_wait: Do = nothing
    num_blocks: Callable[[Topology], int] = lambda topology: 100 + topology.rank
    allocated: list[int] = field(default_factory=list)
    plans: dict[int, list[StepPlan]] = field(default_factory=dict)  # by rank


class CountingWorker:
    """Answers each continued request with the step's number."""

    def __init__(self, script: Script, topology: Topology, ranks_on_host: int) -> None:
        self._script = script
        self._topology = topology
        self._ranks_on_host = ranks_on_host
        self._plans = script.plans.setdefault(topology.rank, [])

    def load(self, progress: Callable[[str, int, int], None]) -> None:
        progress("loading weights", 0, 10)
        self._script.on_load(self._topology)
        progress("loading weights", 10, 10)

    def num_blocks_possible(self) -> int:
        return self._script.num_blocks(self._topology)

    def allocate(self, num_blocks: int) -> int:
        self._script.allocated.append(num_blocks)
        return num_blocks * self._ranks_on_host

    def info(self, kv_bytes: int, node: str) -> RankInfo:
        topology = self._topology
        return RankInfo(topology.stage, topology.tensor_rank, "here", 1, "none", topology.stage, 1, 7, kv_bytes)

    def expect(self, plan: StepPlan) -> None:
        pass

    def launch(self, plan: StepPlan) -> CountedStep:
        self._script.on_launch(self._topology)
        self._plans.append(plan)
        return CountedStep(self._script, self._topology, plan)


@dataclass(slots=True)
class CountedStep:
    script: Script
    topology: Topology
    plan: StepPlan

    def wait(self) -> StepResult:
        self.script.on_wait(self.topology)
        return StepResult(self.plan.step, {entry.request_id: (self.plan.step,) for entry in self.plan.continued})


class RankThread:
    """A rank in this process. `exit_reason` is what the test says."""

    def __init__(self, start: RankStart, script: Script) -> None:
        def make_worker(
            config: EngineConfig,
            topology: Topology,
            collectives: Collectives,
            links: StageLinks,
            *,
            ranks_on_host: int,
        ) -> CountingWorker:
            return CountingWorker(script, topology, ranks_on_host)

        self.reason: str | None = None
        self.lost: list[str] = []
        self.rank = Rank(start, self.lost.append, make_worker)
        self.thread = threading.Thread(target=self.rank.run, daemon=True)
        self.thread.start()

    def exit_reason(self) -> str | None:
        if self.reason is None and not self.thread.is_alive():
            return "ended"
        return self.reason

    def kill(self) -> None:
        self.rank.stop()


class ThreadLauncher:
    """Ranks as threads."""

    bind_host = "127.0.0.1"

    def __init__(self, script: Script) -> None:
        self.script = script
        self.starts: list[RankStart] = []
        self.ranks: list[RankThread] = []

    def launch(self, starts: Sequence[RankStart]) -> list[RankHandle]:
        self.starts = list(starts)
        self.ranks = [RankThread(start, self.script) for start in starts]
        return list(self.ranks)


@dataclass(slots=True)
class Opened:
    """A group that was opened, and the other ends of it."""

    config: EngineConfig
    executor: GroupExecutor
    launcher: ThreadLauncher
    progress: list[tuple[str, int, int]]


OpenGroup = Callable[..., Opened]


@pytest.fixture
def open_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenGroup]:
    """open_threads(script, **EngineOptions fields) -> Opened; closed, and its threads gone, after the test."""
    monkeypatch.setattr(coordinator, "read_model_config", lambda path: MODEL)
    launchers: list[ThreadLauncher] = []
    executors: list[GroupExecutor] = []

    def open_it(script: Script, **options: Any) -> Opened:
        launchers.append(ThreadLauncher(script))
        progress: list[tuple[str, int, int]] = []
        config, executor = open_group(
            EngineOptions(str(Path("tiny")), device="cpu", num_threads=1, **{"heartbeat_timeout_s": 2.0, **options}),
            launchers[-1],
            lambda what, done, total: progress.append((what, done, total)),
        )
        executors.append(executor)
        return Opened(config, executor, launchers[-1], progress)

    yield open_it
    for executor in executors:
        executor.close()
    for launcher in launchers:
        for rank in launcher.ranks:
            rank.thread.join(10)
            assert not rank.thread.is_alive(), "a rank outlived its group"


@pytest.fixture
def make_script() -> type[Script]:
    return Script
